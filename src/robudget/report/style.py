"""The look of every figure: sizes, type, axes, legends, and the Okabe–Ito palette with a shape for every colour.

Widths are those of a two-column paper (3.3 and 7 inches); type is 6–8 pt at that size. Ink, grid and paper are three
fixed colours so that the page can put its theme's in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from robudget.columns import column
from robudget.formats import known, word
from robudget.laws import Envelope

COLUMN, PAGE = 3.3, 7.0  # inches
FONTS = "Arial, Helvetica, Liberation Sans, DejaVu Sans, sans-serif"  # the first that a machine has
INK, MUTED, GRID, PAPER = "#1a1d21", "#6a7178", "#e4e7ea", "#fefefe"

# Okabe & Ito (2008), without the yellow, which is invisible on white.
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, GREY = "#e69f00", "#56b4e9", "#8a9299"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Colours that the page replaces with its theme's; every data colour has a lighter twin for dark paper.
THEMED = {
    INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "card", BLUE: "blue", VERMILLION: "vermillion", GREEN: "green",
    PURPLE: "purple", ORANGE: "orange", SKY: "sky", GREY: "grey",
}  # fmt: skip

Dashes = str | tuple[float, tuple[float, ...]]  # of a line

# A choice keeps its colour and shape in every figure and on the page, whatever else is in the table.
FIXED: dict[str, dict[str, tuple[str, str]]] = {
    "loss": {
        "standard": (GREY, "X"),
        "at": (BLUE, "o"),
        "trades": (VERMILLION, "s"),
        "mart": (GREEN, "^"),
        "fgsm-rs": (PURPLE, "D"),
        "n-fgsm": (ORANGE, "v"),
        "free-at": (SKY, "P"),
    },
    "synthetic": {"no": (BLUE, "o"), "yes": (ORANGE, "^")},
    "collapsed": {"no": (BLUE, "o"), "yes": (VERMILLION, "X")},
}
# Each form of law keeps its colour, dashes and marker wherever it is drawn; so do the baselines of a hold-out.
LINES: dict[str, tuple[str, Dashes, str]] = {
    "power": (VERMILLION, "-", "o"),
    "saturating": (BLUE, (0, (5, 1.5)), "s"),
    "shifted": (GREEN, (0, (5, 1, 1, 1)), "^"),
    "m4": (PURPLE, (0, (3, 1, 1, 1, 1, 1)), "D"),
    "broken": (ORANGE, (0, (1.5, 1)), "v"),
    "power on error": (SKY, (0, (7, 2)), "P"),
    "power on logit": (GREY, (0, (2, 1)), "X"),
    "last value": (INK, (0, (4, 2)), "*"),
    "mean": (MUTED, (0, (1, 1.5)), "d"),
}
# Ordered choices (attack steps): the same colours from cold to warm.
RAMP = (BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE, GREY)


def encode(name: str, values: Iterable[object]) -> dict[str, tuple[str, str]]:
    """Word of each distinct value → (colour, marker); numbers in order along the ramp, names in the fixed palette."""
    distinct = list({v for v in values if known(v)})
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in distinct)
    ordered = [word(v) for v in sorted(distinct, key=float if numeric else str)]  # type: ignore[arg-type]
    fixed = FIXED.get(name, {})
    ordered.sort(key=lambda value: list(fixed).index(value) if value in fixed else len(fixed))
    palette = RAMP if numeric else CYCLE
    out = {}
    for i, value in enumerate(dict.fromkeys(ordered)):
        out[value] = fixed.get(value, (palette[i % len(palette)], MARKERS[i % len(MARKERS)]))
    if any(not known(v) for v in values):
        out["unknown"] = (GREY, ".")
    return out


def collapse_ramp() -> LinearSegmentedColormap:
    """From none to all collapsed."""
    return LinearSegmentedColormap.from_list("collapse", [GRID, "#f2c4a3", VERMILLION])


def _parameters() -> dict[str, Any]:
    there = set(fontManager.get_font_names())
    found = [name for name in FONTS.split(", ") if name in there]  # each text would look again for those that are not
    return {
        # The second has every glyph and comes with matplotlib.
        "font.family": list(dict.fromkeys([*found[:1], "DejaVu Sans"])),
        "font.sans-serif": [*found, "DejaVu Sans"],
        "mathtext.fontset": "custom",
        "mathtext.cal": "sans",  # unused; its default warns on machines without a cursive font
        "font.size": 7,
        "axes.labelsize": 7,
        "axes.titlesize": 7.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 5,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
        "legend.fontsize": 6.5,
        "legend.title_fontsize": 6.5,
        "legend.frameon": False,
        "legend.handletextpad": 0.4,
        "legend.columnspacing": 1.0,
        "legend.borderaxespad": 0.2,
        "legend.labelspacing": 0.3,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.facecolor": "none",
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": False,
        "grid.color": GRID,
        "grid.linewidth": 0.5,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.width": 0.4,
        "ytick.minor.width": 0.4,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "xtick.minor.size": 1.5,
        "ytick.minor.size": 1.5,
        "lines.linewidth": 1.2,
        "lines.markersize": 3.5,
        "pdf.fonttype": 42,  # text stays text, here and in SVG
        "svg.fonttype": "none",
        "savefig.dpi": 300,
        "figure.constrained_layout.h_pad": 0.035,
        "figure.constrained_layout.w_pad": 0.045,
        "axes.unicode_minus": True,
    }


@contextmanager
def settings() -> Iterator[None]:
    """Draw in this style whatever the caller's matplotlib settings are, and leave those as they were."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(cast(Any, _parameters()))
        yield


