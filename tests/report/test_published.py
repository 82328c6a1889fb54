"""Runs beside published models: whose threat, which place, what is drawn."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.report import write
from robudget.report.sections.published import beside, others_figure, section
from robudget.report.table import ranked
from robudget.report.words import entry_name
from robudget.tables import read_table


@pytest.fixture
def others() -> pd.DataFrame:
    n = 6
    return pd.DataFrame({
        "run_id": [f"Author{2018 + i}Title_WRN-{i}" for i in range(n)], "dataset": "cifar10", "norm": "linf",
        "eps": [8 / 255] * 5 + [0.5], "aa_acc": [40.0, 50, 60, 70, np.nan, 80], "clean_acc": 90.0,
        "parameters": [1e7, 2e7, np.nan, 4e7, 1e7, 1e7], "synthetic": [False, False, True, True, False, False],
        "synthetic_amount": [0, 0, 5e7, 1e6, 0, 0], "extra_data": False,
    })  # fmt: skip


@pytest.fixture
def rows(demo_table: pd.DataFrame) -> pd.DataFrame:
    made = demo_table.assign(dataset="cifar10", norm="linf", eps=8 / 255)
    return ranked(made.assign(aa_acc=made.aa_acc.clip(upper=55), aa_acc_low=45.0, aa_acc_high=65.0))


def test_only_the_same_question(rows: pd.DataFrame, others: pd.DataFrame) -> None:
    assert list(beside(rows, others).aa_acc) == [70, 60, 50, 40]
    with pytest.raises(InputError, match=r"no published model has dataset = svhn \(found: cifar10\)"):
        beside(rows.assign(dataset="svhn"), others)
    with pytest.raises(InputError, match="the runs mix 2 values of eps"):
        beside(rows.assign(eps=np.resize([0.1, 0.2], len(rows))), others)


def test_the_place_of_the_best_run(rows: pd.DataFrame, others: pd.DataFrame) -> None:
    best = rows.aa_acc.max()
    assert 50 < best < 60
    standing = section(rows, beside(rows, others))
    assert "would stand at place 3 among 4 published models" in standing.lead
    assert "2 of them lie within its interval" in standing.lead
    names = [row[0] for row in standing.tables[0].rows]
    assert names == [
        "Author 2021 WRN-3",
        "Author 2020 WRN-2",
        "the best of these runs",
        "Author 2019 WRN-1",
        "Author 2018 WRN-0",
    ]
    assert standing.tables[0].rows[1][4] == "50.0 M synthetic"


def test_models_of_unknown_size_are_still_there(rows: pd.DataFrame, others: pd.DataFrame) -> None:
    drawn = others_figure(rows, beside(rows, others))
    assert drawn is not None
    _, caption = drawn
    assert "beside 4 published models" in caption
    assert "1 published models of unknown size" in caption
    assert others_figure(rows.assign(parameters=np.nan), beside(rows, others)) is None


def test_names() -> None:
    assert entry_name("Wang2023Better_WRN-70-16") == "Wang 2023 WRN-70-16"
    assert entry_name("Ding2020MMA") == "Ding 2020"
    assert entry_name("Standard") == "Standard"


def test_the_papers_runs_among_all_99(shared, tmp_path) -> None:
    paper = read_table(shared / "data" / "paper_runs.csv")
    published = read_table(shared / "data" / "robustbench" / "cifar10" / "Linf")
    page = write(paper, None, tmp_path, title="t", others=published).read_text("utf-8")
    assert "among 99 published models" in page
    assert 'id="figure-others"' in page
    assert (tmp_path / "figures" / "others.pdf").exists()


def test_without_them_there_is_no_such_section(written: Path) -> None:
    assert 'id="others"' not in written.read_text("utf-8")
