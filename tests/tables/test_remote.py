"""Stores and tables behind a URL: what is read there is what is read on the disk, and nothing is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from robudget.errors import InputError
from robudget.store import Store
from robudget.tables import read_table
from robudget.tables.index import LEAST_RUNS
from robudget.tables.read import load_runs

Run = Callable[..., tuple[int, str, str]]
GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0" / "sweep"


@pytest.fixture
def memory() -> Iterator[str]:
    """The golden store in fsspec's memory."""
    files = fsspec.filesystem("memory")
    files.put(str(GOLDEN), "/bucket/runs", recursive=True)
    yield "memory://bucket/runs"
    files.rm("/bucket", recursive=True)


def without_path(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="path")


def test_a_store_in_memory_and_behind_file_reads_as_on_the_disk(memory: str) -> None:
    here = load_runs(GOLDEN)
    assert len(here) > 1
    for url in (memory, memory + "/", f"file://{GOLDEN}"):
        there = load_runs(url)
        assert_frame_equal(without_path(there), without_path(here), check_exact=True)
    assert list(load_runs(memory).path) == [f"{memory}/{Path(p).name}" for p in here.path]
    assert len(load_runs(f"{memory}/{Path(here.path[0]).name}")) == 1, "a run's folder is a store of one"
    assert_frame_equal(without_path(read_table(memory)), without_path(read_table(GOLDEN)))


def test_nothing_is_written_there(memory: str, tmp_path: Path) -> None:
    """Not an index either, which a store of so many runs would get on the disk."""
    record = json.loads(next(GOLDEN.glob("*/run.json")).read_text())
    for i in range(LEAST_RUNS + 1):
        folder = tmp_path / f"run-{i}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(record | {"slug": f"run-{i}"}))
    before = sorted(tmp_path.rglob("*"))
    assert len(load_runs(f"file://{tmp_path}")) == LEAST_RUNS + 1
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match=r"cannot write to 'memory:/bucket/runs'.*allowed: a folder"):
        Store(memory)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files(tmp_path: Path, kind: str) -> None:
    frame = load_runs(GOLDEN)
    getattr(frame, f"to_{kind}")(tmp_path / f"runs.{kind}", index=False)
    there, here = read_table(f"file://{tmp_path}/runs.{kind}"), read_table(tmp_path / f"runs.{kind}")
    assert_frame_equal(there, here)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://none/runs", "'memory://none/runs'"),
        ("memory://none/runs.csv", "'memory://none/runs.csv': there is no such file"),
        ("nonsense://bucket/runs", "Protocol not known: nonsense"),
        ("s3://bucket/runs", "Install s3fs to access S3"),
        ("gs://bucket/runs", "gcsfs"),
    ],
)
def test_what_cannot_be_read_is_one_line(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError) as error:
        read_table(url)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_verbs(memory: str, robudget_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = robudget_command("runs", memory, "--json")
    assert code == 0
    assert {run["run_id"] for run in json.loads(out)} == set(load_runs(GOLDEN).run_id)
    code, _, err = robudget_command("run", "digits", "--store", memory)
    assert (code, err.count("\n")) == (2, 1)
    assert "URLs can only be read" in err
    code, _, err = robudget_command("report", memory, "--out", "memory://bucket/report")
    assert (code, err.count("\n")) == (2, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_another_version_is_named(memory: str) -> None:
    files = fsspec.filesystem("memory")
    path = files.glob("/bucket/runs/*/run.json")[0]
    files.pipe(path, b'{"format": 99}')
    with pytest.raises(InputError, match=r"memory://.*run.json' is of format 99"):
        load_runs(memory)
