"""Laws, predictions and plans as text for a terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.text import Text

from robudget.analysis import Analysis
from robudget.cli.view.console import duration, notes, titled
from robudget.cli.view.prediction import quality, small_runs_table
from robudget.columns import column
from robudget.formats import amount_range, fixed, number
from robudget.laws import Law
from robudget.laws.joint import PROFILE_FACTORS, Joint
from robudget.planning import NextRuns, Option, Plan
from robudget.planning.cost_model import Span
from robudget.prediction import Effect, Effects
from robudget.report.words import points


def fit_text(analysis: Analysis, brief: bool = False) -> Group:
    """What `robudget fit` prints: the answer and what it stands on; then the paper's law and how far to trust it,
    prices of targets, competing forms, costs, parts of the table, hold-outs, effects."""
    law = analysis.law
    parts: list[RenderableType] = [Text(analysis.answer, style="bold"), *map(Text, analysis.support)]
    if brief:
        return Group(*parts)
    parts += [Text(""), Text("The best run of each bin, as in the paper", style="bold"), Text(law.sentence())]
    parts += [Text(line) for line in analysis.trust]
    if analysis.prices:
        parts += [Text(""), Text("What targets cost, by the frontier", style="bold")]
        parts += [Text(f"  {price.sentence()}") for price in analysis.prices if price.reachable]
        beyond = [price for price in analysis.prices if not price.reachable]
        if beyond:
            goals = ", ".join(column(price.y).write(price.target) for price in beyond)
            parts.append(
                Text(f"  {goals}: more than {column(beyond[0].x).write(beyond[0].limit)}; these runs cannot say")
            )
    parts += titled("One point more than the best run, by power and saturating forms under other bins",
                    _binnings(analysis), ("bins",))  # fmt: skip
    parts += titled(
        f"Forms of {law.y} against {law.x} ({law.n_bins} points from {law.n_runs} runs, {law.level:.0%} intervals)",
        [_form_row(analysis, one) for one in analysis.forms],
        ("form",),
    )
    others = [*(one for one, _ in analysis.clocks), *analysis.published]
    parts += titled("Other laws, all power laws", [_law_row(one) for one in others], ("y", "x"))
    for one, constants in analysis.clocks:
        if constants:
            each = ", ".join(f"{name} {number(value)}" for name, value in constants.items())
            parts.append(Text(f"the same law times a constant, per unit of {one.y}: {each}"))
    parts += titled("Exponents of parts of the table, by their frontiers", _parts(analysis), ("runs with",))
    parts += [Text(f"  {comparison.sentence()}") for comparison in analysis.comparisons]
    for held in analysis.holdouts:
        rows = [
            {
                "form": m.name,
                "RMSE": fixed(m.rmse, 2),
                "bias": fixed(m.bias, 2, signed=True),
                "worst": fixed(m.worst, 2),
            }
            for m in sorted(held.misses, key=lambda m: m.rmse)
        ]
        hidden = "1 point" if held.n_test == 1 else f"{held.n_test} points"
        title = f"Hidden: the top {held.hidden} ({hidden}, {held.decades:.1f} decades beyond the fit)"
        parts += titled(title, rows, ("form",))
    if analysis.effects:
        parts += _effects(analysis.effects)
    if analysis.predictor:
        parts += [Text(line) for line in quality(analysis.predictor)]
    if analysis.small_runs:
        parts += small_runs_table(analysis.small_runs)
    return Group(*parts, *notes(analysis.warnings))


def _effects(effects: Effects) -> list[RenderableType]:
    """Every effect, under it the same at each level of the choices that it interacts with, and how many were tested."""

    def row(choice: str, e: Effect, stands: bool, came_with: str) -> dict[str, str]:
        return {
            "choice": choice,
            "points": fixed(e.gain, 1, signed=True),
            "95% interval": f"{fixed(e.low, 1, signed=True)} to {fixed(e.high, 1, signed=True)}",
            "pairs": str(e.n_pairs),
            "gained": f"{e.better:.0%}",
            "after Holm": "yes" if stands else "no",
            "collapsed": points(100 * e.collapse),
            "always came with": came_with,
        }

    rows = []
    for e in effects.effects:
        reverses = f" (reverses by {', '.join(column(by).phrase for by in e.reversed_by)})" if e.reversed_by else ""
        rows.append(row(e.change() + reverses, e, e.stands, e.came_with()))
        rows += [row(f"  {part.condition()}", part, r.stands, "") for r in e.regimes for part in r.effects]
    title = (
        "What each choice changes (matched pairs; indented: by what it interacts with, read these and not their mean)"
    )
    parts = titled(title, rows, ("choice", "always came with"))
    tested = f"{effects.comparisons()} (an indented row says it of the interaction)."
    more = [Text(f"{effects.unseen()}.")] if effects.unseen() else []
    return [*parts, Text(tested), *more] if rows else []


def joint_text(law: Joint, brief: bool = False) -> Group:
    """What `robudget fit --joint` prints: the split in a sentence, the parameters, and isoFLOP profiles."""
    parts: list[RenderableType] = [Text(law.sentence(), style="bold")]
    if brief:
        return Group(*parts, *notes(law.warnings))
    formula = "y = E − A·N^−a − B·D^−d" + (" − S·K^−s" if law.k_column else "") + (" + Q·g" if law.g_column else "")
    named = {"N": law.n_column, "D": law.d_column, "K": law.k_column, "g": law.g_column}
    where = ", ".join(f"{letter} = {name}" for letter, name in named.items() if name)
    rows = []
    for name, value in law.params.items():
        low, high = law.intervals.get(name, (math.nan, math.nan))
        rows.append({"parameter": name, "value": number(value), "interval": f"[{number(low)}, {number(high)}]"})
    sign = "−y" if law.falls else "y"
    title = f"{formula.replace('y', sign, 1)} with y = {law.y}, {where} ({law.n_runs} runs, {law.level:.0%} intervals)"
    parts += titled(title, rows, ("parameter",))
    rows = []
    for best in law.optima():
        off = {f"{f:g}× N": f"{y:.2f}" for f, (_, _, y) in zip(PROFILE_FACTORS, best.profile, strict=True)}
        rows.append({"FLOP": number(best.flops), "best N": number(best.n), "best D": number(best.d), **off})
    steps = f" at {law.k_typical:g} steps" if law.k_column else ""
    parts += titled(f"IsoFLOP profiles{steps}: {law.y} at multiples of the best N, the last beyond the runs", rows, ())
    return Group(*parts, *notes(law.warnings))


def checklist_text(answers: dict[str, str]) -> Group:
    """The reporting checklist of laws, filled in: a question and its answer a line."""
    return Group(*(Text(f"{question}: {answer}") for question, answer in answers.items()))


def _binnings(analysis: Analysis) -> list[dict[str, str]]:
    cost = column(analysis.x)
    rows = [
        {
            "bins": "Pareto frontier" if b.how == "pareto" else f"{b.bins} in {b.how} x",
            "points": str(b.n_bins),
            "α": number(b.alpha),
            "price": cost.write(b.next_point) if math.isfinite(b.next_point) else "these runs cannot say",
        }
        for b in analysis.sensitivity
    ]
    if analysis.frontier and analysis.prices:
        price = analysis.prices[0]
        value = cost.write(price.value) if price.reachable else "these runs cannot say"
        alpha = number(analysis.frontier.alpha)
        rows.append({"bins": "none: the frontier", "points": str(analysis.frontier.n_runs), "α": alpha, "price": value})
    return rows


def _parts(analysis: Analysis) -> list[dict[str, str]]:
    rows = []
    for split in analysis.splits:
        what = f"{column(split.feature).phrase} {column(split.feature).level(split.level)}"
        if split.within:
            what += f", {column(split.within[0]).phrase} {column(split.within[0]).level(split.within[1])}"
        if split.frontier is None:
            continue
        gain, low, high = split.frontier.gain()
        ends = split.frontier.alpha_interval
        rows.append({
            "runs with": what, "runs": str(split.n_runs),
            "α [interval]": f"{number(split.frontier.alpha)} [{number(ends[0])}, {number(ends[1])}]",
            "points per decade": f"{fixed(gain, 1, signed=True)} [{fixed(low, 1, signed=True)}, "
                                 f"{fixed(high, 1, signed=True)}]",
        })  # fmt: skip
    return rows


def _form_row(analysis: Analysis, law: Law) -> dict[str, str]:
    hidden = analysis.holdouts[0].miss(law.name) if analysis.holdouts else None
    low, high = law.ceiling_interval
    return {
        "form": law.name,
        "C": number(law.C, 4),
        "α [interval]": _alpha(law),
        "ceiling": f"{fixed(law.ceiling)} [{fixed(low)}, {fixed(high)}]" if math.isfinite(law.ceiling) else "",
        "R²": fixed(law.r2, 2),
        "RMSE": fixed(law.rmse, 2),
        "weight": fixed(analysis.average.weight(law), 2) if analysis.average else "",
        "hidden RMSE": fixed(hidden.rmse, 2) if hidden else "",
    }


def _law_row(law: Law) -> dict[str, str]:
    row = {"y": law.y, "x": law.x, "C": number(law.C, 4), "α [interval]": _alpha(law), "R²": fixed(law.r2, 2)}
    return row | {"points": str(law.n_bins), "runs": str(law.n_runs)}


def _alpha(law: Law) -> str:
    low, high = law.alpha_interval
    return f"{number(law.alpha)} [{number(low)}, {number(high)}]"


def plan_text(plan: Plan, brief: bool = False) -> Group:
    """The answer and what it stands on; then options with their nearest real run, the first one's price in all units,
    the next point, and single changes to it."""
    parts: list[RenderableType] = [Text(plan.sentence(), style="bold"), *map(Text, plan.support())]
    if brief:
        return Group(*parts, *notes(plan.warnings))
    asked = plan.budget.text if plan.budget else f"{plan.target:g}% robust accuracy"
    parts += titled(
        f"Recipes for {asked} ({plan.n_candidates} considered; {plan.predictor.level:.0%} intervals)",
        [_option_row(option, plan) for option in plan.options],
        ("recipe", "nearest real run"),
    )
    if plan.best is not None:
        parts += _prices(plan, plan.best)
    parts += _allocation(plan)
    parts += _by_compute_alone(plan)
    rows = [
        {
            "change": f"{column(lever.feature).phrase} → {column(lever.feature).level(lever.value)}",
            "points": fixed(lever.gain, 1, signed=True),
            "× cost": number(lever.cost_ratio),
            "P(collapse)": f"{lever.p_collapse:.0%}",
            "changes compute": "yes" if lever.spends else "",
        }
        for lever in plan.levers
    ]
    parts += titled("Single changes to it, as predicted", rows, ("change",))
    if plan.instead:
        parts += [Text(""), Text(f"Instead: {plan.instead}", style="bold")]
    return Group(*parts, *notes(plan.warnings))


def next_text(following: NextRuns, brief: bool = False) -> Group:
    """Which runs to make next: the answer and what it stands on, then the runs in their order."""
    parts: list[RenderableType] = [Text(following.sentence(), style="bold"), *map(Text, following.support())]
    if brief:
        return Group(*parts)
    rows = [
        {
            "": str(place),
            "recipe": run.option.name() + (" (again, with another seed)" if run.again else ""),
            "cost": column(following.column).write(run.option.costs[following.column]),
            "P(collapse)": f"{run.option.p_collapse:.0%}",
            "interval after": following.half(run.half_after),
        }
        for place, run in enumerate(following.runs, 1)
    ]
    return Group(*parts, *titled("In this order", rows, ("recipe",)))


def _prices(plan: Plan, best: Option) -> list[RenderableType]:
    """What the best option costs, and what a point more costs beyond it, in every unit the table knows."""
    rows = []
    for name, value in best.costs.items():
        low, high = best.cost_intervals[name]
        row = {"cost": column(name).label}
        if best.measured is not None:
            row["its run took"] = column(name).write(best.measured.bill[name])
            row["another run, 90%"] = _span(name, ((low * high) ** 0.5, low, high))
        else:
            row["predicted, 90%"] = _span(name, (value, low, high))
        if plan.next_point is not None:
            row["the next point, more"] = _span(name, plan.marginal[name])
        rows.append(row)
    which = "The first of them" if plan.options else "The nearest to it"
    parts = titled(f"{which}: {best.name()}", rows, ("cost",))
    if plan.next_point is not None:
        following = plan.next_point
        parts.append(Text(f"The next point: {following.name()}: {following.predicted(plan.predictor.level)}"))
    else:
        parts.append(Text("No recipe at tried levels is predicted a point better."))
    return parts


def _allocation(plan: Plan) -> list[RenderableType]:
    """Where the next unit of compute should go: what each change bought, and its price."""
    found = plan.allocation
    if found is None:
        return []

    def row(text: str, e: Effect, more: dict[str, str]) -> dict[str, str]:
        cost = {"× cost": number(e.cost_ratio) if math.isfinite(e.cost_ratio) else ""}
        ends = f"{fixed(e.low, 1, signed=True)} to {fixed(e.high, 1, signed=True)}"
        return {"change": text, "points": fixed(e.gain, 1, signed=True), "95% interval": ends} | cost | more

    rows = []
    for move in found.moves:
        e = move.effect
        more = {
            "points a doubling": fixed(move.per_doubling, 2, signed=True) if math.isfinite(move.per_doubling) else "",
            "pairs": str(e.n_pairs),
            "from here": "yes" if move.from_here else "",
            "always came with": e.came_with(),
        }
        rows.append(row(e.change(), e, more))
        standing = [part for r in e.regimes if r.stands for part in r.effects]
        rows += [row(f"  {part.condition()}", part, {"pairs": str(part.n_pairs)}) for part in standing]
    rows = [dict.fromkeys(rows[0], "") | r for r in rows]
    head = "Where the next unit of compute should go"
    parts: list[RenderableType] = [Text(""), Text(head, style="bold"), *map(Text, found.sentences())]
    title = f"Matched pairs with {found.regime}, most points per doubling of {column(found.column).phrase} first"
    return [*parts, *titled(title, rows, ("change", "always came with"))]


def _by_compute_alone(plan: Plan) -> list[RenderableType]:
    """The law's one price, in the plan's unit and converted."""
    price = plan.price
    if price is None:
        return []
    what = "the target" if plan.target is not None else "a point more than the best run"
    title = f"By more compute alone ({what}; the law of the best runs, fitted in {column(price.x).phrase})"
    rows = []
    for name in (price.x, *price.costs):
        value, low, high = price.span(name)
        most = f"more than {column(name).write(price.limits.get(name, price.limit))}"
        ends = [column(name).write(v) if math.isfinite(v) else most for v in (value, low, high)]
        rows.append(
            {"cost": column(name).label, "price": ends[0], f"{price.level:.0%} interval": " to ".join(ends[1:])}
        )
    return titled(title, rows, ("cost",))


def _span(name: str, span: Span) -> str:
    return amount_range(*span, column(name).unit)


def _option_row(option: Option, plan: Plan) -> dict[str, str]:
    row = {
        "recipe": option.name(),
        "predicted %": fixed(option.aa_acc),
        "interval": f"{fixed(option.low)}–{fixed(option.high)}",
        "measured %": fixed(option.measured.aa_acc, 2) if option.measured else "",
        "P(collapse)": f"{option.p_collapse:.0%}",
    }
    if math.isfinite(option.p_reach):
        row["P(reach)"] = f"{option.p_reach:.0%}"
    head = "electricity" if plan.column == "cost_usd" else column(plan.column).short
    row[head] = column(plan.column).write(option.costs[plan.column])
    if plan.column != "train_seconds":
        row["time"] = duration(option.costs.get("train_seconds"))
    run, accuracy, _ = option.nearest[0]
    row["nearest real run"] = f"{run} {fixed(accuracy)}%" + (" (this recipe)" if option.ran else "")
    if option.untried:
        row["nearest real run"] += f"; no run has this value of {', '.join(column(n).phrase for n in option.untried)}"
    return row
