"""One offline file: the whole study as a page that a browser opens without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from plotly.offline import get_plotlyjs

from robudget import __version__, files
from robudget.analysis import Analysis
from robudget.columns import COSTS, GROUPING, MAIN_COSTS, QUANTITIES, stored
from robudget.errors import InputError
from robudget.laws import envelope
from robudget.report import labels
from robudget.report.figures import draw as figures
from robudget.report.figures import style
from robudget.report.figures.drawn import FigureFile
from robudget.report.labels import quantity, word
from robudget.report.sections import laws as said
from robudget.report.sections import runs as sections
from robudget.report.sections.others import beside, standing
from robudget.report.table import COLUMNS, choices, name, ranked, varying

X_AXES = (*COSTS, *stored("size"))
Y_AXES = ("aa_acc", "clean_acc", "val_acc")
COLOURS = ("loss", *(c for c in GROUPING if c != "loss"))
MOST = 3000  # runs on the page; the figures and the laws always see all
MARKS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "X": "x",
    ".": "circle",
}  # fmt: skip


def write(
    table: pd.DataFrame,
    analysis: Analysis | None,
    folder: Path | str,
    *,
    title: str,
    subtitle: str | None = None,
    notes: Sequence[str] = (),
    others: pd.DataFrame | None = None,
) -> Path:
    """Write folder/report.html and folder/figures/*.{pdf,svg,png}; return the path of the page.

    `table` has the columns of a store's table (`robudget.store.load_runs`); a missing one counts as unknown. `analysis`
    is what `analysis.analyse` made of it, or None: the page then says that there is no law. `notes` are sentences
    for the methods section. `others` are published models (`interop.robustbench`) to set beside the runs. Equal input
    gives equal bytes. Raises InputError for a table without runs, for published models of another dataset or threat,
    and where `folder` cannot be written.
    """
    rows = ranked(table)
    folder = Path(folder)
    published = beside(rows, others) if others is not None else None
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        drawn = figures.draw_all(analysis, table, folder / "figures", published)
        page = render(rows, analysis, drawn, title=title, subtitle=subtitle, notes=notes, published=published)
        files.write_text(folder / "report.html", page)
    except OSError as error:
        raise InputError(f"cannot write the report to {str(folder)!r}: {error.strerror or error}") from None
    return folder / "report.html"


def render(
    rows: pd.DataFrame,
    analysis: Analysis | None,
    drawn: dict[str, FigureFile],
    *,
    title: str,
    subtitle: str | None,
    notes: Sequence[str],
    published: pd.DataFrame | None = None,
) -> str:
    """The page's HTML from a completed table (`ranked`) and the published models `beside` it."""
    shown = rows.head(MOST)
    data = payload(shown, analysis)
    columns = sections.board_columns(shown)
    among = {"model", "loss"} | varying(shown)  # what all runs share need not be said in each row
    return _environment().get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        version=__version__,
        left_out=len(rows) - len(shown),
        head=sections.head(rows),
        answer=said.answer(analysis),
        best=sections.best(rows),
        bill=sections.bill(rows),
        board=[sections.board_row(row, columns, among) for _, row in shown.iterrows()],
        board_columns=columns,
        filters=sections.filters(shown),
        planner=sections.planner(shown),
        axes=data["axes"],
        lines=[line["name"] for line in data["law"]["lines"]] if data["law"] else [],
        drivers=said.drivers(analysis),
        laws=said.laws(analysis),
        collapse=said.collapse(rows, analysis),
        prices=said.prices(analysis),
        others=standing(rows, published) if published is not None else None,
        figures=drawn,
        glyphs={key: shape for figure in drawn.values() for key, shape in sorted(figure.glyphs.items())},
        methods=said.methods(rows, analysis, notes),
        data=_json(data),
        plotly=get_plotlyjs(),
    )  # fmt: skip


def payload(rows: pd.DataFrame, analysis: Analysis | None) -> dict[str, Any]:
    """What the page's script knows: the runs by column, their encodings, frontiers and laws. NaN is null."""
    frame = rows.reset_index(drop=True)
    xs = [x for x in X_AXES if (frame[x] > 0).any()]
    ys = [y for y in Y_AXES if frame[y].notna().any()]
    colours = [c for c in COLOURS if frame[c].map(word).nunique() > 1] or ["loss"]
    words = {c: [word(v) for v in frame[c]] for c in dict.fromkeys([*colours, *sections.FILTERS])}
    return {
        "n": len(frame),
        "runs": {c: files.to_plain(frame[c].tolist()) for c in COLUMNS},
        "names": [name(row) for _, row in frame.iterrows()],
        "choices": [" · ".join(choices(row)) for _, row in frame.iterrows()],
        "words": words,
        "axes": {
            "x": _labelled(xs),
            "y": _labelled(ys),
            "colours": [{"column": c, "label": labels.feature(c)} for c in colours],
        },
        "encodings": {
            c: [
                {"value": v, "label": labels.choice(c, v), "colour": style.THEMED[colour], "symbol": MARKS[marker]}
                for v, (colour, marker) in style.encode(c, list(frame[c])).items()
            ]
            for c in colours
        },
        "frontiers": {f"{x}|{y}": found for x in xs for y in ys if (found := _frontier(frame, x, y))},
        "law": said.curves(analysis),
        "quantities": {
            q.name: {"axis": q.axis, "short": q.short, "unit": q.unit, "how": q.how}
            for q in map(quantity, QUANTITIES)
        },
        "hover": [c for c in HOVER if frame[c].notna().any()],
    }  # fmt: skip


HOVER = (*MAIN_COSTS, "parameters")


def _labelled(columns: Sequence[str]) -> list[dict[str, str]]:
    return [{"column": c, "label": quantity(c).axis} for c in columns]


def _frontier(frame: pd.DataFrame, x: str, y: str) -> list[int]:
    """The runs that no run of the same or less x beats; none where the table mixes datasets or threats, since those do
    not compare."""
    try:
        return [int(i) for i in envelope(frame, x, y, how="pareto").rows]
    except InputError:
        return []


def _json(data: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


@cache
def _environment() -> jinja2.Environment:
    """Templates that escape everything, and that fail on a name they do not know rather than leave a blank."""

    def load(template: str) -> str | None:
        return resources.files("robudget.report").joinpath(template).read_text("utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["word"] = word
    return environment
