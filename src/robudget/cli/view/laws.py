"""Laws and predictions as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from robudget.analysis import Analysis
from robudget.cli.view.terminal import TextTable
from robudget.columns import column
from robudget.formats import fixed, number
from robudget.laws import Law, Reach
from robudget.prediction import Prediction
from robudget.prediction.predictor import Predictor
from robudget.report.words import change


def titled(title: str, rows: Sequence[Mapping[str, str]], left: Sequence[str]) -> list[RenderableType]:
    """A heading and its table, after an empty line; nothing where there is no row."""
    return [Text(""), Text(title, style="bold"), TextTable(rows, left=left)] if rows else []


def notes(lines: Sequence[str]) -> list[RenderableType]:
    return [Text(f"note: {line}", style="yellow") for line in lines]


def analysis(found: Analysis) -> Group:
    """What `robudget fit` prints: the headline and how far to trust it, competing forms, costs, hold-outs, effects."""
    law = found.law
    parts: list[RenderableType] = [Text(law.sentence(), style="bold"), Text(found.counts.sentence())]
    parts += [Text(line) for line in found.trust]
    parts += titled(
        f"Forms of {law.y} against {law.x} ({law.n_bins} points from {law.n_runs} runs, {law.level:.0%} intervals)",
        [_form_row(found, one) for one in found.forms],
        ("form",),
    )
    others = [*found.costs, *found.published]
    parts += titled("Other laws, all power laws", [_law_row(one) for one in others], ("y", "x"))
    if found.reaches:
        parts += [Text(""), Text("Targets, by the average over forms", style="bold")]
        parts += [Text(f"  {reach_line(reach)}") for reach in found.reaches]
    for held in found.holdouts:
        rows = [
            {
                "form": m.name,
                "RMSE": fixed(m.rmse, 2),
                "bias": fixed(m.bias, 2, signed=True),
                "worst": fixed(m.worst, 2),
            }
            for m in sorted(held.misses, key=lambda m: m.rmse)
        ]
        points = "1 point" if held.n_test == 1 else f"{held.n_test} points"
        title = f"Hidden: the top {held.hidden} ({points}, {held.decades:.1f} decades beyond the fit)"
        parts += titled(title, rows, ("form",))
    if found.effects:
        rows = [
            {
                "choice": change(e.feature, e.before, e.after),
                "points": fixed(e.gain, 1, signed=True),
                "95% interval": f"{fixed(e.low, 1, signed=True)} to {fixed(e.high, 1, signed=True)}",
                "pairs": str(e.n_pairs),
                "collapsed": f"{fixed(100 * e.collapse, 0, signed=True)} points",
            }
            for e in found.effects.effects
        ]
        parts += titled("What each choice buys (matched pairs)", rows, ("choice",))
    if found.gbr:
        shares = sorted(found.gbr.importances.items(), key=lambda item: -item[1])
        leads = ", ".join(f"{column(name).phrase} {share:.0%}" for name, share in shares)
        parts += [
            Text(""),
            Text(
                f"Paper's predictor (gradient boosting, 70:30, {found.gbr.n_test} held-out runs): "
                f"R² {found.gbr.r2:.2f}, MAE {found.gbr.mae:.1f} points; importances: {leads}"
            ),
        ]
    if found.predictor:
        parts += [Text(line) for line in _quality(found.predictor)]
    return Group(*parts, *notes(found.warnings))


def _quality(predictor: Predictor) -> list[str]:
    """How well the default predictor does on runs that it did not see, at random and by group."""
    said = []
    for score in predictor.scores:
        if score.model == predictor.model:
            what = "at random" if score.design == "random" else "each " + column(score.design[3:]).phrase
            said.append(f"{what} R² {score.r2:.2f}, MAE {score.mae:.1f}")
    return [f"Default predictor ({predictor.model}), left out {'; '.join(said)}"]


def _form_row(found: Analysis, law: Law) -> dict[str, str]:
    hidden = found.holdouts[0].miss(law.name) if found.holdouts else None
    low, high = law.ceiling_interval
    return {
        "form": law.name,
        "C": number(law.C, 4),
        "α [interval]": _alpha(law),
        "ceiling": f"{fixed(law.ceiling)} [{fixed(low)}, {fixed(high)}]" if math.isfinite(law.ceiling) else "",
        "R²": fixed(law.r2, 2),
        "RMSE": fixed(law.rmse, 2),
        "weight": fixed(found.average.weight(law), 2) if found.average else "",
        "hidden RMSE": fixed(hidden.rmse, 2) if hidden else "",
    }


def _law_row(law: Law) -> dict[str, str]:
    row = {"y": law.y, "x": law.x, "C": number(law.C, 4), "α [interval]": _alpha(law), "R²": fixed(law.r2, 2)}
    return row | {"points": str(law.n_bins), "runs": str(law.n_runs)}


def _alpha(law: Law) -> str:
    low, high = law.alpha_interval
    return f"{number(law.alpha)} [{number(low)}, {number(high)}]"


def reach_line(reach: Reach) -> str:
    """`65.0% needs 8.65×10²² FLOP (95%: 7.10×10²⁰ FLOP to unreachable), 3.3 decades beyond the runs`."""
    goal = column(reach.y).write(reach.target)
    if not reach.reachable:
        return f"{goal}: unreachable ({reach.p_unreachable:.0%} of the resampled laws)"
    cost = column(reach.x)
    high = cost.write(reach.high) if math.isfinite(reach.high) else "unreachable"
    text = f"{goal} needs {cost.write(reach.value)} ({reach.level:.0%}: {cost.write(reach.low)} to {high})"
    return text + (f", {reach.decades:.1f} decades beyond the runs" if reach.decades >= 0.1 else "")


def prediction(name: str, made: Prediction) -> Group:
    lines = [
        Text(f"{name}: {made.aa_acc:.1f}% robust [{made.low:.1f}, {made.high:.1f}] ({made.level:.0%})", style="bold"),
        Text(f"P(collapse) {made.p_collapse:.0%}; {made.survivor:.1f}% if it does not"),
    ]
    if made.outside:
        lines.append(Text(f"note: outside the fitted runs in {', '.join(made.outside)}", style="yellow"))
    rows = [
        {"nearest real runs": run, "robust %": fixed(acc), "distance": fixed(far, 2)} for run, acc, far in made.nearest
    ]
    return Group(*lines, TextTable(rows, left=("nearest real runs",)))
