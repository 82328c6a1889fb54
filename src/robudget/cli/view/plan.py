"""Plans as text for a terminal: what to train, what it costs in every unit, what the next point costs, what instead."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.text import Text

from robudget.cli.view.laws import notes, reach_line, titled
from robudget.cli.view.terminal import duration
from robudget.columns import column
from robudget.formats import fixed, number
from robudget.planning import Option, Plan
from robudget.planning.cost_model import Span


def plan(made: Plan) -> Group:
    """Options with their nearest real run, the best one's price in all units, the next point, levers, notes."""
    asked = made.budget.text if made.budget else f"{made.target:g}% robust accuracy"
    parts: list[RenderableType] = titled(
        f"What to train for {asked} ({made.n_candidates} candidates; {made.predictor.level:.0%} intervals)",
        [_option_row(option, made) for option in made.options],
        ("recipe", "nearest real run"),
    )[1:]
    if made.best is not None:
        parts += _prices(made, made.best)
    parts += _by_compute_alone(made)
    rows = [
        {
            "change": f"{column(lever.feature).phrase} → {column(lever.feature).level(lever.value)}",
            "points": fixed(lever.gain, 1, signed=True),
            "× cost": number(lever.cost_ratio),
            "P(collapse)": f"{lever.p_collapse:.0%}",
            "buys compute": "yes" if lever.spends else "",
        }
        for lever in made.levers
    ]
    parts += titled("Single changes to the best", rows, ("change",))
    if made.instead:
        parts += [Text(""), Text(f"Instead: {made.instead}", style="bold")]
    return Group(*parts, *notes(made.warnings))


def _prices(made: Plan, best: Option) -> list[RenderableType]:
    """What the best option costs, and what a point more costs beyond it, in every unit the table knows."""
    rows = []
    for name, value in best.costs.items():
        low, high = best.cost_intervals[name]
        row = {"cost": column(name).label, "this recipe": _span(name, (value, low, high))}
        if made.next_point is not None:
            row["the next point, more"] = _span(name, made.marginal[name])
        rows.append(row)
    which = "The first of them" if made.options else "The nearest to it"
    head = f"{which}: {_recipe(best)}: {best.aa_acc:.1f}% robust [{fixed(best.low)}, {fixed(best.high)}]"
    parts = titled(head, rows, ("cost",))
    if made.next_point is not None:
        following = made.next_point
        parts.append(Text(f"The next point: {_recipe(following)}: {following.aa_acc:.1f}% robust"))
    else:
        parts.append(Text("No recipe of these is predicted a point better."))
    return parts


def _by_compute_alone(made: Plan) -> list[RenderableType]:
    if not made.reaches:
        return []
    what = "the target" if made.target is not None else "a point more than the best run"
    title = f"Bought with compute alone ({what}, by the average over forms)"
    lines: list[RenderableType] = [Text(""), Text(title, style="bold")]
    never = [reach for reach in made.reaches if not reach.reachable]
    lines += [Text(f"  {reach_line(reach)}") for reach in made.reaches if reach.reachable]
    for share in dict.fromkeys(reach.p_unreachable for reach in never):
        units = ", ".join(column(r.x).phrase for r in never if r.p_unreachable == share)
        lines.append(
            Text(f"  {column(never[0].y).write(never[0].target)}: unreachable by {units} ({share:.0%} of resamples)")
        )
    return lines


def _span(name: str, span: Span) -> str:
    value, low, high = (column(name).write(v) for v in span)
    return value if low == high else f"{value} [{low} to {high}]"


def _recipe(option: Option) -> str:
    return ", ".join(_choice(name, value) for name, value in option.choices.items() if value is not None)


def _choice(name: str, value: object) -> str:
    if isinstance(value, bool):
        return column(name).phrase if value else f"no {column(name).phrase}"
    said = column(name).level(value)
    return said if name in ("model", "loss", "activation") else f"{column(name).phrase} {said}"


def _option_row(option: Option, made: Plan) -> dict[str, str]:
    row = {
        "recipe": _recipe(option),
        "robust %": fixed(option.aa_acc),
        "interval": f"{fixed(option.low)}–{fixed(option.high)}",
        "P(collapse)": f"{option.p_collapse:.0%}",
    }
    if math.isfinite(option.p_reach):
        row["P(reach)"] = f"{option.p_reach:.0%}"
    row[column(made.column).short] = column(made.column).write(option.costs[made.column])
    if made.column != "train_seconds":
        row["time"] = duration(option.costs.get("train_seconds"))
    run, accuracy, _ = option.nearest[0]
    row["nearest real run"] = f"{run} {fixed(accuracy)}%" + (" (this recipe)" if option.ran else "")
    return row
