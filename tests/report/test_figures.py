"""Figures: there, labelled, honest about what is unknown, and the same twice."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

from robudget.analysis import Analysis
from robudget.report import draw_all, style
from robudget.report.figure_files import FigureFile
from robudget.report.sections import collapse, drivers, extrapolation, laws
from robudget.report.table import fill

ALL = {"1a", "1b", "1c", "2", "3a", "3b", "3c", "collapse", "fan", "holdout", "forms", "price", "partial", "risk"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, demo_analysis: Analysis) -> dict[str, FigureFile]:
    return draw_all(demo_analysis, demo_analysis.table, tmp_path_factory.mktemp("figures"))


def test_every_figure_in_every_format(drawn: dict[str, FigureFile]) -> None:
    assert set(drawn) == ALL
    for name, figure in drawn.items():
        assert figure.pdf.read_bytes().startswith(b"%PDF"), name
        assert ElementTree.parse(figure.svg).getroot().tag.endswith("svg"), name
        assert {p.name for p in figure.pdf.parent.glob(f"{name}.*")} == {f"{name}.pdf", f"{name}.svg", f"{name}.png"}


def test_widths_are_those_of_a_two_column_paper(drawn: dict[str, FigureFile]) -> None:
    for name, figure in drawn.items():
        pixels = struct.unpack(">I", figure.png.read_bytes()[16:20])[0]
        inches = pixels / 300
        assert inches == pytest.approx(7.0 if name in ("2", "holdout", "forms", "partial") else 3.3, abs=0.01), name
        assert figure.wide == (inches > 5)


def test_captions_hold_n_and_intervals(drawn: dict[str, FigureFile]) -> None:
    for name, figure in drawn.items():
        assert re.search(r"\d", figure.caption) or name == "price", name
        assert figure.title
        assert "nan" not in figure.caption.lower(), name
    assert "95% Wilson" in drawn["1a"].caption
    assert "29 runs" in drawn["1a"].caption
    assert "95% interval [" in drawn["3a"].caption
    assert "1 failed, 6 trained without an adversary, 4 collapsed" in drawn["3a"].caption


def test_inside_a_page_ids_are_unique_and_colours_are_the_themes(drawn: dict[str, FigureFile]) -> None:
    ids: list[str] = []
    for figure in drawn.values():
        ids += re.findall(r'\bid="([^"]+)"', figure.inline)
        for reference in re.findall(r'(?:href="|url\()#([^")]+)', figure.inline):
            assert f'id="{reference}"' in figure.inline
        assert "var(--ink)" in figure.inline
        for colour in style.THEMED:
            assert colour not in figure.inline
        assert ElementTree.fromstring(figure.inline) is not None
    assert len(ids) == len(set(ids))


def test_the_same_twice(drawn: dict[str, FigureFile], written: Path) -> None:
    for name, figure in drawn.items():
        for path in (figure.pdf, figure.svg, figure.png):
            assert path.read_bytes() == (written.parent / "figures" / path.name).read_bytes(), (name, path.suffix)


def test_without_laws_the_runs_are_drawn(demo_table: pd.DataFrame, tmp_path: Path) -> None:
    assert set(draw_all(None, demo_table, tmp_path)) == {"1a", "2", "collapse"}


def test_one_run(demo_table: pd.DataFrame, tmp_path: Path) -> None:
    assert set(draw_all(None, demo_table.iloc[[4]], tmp_path)) == {"1a", "2", "collapse"}


def test_nothing_known_nothing_drawn(tmp_path: Path) -> None:
    assert draw_all(None, pd.DataFrame({"aa_acc": [np.nan]}), tmp_path) == {}


def test_the_callers_matplotlib_is_left_alone(demo_table: pd.DataFrame, tmp_path: Path) -> None:
    with mpl.rc_context({"font.size": 17, "axes.grid": True}):
        draw_all(None, demo_table.head(5), tmp_path)
        assert mpl.rcParams["font.size"] == 17
        assert mpl.rcParams["axes.grid"] is True


# -- what is on the axes ----------------------------------------------------------------------------------------------


def test_all_runs_shows_each_run_with_its_wilson_interval(demo_table: pd.DataFrame) -> None:
    rows = fill(demo_table)
    figure, _ = collapse.all_runs_figure(rows, "train_flops_exact")
    (ax,) = figure.axes
    assert ax.get_xlabel() == "Training compute (FLOP)"
    assert ax.get_ylabel() == "AutoAttack accuracy (%)"
    assert ax.get_xscale() == "log"
    points = np.vstack([c.get_offsets() for c in ax.collections if isinstance(c, PathCollection)])
    known = rows[rows["aa_acc"].notna()]
    assert sorted(map(tuple, points.tolist())) == sorted(zip(known["train_flops_exact"], known["aa_acc"], strict=True))
    bars = np.array([
        (segment[:, 1].min(), segment[:, 1].max())
        for container in ax.containers for lines in container[2] for segment in lines.get_segments()
    ])  # fmt: skip
    assert sorted(bars[:, 0]) == pytest.approx(sorted(known["aa_acc_low"].clip(upper=known["aa_acc"])))
    assert sorted(bars[:, 1]) == pytest.approx(sorted(known["aa_acc_high"].clip(lower=known["aa_acc"])))


def test_an_unknown_interval_draws_no_bar(demo_table: pd.DataFrame) -> None:
    rows = fill(demo_table.drop(columns=["aa_acc_low", "aa_acc_high"]))
    assert (style.wilson_bars(rows) == 0).all()


def test_the_law_and_its_best_runs(demo_analysis: Analysis) -> None:
    law = demo_analysis.law
    figure, _ = laws.best_runs_figure(law, fill(demo_analysis.table))
    (ax,) = figure.axes
    (best,) = ax.containers
    assert best[0].get_xdata() == pytest.approx(law.envelope.xs)
    assert best[0].get_ydata() == pytest.approx(law.envelope.ys)
    curves = [line for line in ax.lines if len(line.get_xdata()) == 80]
    assert len(curves) == 1
    assert curves[0].get_ydata() == pytest.approx(law.predict(curves[0].get_xdata()))


def test_the_collapse_map_counts(demo_table: pd.DataFrame) -> None:
    drawn = collapse.collapse_figure(fill(demo_table))
    assert drawn is not None
    figure, caption = drawn
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts.count("2/3") == 2  # AT with one step, real and synthetic: the two larger models
    assert texts.count("–") == 4  # TRADES was run with five steps only
    assert "(4 of 23)" in caption


def test_partial_dependence_is_the_predictors_own(demo_analysis: Analysis) -> None:
    predictor = demo_analysis.predictor
    assert predictor is not None
    figure, caption = drivers.partial_figure(predictor)
    assert f"{predictor.n_runs} runs" in caption
    shown = [i.feature for i in predictor.importances[: drivers.MOST_PANELS]]
    for ax, name in zip(figure.axes, shown, strict=True):
        found = predictor.partial(name)
        assert ax.lines[0].get_ydata() == pytest.approx(found.aa_acc)
        assert ax.lines[1].get_ydata() == pytest.approx(100 * np.array(found.p_collapse))


def test_the_risk_map_stands_beside_real_runs(demo_analysis: Analysis) -> None:
    predictor = demo_analysis.predictor
    assert predictor is not None
    drawn = collapse.risk_figure(predictor)
    assert drawn is not None
    texts = [t.get_text() for t in drawn[0].axes[0].texts]
    real = [re.fullmatch(r"\((\d+)/(\d+)\)", t) for t in texts]
    assert sum(int(m[1]) for m in real if m) == predictor.n_collapsed
    assert sum(int(m[2]) for m in real if m) == predictor.n_runs


def test_the_hold_out_shows_what_was_fitted_on(demo_analysis: Analysis) -> None:
    hidden = demo_analysis.holdouts[0]
    figure, caption = extrapolation.holdout_figure(hidden, demo_analysis.envelope, fill(demo_analysis.table))
    rings = [
        line
        for line in figure.axes[0].lines
        if line.get_linestyle() == "None" and len(line.get_xdata()) == hidden.n_train
    ]
    assert any(list(line.get_xdata()) == list(hidden.train_xs) for line in rings)
    assert "(rings)" in caption


def test_hold_out_words(demo_analysis: Analysis) -> None:
    for hidden in demo_analysis.holdouts:
        baseline = hidden.miss("last value")
        assert baseline is not None
        _, caption = extrapolation.holdout_figure(hidden, demo_analysis.envelope, fill(demo_analysis.table))
        assert hidden.sentence() in caption
        assert f"{baseline.rmse:.2f}" in caption


# -- colours and shapes -----------------------------------------------------------------------------------------------


def test_a_choice_keeps_its_colour_and_shape_whatever_else_is_in_the_table() -> None:
    both = style.encode("loss", ["at", "trades", "standard"])
    alone = style.encode("loss", ["trades"])
    assert both["trades"] == alone["trades"]
    assert list(both) == ["standard", "at", "trades"]


def test_no_two_of_a_kind_share_both_colour_and_shape() -> None:
    for column, values in (("steps", [1, 2, 5, 7, 10]), ("model", list("abcdefg")), ("synthetic", [True, False])):
        coded = style.encode(column, values)
        assert len({colour for colour, _ in coded.values()}) == len(values)
        assert len({marker for _, marker in coded.values()}) == len(values)
    assert list(style.encode("steps", [10, 2, 1])) == ["1", "2", "10"]
    assert "unknown" in style.encode("loss", ["at", None])
