"""Laws, predictions and plans as text for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from robudget.laws import Analysis, Law, Option, Plan, Prediction
from robudget.report.labels import fixed, number
from robudget.terminal import duration, table_of


def analysis(found: Analysis) -> Group:
    """What `robudget fit` prints: the headline, competing forms, hold-outs, costs, effects, warnings."""
    parts: list[RenderableType] = [Text(found.law.sentence(), style="bold"), Text(found.counts.sentence())]
    parts += [Text(""), table_of([_law_row(law) for law in found.laws], title="Laws", left=("y", "x", "form"))]
    if found.reaches:
        parts += [Text(""), Text("Targets, by the average over forms", style="bold")]
        parts += [Text(f"  {reach.sentence()}") for reach in found.reaches]
    for held in found.holdouts:
        rows = [
            {
                "form": m.name,
                "RMSE": fixed(m.rmse, 2),
                "bias": fixed(m.bias, 2, signed=True),
                "worst": fixed(m.worst, 2),
            }
            for m in held.misses
        ]
        title = f"Hidden: the top {held.hidden} ({held.n_test} points, {held.decades:.1f} decades beyond the fit)"
        parts += [Text(""), table_of(rows, title=title, left=("form",))]
    if found.effects and found.effects.effects:
        rows = [
            {
                "choice": e.feature,
                "from → to": f"{e.before} → {e.after}",
                "points": fixed(e.gain, 1, signed=True),
                "95% interval": f"{fixed(e.low, 1, signed=True)} to {fixed(e.high, 1, signed=True)}",
                "pairs": str(e.n_pairs),
                "collapsed": f"{100 * e.collapse:+.0f} points",
            }
            for e in found.effects.effects
        ]
        parts += [Text(""), table_of(rows, title="What each choice buys (matched pairs)", left=("choice", "from → to"))]
    if found.gbr:
        shares = sorted(found.gbr.importances.items(), key=lambda item: -item[1])
        leads = ", ".join(f"{name} {share:.0%}" for name, share in shares)
        parts += [
            Text(""),
            Text(
                f"Paper's predictor (gradient boosting, 70:30, {found.gbr.n_test} held-out runs): "
                f"R² {found.gbr.r2:.2f}, MAE {found.gbr.mae:.1f} points; importances: {leads}"
            ),
        ]
    parts += [Text(f"note: {warning}", style="yellow") for warning in found.warnings]
    return Group(*parts)


def _law_row(law: Law) -> dict[str, str]:
    low, high = law.alpha_interval
    return {
        "y": law.y,
        "x": law.x,
        "form": law.form if law.on == "value" else f"{law.form} on {law.on}",
        "C": number(law.C, 4),
        "α [95%]": f"{number(law.alpha)} [{number(low)}, {number(high)}]",
        "ceiling": fixed(law.ceiling) if law.ceiling == law.ceiling else "",
        "R²": fixed(law.r2, 2),
        "points": str(law.n_bins),
        "runs": str(law.n_runs),
    }


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
    return Group(*lines, table_of(rows, left=("nearest real runs",)))


def plan(made: Plan) -> Group:
    asked = made.budget.text if made.budget else f"{made.target:g}% robust accuracy"
    parts: list[RenderableType] = []
    if made.options:
        rows = [_option_row(option, made.column) for option in made.options]
        parts.append(
            table_of(rows, title=f"What to train for {asked} ({made.n_candidates} candidates)", left=("recipe",))
        )
    if made.next_point:
        row = _option_row(made.next_point, made.column)
        parts += [Text(""), Text(f"The next point: {row['recipe']}, {row['robust %']}% for {row[made.column]}")]
    if made.levers:
        rows = [
            {
                "instead": f"{lever.feature} → {lever.value}",
                "points": fixed(lever.gain, 1, signed=True),
                "× cost": number(lever.cost_ratio),
                "P(collapse)": f"{lever.p_collapse:.0%}",
            }
            for lever in made.levers
        ]
        parts += [Text(""), table_of(rows, title="Single changes to the best", left=("instead",))]
    parts += [Text(f"note: {warning}", style="yellow") for warning in made.warnings]
    return Group(*parts)


def _option_row(option: Option, column: str) -> dict[str, str]:
    row = {
        "recipe": ", ".join(f"{k} {v}" for k, v in option.choices.items()),
        "robust %": fixed(option.aa_acc),
        "interval": f"{fixed(option.low)}–{fixed(option.high)}",
        "P(collapse)": f"{option.p_collapse:.0%}",
        column: number(option.costs.get(column)),
    }
    if column != "train_seconds":
        row["time"] = duration(option.costs.get("train_seconds"))
    row["ran as"] = option.ran or ""
    return row
