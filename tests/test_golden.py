"""What earlier versions of robudget left on the disk is read as it was, and what they left half done is finished.

`tests/golden/<version>` is made by `tests/golden/make.py`, run with that version. Each test works on a copy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import robudget as rb
from robudget.errors import InputError
from robudget.tables import read_table

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if (path / "expected.json").exists())
KINDS = [
    (version, kind)
    for version in VERSIONS
    for kind in json.loads((GOLDEN / version / "expected.json").read_text("utf-8"))["half-trained"]
]
EVALUATIONS = [
    (version, name)
    for version in VERSIONS
    for name in json.loads((GOLDEN / version / "expected.json").read_text("utf-8"))["half-eval"]
]
SITE = rb.Site(device="cpu", threads=1)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected(version: str) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((GOLDEN / version / "expected.json").read_text("utf-8"))
    return whole


def copy(version: str, name: str, to: Path) -> Path:
    shutil.copytree(GOLDEN / version / name, to / name)
    return to / name


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def same_bits(version: str) -> str | None:
    """Why this machine's bits may differ from those of the machine that made the files; None where they may not."""
    theirs = json.loads((GOLDEN / version / "environment.json").read_text("utf-8"))
    if theirs["packages"]["torch"] != torch.__version__.partition("+")[0]:
        return f"made with torch {theirs['packages']['torch']}, not {torch.__version__}"
    if theirs["cpu_capability"] != torch.backends.cpu.get_cpu_capability():
        return f"made on a CPU with {theirs['cpu_capability']}"
    return None


def finished(version: str, recipe: rb.Recipe, store: Path) -> Any:
    """The run, gone on with; on a machine of other bits it may be refused, in one line."""
    try:
        return rb.run(recipe, store=store, site=SITE)
    except InputError as error:
        if (reason := same_bits(version)) is None or "\n" in str(error):
            raise
        pytest.skip(f"refused, as designed ({error}): {reason}")


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def as_columns(verdicts: rb.Verdicts) -> dict[str, Any]:
    columns: dict[str, Any] = verdicts.frame.to_dict("list")
    return columns


