"""The page: everything inside it, nothing outside it, and the table's numbers as they are."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robudget import report
from robudget.analysis import Analysis, analyse
from robudget.errors import InputError
from robudget.report import page
from robudget.report.sections.answer import sentence
from robudget.report.table import SHOWN, ranked

LOADS = {"src", "srcset", "data", "poster", "action", "formaction", "background", "manifest", "xlink:href"}
PAPER = Path(__file__).resolve().parents[2] / "../shared/data/paper_runs.csv"


class Reader(HTMLParser):
    """Every attribute, the text of each script, and the cells of the table of runs."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: dict[str, str] = {}
        self.styles: list[str] = []
        self.runs: list[list[str]] = []
        self.unclosed: list[str] = []
        self._stack: list[tuple[str, dict[str, str]]] = []
        self._in_runs = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in found.items()]
        if found.get("data-run") is not None:
            self.runs.append([])
            self._in_runs = True
        if tag == "td" and self._in_runs:
            self.runs[-1].append("")
        if tag not in {"meta", "link", "input", "br", "hr", "img"}:
            self._stack.append((tag, found))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self._stack or self._stack[-1][0] != tag:
            self.unclosed.append(tag)
        else:
            self._stack.pop()
        if tag == "tr":
            self._in_runs = False

    def handle_data(self, data: str) -> None:
        tag, attributes = self._stack[-1] if self._stack else ("", {})
        if tag == "script":
            self.scripts[attributes.get("id", f"script {len(self.scripts)}")] = data
        elif tag == "style":
            self.styles.append(data)
        elif self._in_runs and self.runs[-1]:
            self.runs[-1][-1] += data


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    return written.read_text("utf-8")


@pytest.fixture(scope="module")
def read(text: str) -> Reader:
    return Reader(text)


@pytest.fixture(scope="module")
def data(read: Reader) -> dict[str, Any]:
    return json.loads(read.scripts["data"])


def test_where_it_is_written(written: Path) -> None:
    assert written.name == "report.html"
    beside = {p.name for p in written.parent.iterdir()}
    assert beside == {"report.html", "figures"}, "no temporary file is left"
    assert len(list((written.parent / "figures").glob("*.pdf"))) == 14
    assert written.stat().st_size < 6e6


def test_it_is_well_formed(read: Reader) -> None:
    assert read.unclosed == []
    assert [tag for tag, _ in read._stack] == []


def test_it_loads_nothing_from_anywhere(read: Reader) -> None:
    for tag, name, value in read.attributes:
        if name in LOADS:
            assert value.startswith(("#", "data:")), (tag, name, value)
        if name == "href":
            assert value.startswith(("#", "data:", "figures/")), (tag, name, value)
        if name == "style":
            assert "url(" not in value or "url(#" in value
    for style in read.styles:
        assert "@import" not in style
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", style))
    assert ("meta", "http-equiv", "Content-Security-Policy") in read.attributes
    policy = next(v for t, n, v in read.attributes if t == "meta" and n == "content" and "default-src" in v)
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_links_inside_lead_somewhere(read: Reader) -> None:
    ids = {value for _, name, value in read.attributes if name == "id"}
    for tag, name, value in read.attributes:
        if name in ("href", "xlink:href") and value.startswith("#"):
            assert value[1:] in ids, (tag, value)
    named = [value for _, name, value in read.attributes if name == "id"]
    assert len(named) == len(set(named))


def test_figures_named_are_there(read: Reader, written: Path) -> None:
    linked = [value for _, name, value in read.attributes if name == "href" and value.startswith("figures/")]
    assert len(linked) == 42
    assert all((written.parent / target).stat().st_size > 1000 for target in linked)


def test_the_scripts_parse_as_one_each(read: Reader) -> None:
    assert "data" in read.scripts
    assert sum("plotly.js v" in script for script in read.scripts.values()) == 1


def test_folders_of_this_machine_stay_out(text: str) -> None:
    assert "/somewhere" not in text


