"""The page's tables of evidence: effects, importances, forms, hold-outs, splits, prices. Numbers come from the laws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from robudget.analysis import Analysis
from robudget.laws import Law, Reach
from robudget.laws.form_selection import BASELINES, Holdout
from robudget.prediction.effects import Effect, Effects
from robudget.prediction.predictor import Predictor
from robudget.report import labels
from robudget.report.labels import UNKNOWN, feature, fixed, interval, known, number, percent, phrase, quantity, write

MOST = 24  # effects shown
BINNINGS = {
    "log": "equal in log",
    "linear": "equal",
    "quantile": "equally many runs",
    "pareto": "none: Pareto frontier",
}
Cell = str | tuple[str, str]  # text, or text with a smaller line to it


def table(
    title: str,
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    note: str = "",
    folded: bool = False,
) -> dict[str, Any]:
    """A table for the page. A head that starts with `#` is of numbers; `folded` ones open on a click."""
    made = []
    for row in rows:
        cells = [cell if isinstance(cell, tuple) else (cell, "") for cell in row]
        made.append([{"text": text, "small": small} for text, small in cells])
    heads = [{"text": h.removeprefix("#"), "number": h.startswith("#")} for h in head]
    return {"title": title, "caption": caption, "head": heads, "rows": made, "note": note, "folded": folded}


def span(ends: tuple[float, float], digits: int = 2) -> str:
    """An interval of numbers of any size: `[−0.0041, 0.021]`."""
    if not all(map(known, ends)):
        return UNKNOWN
    return f"[{number(ends[0], digits)}, {number(ends[1], digits)}]"


def span_of(reach: Reach) -> str:
    """The interval of a cost at target, whose upper end may be never."""
    if not known(reach.low) and not known(reach.high):
        return f"never in {reach.p_unreachable:.0%} of resamples"
    high = number(reach.high, 2) if math.isfinite(reach.high) else "never"
    return f"[{number(reach.low, 2)}, {high}]"


def level(name: str, value: object) -> str:
    """A level of a choice: parameters as 36.5 M, the rest as the recipe writes it."""
    return quantity(name).level(value)


def change(name: str, before: object, after: object) -> str:
    return f"{feature(name)} {level(name, before)} → {level(name, after)}"


def _twins(aliases: Sequence[str]) -> str:
    return ", ".join(feature(a) for a in aliases) or "–"


# -- what drives robustness -------------------------------------------------------------------------------------------


def effects(found: Effects) -> dict[str, Any]:
    rows = [
        (
            change(e.feature, e.before, e.after),
            (fixed(e.gain, 2, signed=True), interval(e.low, e.high, 2)),
            fixed(e.sd, 2),
            percent(100 * e.better, 0),
            str(e.n_pairs),
            collapse_change(e),
            _twins(e.aliases),
        )
        for e in found.effects[:MOST]
    ]
    return table(
        "What each choice buys",
        f"Pairs of runs that differ in one choice only; {found.level:.0%} intervals, bootstrap over pairs",
        ["choice", "#gain (points)", "#sd of gains", "#pairs that gain", "#pairs", "#P(collapse)", "changes along"],
        rows,
        note="Gains are over pairs in which neither run collapsed; the change of P(collapse) is over all pairs.",
    )  # fmt: skip


def collapse_change(effect: Effect) -> str:
    return f"{fixed(100 * effect.collapse, 0, signed=True)} points"


def spreads(found: Effects) -> dict[str, Any]:
    rows = [
        (
            change(s.feature, s.before, s.after),
            fixed(s.sd_before, 2),
            fixed(s.sd_after, 2),
            (fixed(s.ratio, 2), interval(s.low, s.high, 2)),
            f"{s.n_before}, {s.n_after}",
            "left out" if s.survivors else "included",
        )
        for s in found.spreads
    ]
    return table(
        "Does a choice shrink the spread of the others?",
        "Standard deviation of AutoAttack accuracy over all other choices, in points",
        ["choice", "#sd before", "#sd after", "#ratio", "#runs", "collapsed runs"],
        rows,
        folded=True,
    )


def interactions(found: Effects) -> dict[str, Any]:
    rows = [
        (feature(i.first), feature(i.second), (fixed(i.gain, 2, signed=True), interval(i.low, i.high, 2)), str(i.n))
        for i in found.interactions[:8]
    ]
    return table(
        "Interactions",
        "By how many points the gain of the first choice is larger where the second is at its upper level",
        ["first", "second", "#extra gain (points)", "#quadruples"],
        rows,
        folded=True,
    )


def importances(predictor: Predictor) -> dict[str, Any]:
    rows = [
        (
            feature(i.feature),
            percent(100 * i.by_model),
            (fixed(i.by_permutation, 2), interval(i.low, i.high, 2)),
            _twins(i.aliases),
        )
        for i in predictor.importances
    ]
    return table(
        "What the predictor leans on",
        f"{predictor.n_runs} runs, {predictor.n_collapsed} of them collapsed",
        ["choice", "#share in the trees", "#error added when shuffled (points)", "varies only with"],
        rows,
        note=" ".join(f"{labels.capital(w)}." for w in predictor.warnings),
        folded=True,
    )


def scores(predictor: Predictor) -> dict[str, Any]:
    rows = [
        (
            _design(s.design),
            s.model + (" (chosen)" if s.model == predictor.model else ""),
            fixed(s.r2, 2),
            fixed(s.mae, 2),
            fixed(s.rmse, 2),
            fixed(s.collapse_auc, 3),
            str(s.n),
        )
        for s in predictor.scores
    ]
    return table(
        "How good is the predictor?",
        "Runs predicted by models not fitted on them: at random, and with every level of a choice left out in turn",
        ["left out", "model", "#R²", "#mean error (points)", "#root mean square", "#AUC of P(collapse)", "#runs"],
        rows,
        folded=True,
    )  # fmt: skip


def _design(name: str) -> str:
    return f"each {feature(name.removeprefix('by '))}" if name.startswith("by ") else "at random"


# -- laws -------------------------------------------------------------------------------------------------------------


def forms(analysis: Analysis) -> dict[str, Any]:
    average = analysis.average
    weights = {o.name: w for o, w in zip(average.laws, average.weights, strict=True)} if average else {}
    hidden = analysis.holdouts[0] if analysis.holdouts else None

    def out_of_sample(law: Law) -> str:
        miss = hidden.miss(law.name) if hidden else None
        return fixed(miss.rmse, 2) if miss else "not fitted"

    rows: list[Sequence[Cell]] = [
        (
            law.name,
            (labels.formula(law.formula), ", ".join(f"{_symbol(k)} = {number(v)}" for k, v in law.params.items())),
            (number(law.alpha), span(law.alpha_interval)),
            (percent(law.ceiling), interval(*law.ceiling_interval)) if math.isfinite(law.ceiling) else "none",
            fixed(law.rmse, 2),
            fixed(weights.get(law.name), 2),
            out_of_sample(law),
        )
        for law in analysis.forms
    ]
    law = analysis.law
    return table(
        "Competing forms",
        f"{law.n_bins} best runs of {law.n_runs}; {law.level:.0%} intervals from {law.resamples:,} bootstrap resamples",
        ["form", "formula", "#α", "#ceiling", "#misfit (points)", "#Akaike weight", "#held-out miss (points)"],
        rows,
        note=" ".join(f"{labels.capital(w)}." for w in dict.fromkeys(w for o in analysis.forms for w in o.warnings)),
    )


def _symbol(name: str) -> str:
    return {"alpha": "α", "alpha2": "α2", "gamma": "γ"}.get(name, name)


def holdout(hidden: Holdout, *, folded: bool) -> dict[str, Any]:
    rows = [
        (
            m.name,
            fixed(m.rmse, 2),
            fixed(m.bias, 2, signed=True),
            fixed(m.worst, 2),
            "–" if m.name in BASELINES else "yes" if m.beats_baseline else "no",
        )
        for m in sorted(hidden.misses, key=lambda m: m.rmse)
    ]
    return table(
        f"Held out: the top {hidden.hidden}",
        f"{hidden.n_train} best runs fitted, {hidden.n_test} predicted, up to a factor of {10**hidden.decades:.2g} "
        f"beyond",
        ["form", "#miss (points)", "#bias", "#worst", "beats the last value"],
        rows,
        folded=folded,
    )  # fmt: skip


def costs(analysis: Analysis) -> dict[str, Any]:
    rows = [
        (quantity(w.y).axis, number(w.C), (number(w.alpha), span(w.alpha_interval, 3)), fixed(w.r2, 2), str(w.n_runs))
        for w in analysis.costs
    ]
    return table(
        "What compute costs",
        f"Power laws over {phrase(analysis.x)}, on every run",
        ["cost", "#C", "#α", "#R²", "#runs"],
        rows,
    )


def sensitivity(analysis: Analysis) -> dict[str, Any]:
    rows = [
        (
            BINNINGS.get(b.how, b.how),
            "–" if b.how == "pareto" else str(b.bins),
            str(b.n_bins),
            number(b.C),
            number(b.alpha),
            fixed(b.rmse, 2),
        )
        for b in analysis.sensitivity
    ]
    return table(
        "Does the binning matter?",
        "The power law under other binnings",
        ["bins", "#asked for", "#best runs", "#C", "#α", "#misfit (points)"],
        rows,
        folded=True,
    )


def splits(analysis: Analysis) -> dict[str, Any]:
    rows: list[Sequence[Cell]] = []
    for s in analysis.splits:
        what = f"{feature(s.feature)}: {level(s.feature, s.level)}"
        if s.law is None:
            rows.append((what, str(s.n_runs), "–", "–", s.reason))
        else:
            alpha = number(s.law.alpha), span(s.law.alpha_interval)
            rows.append((what, str(s.n_runs), number(s.law.C), alpha, "; ".join(s.law.warnings)))
    return table(
        "Laws of parts of the table",
        "Power laws of the runs that share one choice",
        ["runs with", "#runs", "#C", "#α", "remark"],
        rows,
        folded=True,
    )


def published(analysis: Analysis) -> dict[str, Any]:
    rows = [
        (
            quantity(w.y).label,
            number(w.C, 4),
            (number(w.alpha), span(w.alpha_interval)),
            fixed(w.r2, 2),
            str(w.n_bins),
            str(w.n_runs),
        )
        for w in analysis.published
    ]
    return table(
        "The paper's own laws",
        "From its published columns: x is one GPU's share of the run, in TFLOP",
        ["result", "#C", "#α", "#R²", "#points", "#runs"],
        rows,
    )


def prices(analysis: Analysis) -> dict[str, Any]:
    """What round targets cost, by all forms together, in every unit that the table has a law of cost for."""
    largest, known_costs = float(analysis.envelope.xs[-1]), analysis.costs
    rows: list[Sequence[Cell]] = []
    for reach in analysis.reaches:
        never = percent(100 * reach.p_unreachable, 0)
        if reach.reachable:
            price = (write(reach.x, reach.value), span_of(reach))
            others = [write(law.y, float(law.predict(reach.value))) for law in known_costs]
            rows.append((f"{reach.target:g}%", price, f"×{number(reach.value / largest, 2)}", *others, never))
        else:
            rows.append(
                (f"{reach.target:g}%", ("unreachable", span_of(reach)), "–", *("–" for _ in known_costs), never)
            )
    heads = [f"#{quantity(law.y).short}" for law in known_costs]
    return table(
        "What a target costs",
        f"All forms weighed together, {analysis.reaches[0].level:.0%} intervals; the other units follow from the laws "
        f"of cost",
        ["target", f"#{quantity(analysis.x).short}", "#of the largest best run", *heads, "#never, in resamples"],
        rows,
        note="A price far beyond the largest run is an extrapolation, whatever its interval.",
    )  # fmt: skip


def collapse(found: Effects) -> dict[str, Any]:
    moved = sorted((e for e in found.effects if e.collapse), key=lambda e: -abs(e.collapse))[:8]
    return table(
        "What changes the chance of collapse",
        "All pairs of runs that differ in one choice only",
        ["choice", "#change of P(collapse)", "#pairs"],
        [(change(e.feature, e.before, e.after), collapse_change(e), str(e.n_all)) for e in moved],
    )