def same_verdicts(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return mine.keys() >= theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("version", VERSIONS)
def test_recipes_and_studies_keep_their_ids(version: str) -> None:
    golden = expected(version)["recipes"]
    for name, changes, ids in golden["recipes"]:
        recipe = rb.Recipe.load(name, changes)
        assert {key: getattr(recipe, key) for key in ids} == ids, (name, changes)
    for name, study in golden["studies"].items():
        recipes = rb.Study.load(name).recipes
        rows = [[recipe.id, recipe.evaluation_id, recipe.slug] for recipe in recipes]
        assert len(rows) == study["recipes"]
        assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == study["sha256"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_finished_run_is_read_and_nothing_is_done_again(version: str, tmp_path: Path) -> None:
    store = copy(version, "sweep", tmp_path)
    before = contents(store)
    theirs = expected(version)["sweep"]
    first = min(store.iterdir())
    recipe = rb.Recipe.load(first / "recipe.yaml")
    result = rb.run(recipe, store=store, site=SITE)
    assert result.folder.path == first
    assert result.record == json.loads((first / "run.json").read_text("utf-8"))
    assert result.summary.startswith("robust ")
    assert same_verdicts(as_columns(result.verdicts), theirs["verdicts"])
    assert contents(store) == before


@pytest.mark.parametrize("version", VERSIONS)
def test_a_finished_sweep_is_skipped(
    version: str, tmp_path: Path, robudget_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy(version, "sweep", tmp_path)
    before = contents(store)
    shutil.copy(GOLDEN / version / "study.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, error = robudget_command(
        "sweep", "study.yaml", "--store", "sweep", "--json", "--workers", "1", "device=cpu", "threads=1"
    )
    assert code == 0, error
    assert {row["run_id"] for row in json.loads(out)} == {recipe.id for recipe in rb.Study.load("study.yaml").recipes}
    assert contents(store) == before


@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_of_a_store_is_the_one_it_was(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy(version, "sweep", tmp_path)
    monkeypatch.chdir(tmp_path)
    theirs = pd.read_parquet(GOLDEN / version / "table.parquet")
    mine = rb.load_runs("sweep")
    assert set(theirs) <= set(mine)
    pd.testing.assert_frame_equal(mine[list(theirs)], theirs)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_table_in_a_file_is_read_as_the_store_is(
    version: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(version, "sweep", tmp_path)
    monkeypatch.chdir(tmp_path)
    mine, theirs = read_table(GOLDEN / version / name), read_table("sweep")
    # CSV has no types of its own: a column of whole floats or of nothing but unknowns says less there.
    pd.testing.assert_frame_equal(mine, theirs[list(mine)], check_dtype=name.endswith(".parquet"))


@pytest.mark.parametrize(("version", "kind"), KINDS)
def test_a_half_trained_run_is_finished_to_the_same_bits(
    version: str, kind: str, tmp_path: Path, make: ModuleType
) -> None:
    store = copy(version, f"half-trained/{kind}", tmp_path)
    (folder,) = store.iterdir()
    epochs = len(events(folder, "epoch"))
    spent = sum(event["seconds"] for event in events(folder, "energy") if event["window"] == "training")
    noted = json.loads((folder / "energy.json").read_text("utf-8")) if (folder / "energy.json").exists() else None
    recipe = rb.Recipe.load(folder / "recipe.yaml")
    assert 2 <= epochs < recipe.epochs
    result = finished(version, recipe, store)
    assert result.record["training"]["epochs"] == recipe.epochs
    # Every epoch was trained once; what an attempt that was killed had spent is counted.
    assert [event["epoch"] for event in events(folder, "epoch")] == list(range(1, recipe.epochs + 1))
    spent += noted["seconds"] if noted is not None else 0
    assert result.record["training"]["seconds"] > spent > 0
    if (reason := same_bits(version)) is not None:
        pytest.skip(f"finished; its bits are not compared: {reason}")
    theirs = expected(version)["half-trained"][kind]
    assert make.weights(folder) == theirs["weights"]
    for mine, their in zip(events(folder, "epoch"), theirs["epochs"], strict=True):
        assert {key: mine[key] for key in their} == their
    assert same_verdicts(as_columns(result.verdicts), theirs["verdicts"])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_half_evaluated_run_is_finished_to_the_same_verdicts(version: str, tmp_path: Path, make: ModuleType) -> None:
    store = copy(version, "half-evaluated", tmp_path)
    (folder,) = store.iterdir()
    noted = json.loads((folder / "energy.json").read_text("utf-8"))
    checkpoint = (folder / "last.pt").read_bytes()
    result = finished(version, rb.Recipe.load(folder / "recipe.yaml"), store)
    assert (folder / "last.pt").read_bytes() == checkpoint
    assert result.record["evaluation"]["seconds"] > noted["seconds"] > 0
    theirs = expected(version)["half-evaluated"]
    assert make.weights(folder) == theirs["weights"]
    if (reason := same_bits(version)) is not None:
        pytest.skip(f"finished; its verdicts are not compared: {reason}")
    assert same_verdicts(as_columns(result.verdicts), theirs["verdicts"])


@pytest.mark.parametrize(("version", "name"), EVALUATIONS)
def test_a_half_done_evaluation_of_a_model_is_finished_to_the_same_verdicts(
    version: str, name: str, tmp_path: Path, robudget_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(version, f"half-eval/{name}", tmp_path)
    shutil.copy(GOLDEN / version / "weights.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    noted = json.loads((folder / "bill.json").read_text("utf-8")) if (folder / "bill.json").exists() else None
    before = stages_of(folder)
    theirs = expected(version)["half-eval"][name]
    code, _, error = robudget_command(*theirs["command"], "--out", str(folder), "--json")
    if code and (reason := same_bits(version)) is not None:
        assert code == 2
        assert len(error.strip().splitlines()) == 1
        pytest.skip(f"refused, as designed ({error.strip()}): {reason}")
    assert code == 0, error
    verdicts = rb.Verdicts.load(folder)
    # Stages that were done are not done again.
    after = {spent.attack: spent for spent in verdicts.spent}
    for stage in (stage for stage in before.values() if stage["done"]):
        assert after[stage["attack"]].seconds == stage["seconds"]
        assert after[stage["attack"]].forward == stage["forward"]
    bill = json.loads((folder / "bill.json").read_text("utf-8"))
    assert bill["seconds"] > (noted["seconds"] if noted is not None else 0)
    if (reason := same_bits(version)) is not None:
        pytest.skip(f"finished; its verdicts are not compared: {reason}")
    assert same_verdicts(as_columns(verdicts), theirs["verdicts"])


def stages_of(folder: Path) -> dict[str, Any]:
    with np.load(folder / "state" / "evaluation.npz") as data:
        stages: dict[str, Any] = json.loads(str(data["about"]))["spent"]
    return stages


@pytest.mark.parametrize("version", VERSIONS)
def test_finished_shards_and_their_examples_are_read(
    version: str, tmp_path: Path, robudget_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = copy(version, "shards", tmp_path)
    shutil.copy(GOLDEN / version / "weights.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(shards)
    code, out, error = robudget_command(
        "eval", "--merge", str(shards / "1"), str(shards / "2"), "--out", "merged", "--json"
    )
    assert code == 0, error
    merged = rb.Verdicts.load("merged")
    assert same_verdicts(as_columns(merged), expected(version)["shards"])
    parts = [rb.Verdicts.load(shards / name) for name in ("1", "2")]
    assert all(spent.flops and spent.energy_kwh for part in parts for spent in part.spent if spent.forward)
    broken = int((merged.clean & ~merged.robust).sum())
    assert broken
    code, out, error = robudget_command(
        "eval", "weights.safetensors", "--data", "digits", "--transfer", "merged/examples.npz", "--json"
    )
    assert code == 0, error
    assert json.loads(out) | {"threat": str(merged.threat), "n": broken, "fooled": broken, "transfer": 1} == json.loads(
        out
    )
    assert contents(shards) == before
