"""Tables from anywhere, put in order, and what is said of them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robudget.analysis import analyse
from robudget.errors import InputError
from robudget.tables import read_table
from robudget.tables.read import as_table, tidy
from robudget.tables.usable import points


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files(grid, tmp_path: Path, kind):
    path = tmp_path / f"runs.{kind}"
    getattr(grid, f"to_{kind}")(path, index=False)
    back = read_table(path)
    pd.testing.assert_frame_equal(back, tidy(grid), check_dtype=False)
    assert back.attrs["notes"] == ()
    assert as_table(path).equals(back)
    assert as_table(back) is back  # a tidy table is returned as it is


def test_the_papers_csv_is_recognised(shared):
    frame = read_table(shared / "data" / "paper_runs.csv")
    assert len(frame) == 319
    assert "train_flops_exact" in frame


def test_robustbench_is_recognised(shared):
    assert len(read_table(shared / "data" / "robustbench" / "cifar10" / "Linf")) == 99


def test_fractions_are_recognised_and_said(grid):
    frame = grid.assign(aa_acc=grid.aa_acc / 100, clean_acc=grid.clean_acc / 100)
    found = analyse(frame, resamples=20, predict=False, splits=False)
    assert found.law.predict(1e15) > 10
    assert any("read as fractions" in w for w in found.warnings)
    whole = analyse(grid, resamples=20, predict=False, splits=False)
    assert found.law.alpha == pytest.approx(whole.law.alpha)
    assert not any("fractions" in w for w in whole.warnings)


def test_percentages_that_are_small_stay(grid):
    tiny = grid.assign(aa_acc=0.5)  # the clean accuracies are percent, so these are, too
    assert tidy(tiny).aa_acc.max() == 0.5


def test_duplicates_are_dropped_and_said(grid):
    twice = pd.concat([grid, grid.iloc[:5]])
    frame = tidy(twice)
    assert len(frame) == len(grid)
    assert frame.attrs["notes"] == ("5 rows repeat another run and were dropped",)


def test_duplicates_without_a_name_are_dropped_too(grid):
    nameless = grid.drop(columns="run_id").assign(path="a", tags=[["x"]] * len(grid))
    frame = tidy(pd.concat([nameless, nameless.iloc[:3].assign(path="b")]))
    assert len(frame) == len(grid)
    assert frame.attrs["notes"] == ("3 rows repeat another run and were dropped",)


def test_two_runs_of_one_name_are_refused(grid):
    clash = pd.concat([grid, grid.iloc[:1].assign(aa_acc=12.0)])
    with pytest.raises(InputError, match=r"run_id 'run-000' names 2 different runs \(allowed: one each\)"):
        tidy(clash)


def test_flags_and_eps_as_text(grid):
    frame = tidy(grid.assign(synthetic=["yes", "no"] * 36, ema=["True", "0"] * 36, eps="8/255"))
    assert frame.synthetic.dtype == bool
    assert frame.ema.tolist() == [True, False] * 36
    assert frame.eps.iloc[0] == pytest.approx(8 / 255)
    with pytest.raises(InputError, match=r"synthetic = 'maybe' \(allowed: true, false\)"):
        tidy(grid.assign(synthetic="maybe"))


def test_a_table_of_several_datasets_has_to_be_selected_from(grid):
    both = pd.concat([grid, grid.assign(dataset="cifar10", run_id=grid.run_id + "c")])
    with pytest.raises(InputError, match="mixes 2 values of dataset"):
        analyse(both)
    assert analyse(both, choose={"dataset": "cifar10"}, resamples=20, predict=False, splits=False).counts.total == len(
        grid
    )
    with pytest.raises(InputError, match="no run has dataset = 'svhn' "):
        analyse(both, choose={"dataset": "svhn"})
    threats = pd.concat([grid, grid.assign(eps=8 / 255, run_id=grid.run_id + "e")])
    assert analyse(threats, choose={"eps": "8/255"}, resamples=20, predict=False, splits=False).counts.total == len(
        grid
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no table at"),
        ("runs.txt", "a,b\n1,2\n", "is no table"),
        ("empty.csv", "", "cannot read"),
        ("header.csv", "aa_acc,steps\n", "holds no run"),
        ("broken.parquet", "not parquet", "cannot read"),
    ],
)
def test_what_is_no_table(tmp_path: Path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_runs(tmp_path: Path):
    with pytest.raises(InputError):
        read_table(tmp_path)
    (tmp_path / "notes.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError):
        read_table(tmp_path)


def test_what_an_audit_leaves_is_part_of_a_runs_noise() -> None:
    table = pd.DataFrame(
        {"cost": [1.0, 2.0, 3.0], "aa_acc": 50.0, "n_eval": 100, "aa_acc_audit_sd": [0.0, 3.0, np.nan]}
    )
    assert points(table, "cost", "aa_acc").noise == pytest.approx([5.0, np.hypot(5, 3), 5.0])
    assert points(table, "cost", "aa_error").noise == pytest.approx([5.0, np.hypot(5, 3), 5.0])
    assert points(table.assign(clean_acc=50.0), "cost", "clean_acc").noise == pytest.approx([5.0] * 3)
