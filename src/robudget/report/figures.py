"""Every figure of the report, drawn into a folder as PDF, SVG and PNG.

The paper's 1a, 1b, 1c, 2, 3a, 3b, 3c, and: `fan`, `holdout`, `forms`, `collapse`, `price`. A figure whose law or predictor
the analysis does not have is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure

from robudget.report import figures_runs, style
from robudget.report.style import FigureFile

if TYPE_CHECKING:
    from robudget.laws.analysis import Analysis

Drawn = tuple[Figure, str] | None


def draw_all(analysis: Analysis | None, table: pd.DataFrame, folder: Path | str) -> dict[str, FigureFile]:
    """Draw every figure that `table` and `analysis` have data for; name → files and caption, in the paper's order.

    `table` is the one that `analysis` was made of: its rows are found by position.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    with style.house():
        for name, title, draw in _plan(analysis, table):
            drawn = draw()
            if drawn is not None:
                figure, caption = drawn
                out[name] = style.save(figure, folder, name, title=title, caption=caption)
    return out


def _plan(analysis: Analysis | None, table: pd.DataFrame) -> Iterator[tuple[str, str, Callable[[], Drawn]]]:
    x = next((c for c in ("train_flops_exact", "train_flops_paper") if (table[c] > 0).any()), None)
    if x is not None and table["aa_acc"].notna().any():
        yield "1a", "Robust accuracy against compute", lambda: figures_runs.all_runs(table, x)
    yield "2", "The effect of each choice", lambda: figures_runs.effects(table)
    yield "collapse", "Where training collapsed", lambda: figures_runs.collapse_map(table)