def test_what_is_written_is_escaped(text: str) -> None:
    assert "Digits &amp; &lt;robustness&gt;" in text
    assert "<robustness>" not in text


# -- numbers ----------------------------------------------------------------------------------------------------------


def same(a: object, b: object) -> bool:
    if b is None or (isinstance(b, float) and math.isnan(b)):
        return a is None
    return a == b


def test_the_data_are_the_tables(data: dict[str, Any], demo_table: pd.DataFrame) -> None:
    rows = ranked(demo_table)
    assert data["n"] == len(demo_table)
    assert set(data["runs"]) == set(SHOWN)
    for column in SHOWN:
        for found, true in zip(data["runs"][column], rows[column], strict=True):
            assert same(found, true), (column, found, true)


def test_every_run_is_in_the_table_of_runs(read: Reader, demo_table: pd.DataFrame) -> None:
    rows = ranked(demo_table)
    assert len(read.runs) == len(rows)
    for cells, (_, row) in zip(read.runs, rows.iterrows(), strict=True):
        assert cells[0].startswith(row["slug"])
        if math.isnan(row["aa_acc"]):
            assert cells[1].startswith("unknown")
        else:
            assert cells[1].startswith(f"{row['aa_acc']:.1f}%")
            assert f"[{row['aa_acc_low']:.1f}, {row['aa_acc_high']:.1f}]" in cells[1]
        assert cells[-1].startswith(row["status"])


def test_unknown_is_never_zero(read: Reader, demo_table: pd.DataFrame) -> None:
    unpriced = next(cells for cells in read.runs if cells[0].startswith(demo_table["slug"][9]))
    assert [cell.strip() for cell in unpriced].count("unknown") == 3  # energy, cost, CO2e
    failed = next(cells for cells in read.runs if cells[0].startswith(demo_table["slug"][7]))
    assert failed[1].strip() == "unknown"
    assert failed[2].strip() == "unknown"
    assert not any(re.fullmatch(r"\$?0(\.0+)?%?", cell.strip()) for cell in (*unpriced, *failed))


def test_the_laws_numbers_are_the_analysiss(data: dict[str, Any], demo_analysis: Analysis, text: str) -> None:
    said = data["law"]
    assert (said["x"], said["y"]) == (demo_analysis.x, demo_analysis.y)
    assert said["lines"][0]["name"] == "power law"
    assert said["lines"][-1]["name"] == "weighted average of all forms"
    xs = np.array(said["grids"][demo_analysis.x])
    assert said["lines"][0]["y"] == pytest.approx(demo_analysis.law.predict(xs), rel=1e-5)
    low, high = demo_analysis.law.band(xs)
    assert said["lines"][0]["low"] == pytest.approx(low, rel=1e-5)
    assert said["lines"][0]["high"] == pytest.approx(high, rel=1e-5)
    energy = next(law for law in demo_analysis.costs if law.y == "train_energy_kwh")
    assert said["grids"]["train_energy_kwh"] == pytest.approx(energy.predict(xs), rel=1e-5)
    assert sentence(demo_analysis.law) in html.unescape(text)


def test_the_bill_adds_up(text: str, demo_table: pd.DataFrame) -> None:
    watt_hours = 1000 * (demo_table["train_energy_kwh"].sum() + demo_table["eval_energy_kwh"].sum())
    assert f"{watt_hours:.1f} Wh" in text
    assert "known for 29 of 30 runs" in text


def test_frontiers_climb(data: dict[str, Any]) -> None:
    for key, rows in data["frontiers"].items():
        x, y = key.split("|")
        xs, ys = [data["runs"][x][i] for i in rows], [data["runs"][y][i] for i in rows]
        assert xs == sorted(xs)
        assert ys == sorted(ys)
    assert data["frontiers"]["train_flops_exact|aa_acc"]


def test_notes_and_subtitle(text: str) -> None:
    assert "<li>A note.</li>" in text
    assert "What does compute buy?" in text


