"""The index of a store says what its folders say, whatever happened to either."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from robudget.recipe import Recipe
from robudget.store import RunFolder
from robudget.tables import index
from robudget.tables.read import load_runs


def finish(store: Path, seed: int, robust: float = 0.5) -> RunFolder:
    recipe = Recipe.load("digits", {"seed": seed})
    folder = RunFolder(store / f"{recipe.slug}-{recipe.id}")
    folder.open(recipe)
    energy = {"kwh": 0.002, "seconds": 7.0, "how": "measured"}
    folder.finish({
        "id": recipe.id, "slug": recipe.slug, "status": "done", "recipe": recipe.to_dict(),
        "training": {"images_seen": 100, "seconds": 7.0, "energy": energy},
        "evaluation": {"clean": 0.9, "robust": robust, "n": 10, "energy": energy},
    })  # fmt: skip
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(index, "LEAST_RUNS", 2)
    for seed in range(4):
        finish(tmp_path, seed)
    return tmp_path


def read_afresh(store: Path) -> pd.DataFrame:
    (store / index.FILE).unlink(missing_ok=True)
    table = load_runs(store)
    (store / index.FILE).unlink(missing_ok=True)
    return table


def test_it_is_read_instead_of_the_records(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_runs(store)
    assert (store / index.FILE).exists()
    monkeypatch.setattr(RunFolder, "record", lambda self: pytest.fail("a record was read"))
    pd.testing.assert_frame_equal(load_runs(store), first)


def test_a_run_that_was_done_again_added_or_removed(store: Path) -> None:
    load_runs(store)
    changed = finish(store, 1, robust=0.7)
    finish(store, 9)
    gone = finish(store, 2)
    (gone.path / "run.json").unlink()
    table = load_runs(store)
    assert len(table) == 4
    assert table.loc[table.run_id == changed.recipe.id, "aa_acc"].item() == pytest.approx(70.0)
    pd.testing.assert_frame_equal(table, read_afresh(store))


def test_a_record_changed_in_place_with_the_same_length_and_time(store: Path) -> None:
    """What `cp -p` leaves: the inode tells."""
    load_runs(store)
    path = finish(store, 1).path / "run.json"
    load_runs(store)
    before, text = path.stat(), path.read_text()
    assert '"robust": 0.5' in text
    copy = path.with_suffix(".copy")
    copy.write_text(text.replace('"robust": 0.5', '"robust": 0.6'))
    copy.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sorted(load_runs(store).aa_acc) == pytest.approx([50.0, 50.0, 50.0, 60.0])


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing", b"{}"])
def test_a_damaged_index_is_written_again(store: Path, content: bytes) -> None:
    expected = read_afresh(store)
    (store / index.FILE).write_bytes(content)
    pd.testing.assert_frame_equal(load_runs(store), expected)
    pd.testing.assert_frame_equal(load_runs(store), expected)


def test_an_index_of_other_code_is_not_believed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_version", lambda reader: "of another version")
    load_runs(store)
    monkeypatch.undo()
    monkeypatch.setattr(index, "LEAST_RUNS", 2)
    read = []
    record = RunFolder.record
    monkeypatch.setattr(RunFolder, "record", lambda self: read.append(self) or record(self))
    load_runs(store)
    assert len(read) == 4


def test_prices_are_not_in_it(store: Path) -> None:
    from robudget.meter.prices import Prices

    load_runs(store)
    dear = load_runs(store, prices=Prices(name="dear", usd_per_kwh=4.0, pue=2.0))
    assert dear.cost_usd.tolist() == pytest.approx([0.002 * 4.0 * 2.0] * 4)


def test_a_store_that_cannot_be_written_is_still_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(index, "replace", refuse)
    assert len(load_runs(store)) == 4
    assert not (store / index.FILE).exists()


def test_a_small_store_gets_none(tmp_path: Path) -> None:
    finish(tmp_path, 0)
    assert len(load_runs(tmp_path)) == 1
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []
    assert json.loads((next(tmp_path.glob("*/run.json"))).read_text())["status"] == "done"
