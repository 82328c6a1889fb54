"""The figure of a robustness curve: accuracy at every ε with its interval, AutoAttack's beside it where it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robudget.columns import COLUMNS
from robudget.report import style
from robudget.report.figure_files import FigureFile, save
from robudget.report.style import BLUE, COLUMN, VERMILLION
from robudget.threat import Norm


def save_curve(
    points: Sequence[Mapping[str, float]], norm: Norm, folder: Path, *, n: int, at: Mapping[str, Any] | None
) -> FigureFile:
    """Write curve.pdf, curve.svg and curve.png into `folder`.

    `points`: eps, accuracy, low and high, as fractions; `at`: the threat's `eps` with `autoattack`'s accuracy there.
    """
    eps = [point["eps"] * (255 if norm == "linf" else 1) for point in points]
    accuracy, low, high = ([100 * point[key] for point in points] for key in ("accuracy", "low", "high"))
    with style.settings():
        figure, ax = style.new(COLUMN, 2.4)
        ax.fill_between(eps, low, high, color=BLUE, alpha=0.2, lw=0, step="post", label="95% interval, each ε alone")
        ax.step(eps, accuracy, where="post", color=BLUE, label="no adversarial point found")
        if at is not None and at.get("autoattack") is not None and at["eps"] <= points[-1]["eps"]:
            x = at["eps"] * (255 if norm == "linf" else 1)
            ax.plot(x, 100 * at["autoattack"], "D", color=VERMILLION, label=f"AutoAttack ({at['version']})", zorder=3)
        ax.set_xlabel("ε in L∞ (of 255)" if norm == "linf" else f"ε in {COLUMNS['norm'].words[norm]}")
        ax.set_ylabel("Accuracy (%)")
        ax.set_xlim(0, eps[-1])
        ax.set_ylim(0, max(100.0 if max(high) > 60 else max(high) * 1.1, 1.0))
        style.grid(ax)
        ax.legend(loc="upper right")
        caption = (
            f"Accuracy within every ε on {n} images, by minimum-norm attacks: an upper bound of robust accuracy. The "
            "band is the 95% Wilson interval at each ε alone."
        )
        return save(figure, folder, "curve", title="Robustness curve", caption=caption)