# -- the same twice, and in one step ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_equal_input_gives_equal_bytes(
    written: Path, demo_analysis: Analysis, demo_table: pd.DataFrame, tmp_path: Path
) -> None:
    again = report.write(
        demo_table, demo_analysis, tmp_path, title="Digits & <robustness>", subtitle="What does compute buy?",
        notes=("A note.",),
    )  # fmt: skip
    assert again.read_bytes() == written.read_bytes()


def test_a_failure_leaves_the_old_page(
    written: Path, demo_table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report.write(demo_table.head(3), None, tmp_path, title="first").read_bytes()

    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"cannot write the report to .*No space left"):
        report.write(demo_table.head(3), None, tmp_path, title="second")
    assert (tmp_path / "report.html").read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "figures"}


def test_a_folder_that_is_a_file(demo_table: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match="cannot write the report"):
        report.write(demo_table, None, tmp_path / "taken", title="x")
    assert (tmp_path / "taken").read_text() == "mine"


# -- little, odd and much ---------------------------------------------------------------------------------------------


def payload(path: Path) -> dict[str, Any]:
    return json.loads(Reader(path.read_text("utf-8")).scripts["data"])


def test_one_run_and_no_law(demo_table: pd.DataFrame, tmp_path: Path) -> None:
    out = report.write(demo_table.iloc[[8]], None, tmp_path, title="One")
    text = out.read_text("utf-8")
    assert "No law was fitted to these runs." in text
    assert "39.3%" in text
    found = payload(out)
    assert found["n"] == 1
    assert found["law"] is None
    assert found["axes"]["colours"] == [{"column": "loss", "label": "loss"}]


def test_a_table_of_two_columns(tmp_path: Path) -> None:
    out = report.write(pd.DataFrame({"aa_acc": [50.0, math.nan]}), None, tmp_path, title="Bare")
    read = Reader(out.read_text("utf-8"))
    assert len(read.runs) == 2
    assert read.runs[0][0].startswith("run 0")
    assert payload(out)["axes"]["x"] == []


def test_no_run_is_finished(demo_table: pd.DataFrame, tmp_path: Path) -> None:
    out = report.write(demo_table.iloc[[7]], None, tmp_path, title="Failed")
    assert "No run has a known AutoAttack accuracy." in out.read_text("utf-8")


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        report.write(pd.DataFrame({"aa_acc": []}), None, tmp_path / "new", title="None")
    assert not (tmp_path / "new").exists()


def test_runs_of_two_datasets_have_no_common_frontier(demo_table: pd.DataFrame, tmp_path: Path) -> None:
    demo_table.loc[:14, "dataset"] = "cifar10"
    out = report.write(demo_table, None, tmp_path, title="Mixed")
    assert payload(out)["frontiers"] == {}
    assert "digits" in out.read_text("utf-8")


def test_names_that_look_like_html_or_script(demo_table: pd.DataFrame, tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><b>&\u2028"
    demo_table.loc[3, "slug"] = name
    out = report.write(demo_table, None, tmp_path, title=name, notes=(name,))
    text = out.read_text("utf-8")
    assert "<script>alert" not in text
    assert name in payload(out)["names"]


def test_very_many_runs_are_cut_and_said(demo_table: pd.DataFrame, tmp_path: Path) -> None:
    many = pd.concat([demo_table] * 3, ignore_index=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "MOST_RUNS", 50)
        out = report.write(many, None, tmp_path, title="Many")
    assert payload(out)["n"] == 50
    assert "40 more with lower accuracy" in out.read_text("utf-8")


def test_the_papers_319_runs(tmp_path: Path) -> None:
    if not PAPER.exists():
        pytest.skip("the paper's CSV is not beside this checkout")
    from robudget.tables.read import read_table

    table = read_table(PAPER)
    analysis = analyse(table, resamples=100, predict=False)
    out = report.write(table, analysis, tmp_path, title="The paper")
    assert out.stat().st_size < 6.2e6
    assert payload(out)["n"] == 319
    text = out.read_text("utf-8")
    assert "50.86" in text  # the paper's own law
    assert len(Reader(text).runs) == 319