def new(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure of so many inches and its axes (an `Axes`, or an array of them). No pyplot: nothing global is kept."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


# -- axes -------------------------------------------------------------------------------------------------------------


def grid(ax: Axes, which: str = "y") -> None:
    ax.grid(True, axis=which, which="major")  # type: ignore[arg-type]


def log_x(ax: Axes) -> None:
    ax.set_xscale("log")
    _log_ticks(ax.xaxis, ax.get_xlim())


def log_y(ax: Axes) -> None:
    ax.set_yscale("log")
    _log_ticks(ax.yaxis, ax.get_ylim())


def _log_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Whole decades where there are at least three, else 1-2-5 within them, so that no log axis has a lone number."""
    decades = _decades(limits)
    if decades >= 2:
        axis.set_major_locator(LogLocator(10, numticks=8))
        axis.set_minor_locator(LogLocator(10, subs=range(2, 10), numticks=100))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if decades < 1.3 else (1, 3), numticks=12))
        axis.set_major_formatter(FuncFormatter(_short))
        axis.set_minor_locator(LogLocator(10, subs=range(2, 10), numticks=100))
        axis.set_minor_formatter(NullFormatter())


def _decades(limits: Sequence[float]) -> float:
    low, high = max(min(limits), 1e-300), max(max(limits), 1e-300)
    return math.log10(high / low)


def _short(value: float, _position: int) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    mantissa, power = f"{value:.0e}".split("e")
    return rf"${mantissa}{{\times}}10^{{{int(power)}}}$" if mantissa != "1" else rf"$10^{{{int(power)}}}$"


def accuracy_axis(ax: Axes) -> None:
    """Percent from 0 with a little room below, so that runs at 0 are seen whole."""
    top = ax.get_ylim()[1]
    ax.set_ylim(-0.03 * top, top)


def legend_above(figure: Figure, groups: Sequence[Sequence[Line2D | Patch]]) -> None:
    """One legend over the axes, outside the data: what belongs together (a group) stands in columns of its own."""
    rows = min(max((len(group) for group in groups), default=0), 2 if len(groups) > 1 else 3)
    handles: list[Line2D | Patch] = []
    for group in groups:
        blanks = -len(group) % rows
        handles += [*group, *(Line2D([], [], ls="", label=" ") for _ in range(blanks))]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles) // rows)


# -- what several sections draw ---------------------------------------------------------------------------------------

MANY = 1500  # points above which a vector file holds them as a picture


def wilson_bars(rows: pd.DataFrame) -> np.ndarray:
    """(2, n) distances from `aa_acc` down to the low and up to the high end of its interval, in points; 0 = unknown,
    which draws no bar."""
    low = (rows["aa_acc"] - rows["aa_acc_low"]).clip(lower=0)
    high = (rows["aa_acc_high"] - rows["aa_acc"]).clip(lower=0)
    return np.vstack([low.fillna(0.0), high.fillna(0.0)])


def best_bars(env: Envelope, table: pd.DataFrame) -> np.ndarray:
    """The Wilson bars of the envelope's runs, (2, m); none for a y that has no interval."""
    return wilson_bars(table.iloc[env.rows]) if env.y == "aa_acc" else np.zeros((2, env.n_bins))


def log_grid(low: float, high: float, decades: float = 0.0) -> np.ndarray:
    """80 points from `low` to so many decades above `high`, even in log."""
    return np.geomspace(low, high * 10**decades, 80)


def law_axes(ax: Axes, env: Envelope) -> None:
    log_x(ax)
    ax.set_xlabel(column(env.x).axis)
    ax.set_ylabel(column(env.y).axis)
    grid(ax)


def key(marker: str, colour: str, label: str, size: float = 3.6, *, fill: str | None = None) -> Line2D:
    """A point of a legend."""
    return Line2D([], [], marker=marker, color=colour, markerfacecolor=fill or colour, ls="", ms=size, label=label)


def errors(ax: Axes, named: Sequence[tuple[str, float]]) -> None:
    """A line from 0 to the error of each form, from the bottom up, with the form's marker at its end."""
    for at, (name, error) in enumerate(named):
        colour, _, marker = LINES[name]
        ax.plot([0, error], [at, at], color=GRID, lw=1.2, zorder=1)
        ax.plot(error, at, marker=marker, color=colour, ls="", ms=4.5, clip_on=False)
    ax.set_yticks(range(len(named)), [name for name, _ in named])
    ax.set_ylim(-0.6, len(named) - 0.4)
    ax.tick_params(axis="y", length=0)


def form_key(name: str) -> Line2D:
    colour, dashes, _ = LINES[name]
    return Line2D([], [], color=colour, ls=dashes, lw=1.2, label=name)
