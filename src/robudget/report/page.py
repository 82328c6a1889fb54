"""One offline file: the whole study as a page that a browser opens without a network, and its figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
import pandas as pd
from plotly.offline import get_plotlyjs

from robudget import __version__, files
from robudget.analysis import Analysis
from robudget.errors import InputError
from robudget.report import style
from robudget.report.figure_files import FigureFile, save
from robudget.report.sections import answer, collapse, drivers, laws, methods, next_point, published, runs
from robudget.report.table import fill, ranked

SECTIONS = (drivers, laws, collapse, next_point)  # those made of words, tables and figures, in the page's order
MOST_RUNS = 3000  # on the page; the figures and the laws always see all


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

    `table` has the columns of a store's table (`robudget.load_runs`); a missing one counts as unknown. `analysis`
    is what `robudget.analysis.analyse` made of it, or None: the page then says that there is no law. `notes` are
    sentences for the methods section. `others` are published models (`robudget.tables.leaderboard`) to set beside the
    runs. Equal input gives equal bytes. Raises InputError for a table without runs, for published models of another
    dataset or threat, and where `folder` cannot be written.
    """
    rows = ranked(table)
    folder = Path(folder)
    others = published.beside(rows, others) if others is not None else None
    try:
        figures = draw_all(analysis, table, folder / "figures", others)
        page = render(rows, analysis, figures, title=title, subtitle=subtitle, notes=notes, others=others)
        files.write_text(folder / "report.html", page)
    except OSError as error:
        raise InputError(f"cannot write the report to {str(folder)!r}: {error.strerror or error}") from None
    return folder / "report.html"


def draw_all(
    analysis: Analysis | None, table: pd.DataFrame, folder: Path | str, others: pd.DataFrame | None = None
) -> dict[str, FigureFile]:
    """Draw every figure that `table` and `analysis` have data for as PDF, SVG and PNG; name → files, title and caption.

    The paper's 1a, 1b, 1c, 2, 3a, 3b and 3c, and: `fan`, `holdout`, `forms`, `collapse`, `partial`, `risk`, `price`,
    `others`. `analysis` None draws those that need only the runs; `others` are models to set beside them
    (`published.beside`). Raises InputError for a table without runs.
    """
    rows = fill(table)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawings = [drawing for section in SECTIONS for drawing in section.drawings(rows, analysis)]
    if others is not None:
        drawings += published.drawings(rows, others)
    figures = {}
    with style.settings():
        for drawing in drawings:
            if (result := drawing.draw()) is not None:
                figure, caption = result
                figures[drawing.name] = save(figure, folder, drawing.name, title=drawing.title, caption=caption)
    return figures


def render(
    rows: pd.DataFrame,
    analysis: Analysis | None,
    figures: dict[str, FigureFile],
    *,
    title: str,
    subtitle: str | None,
    notes: Sequence[str],
    others: pd.DataFrame | None = None,
) -> str:
    """The page's HTML from a completed table (`ranked`) and the published models `beside` it."""
    first = rows.head(MOST_RUNS)
    sections = [section.section(rows, analysis) for section in SECTIONS]
    if others is not None:
        sections.append(published.section(rows, others))
    return _environment().get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        version=__version__,
        head=answer.head(rows),
        answer=answer.answer(analysis),
        best=answer.best(rows),
        bill=answer.bill(rows),
        runs=runs.leaderboard(first),
        left_out=len(rows) - len(first),
        sections=sections,
        planner=next_point.planner(first),
        methods=methods.methods(rows, analysis, notes),
        figures=figures,
        data=runs.payload(first, analysis),
        plotly=get_plotlyjs(),
    )  # fmt: skip


@cache
def _environment() -> jinja2.Environment:
    """Templates that escape everything, and that fail on a name they do not know rather than leave a blank."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return environment
