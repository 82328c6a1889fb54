"""What the laws say, in sentences, for each section of the page. Nothing is fitted here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from robudget.analysis import Analysis
from robudget.laws import Law
from robudget.laws.form_selection import BASELINES, Average
from robudget.report.figures.draw import POOLED
from robudget.report.labels import capital, fixed, interval, number, percent, phrase, write
from robudget.report.sections import evidence
from robudget.report.sections.evidence import change, span, span_of
from robudget.report.table import how

FAR = 2.0  # decades beyond the data that the planner's law is carried
NO_CEILING = 99.5  # percent: a ceiling fitted above is the end of the scale, not a finding
CURVE = 121  # points of a curve


def section(
    lead: str = "", tables: Sequence[dict[str, Any]] = (), warnings: Sequence[str] = ()
) -> dict[str, Any]:  # fmt: skip
    return {"lead": lead, "tables": [t for t in tables if t["rows"]], "warnings": [capital(w) for w in warnings]}


# -- the answer -------------------------------------------------------------------------------------------------------


def answer(analysis: Analysis | None) -> dict[str, Any]:
    """The headline law in one sentence with its interval, how far it can be trusted, and the numbers behind it."""
    if analysis is None:
        line = (
            "A law needs finished, uncollapsed, adversarially trained runs of one dataset and threat at several levels "
            "of compute. The runs themselves are all below."
        )
        return {"sentence": "No law was fitted to these runs.", "lines": [line], "warnings": [], "facts": []}
    law = analysis.law
    fitted = "every one" if law.envelope.how == "all" else f"the best run in each of {law.n_bins} bins"
    lines = [
        f"{capital(analysis.counts.sentence())}; the law is fitted to {fitted}, over a factor of "
        f"{number(10**law.envelope.decades, 2)} in {phrase(law.x)}."
    ]
    lines += [_support(analysis.average)] if analysis.average else []
    for hidden in analysis.holdouts[:1]:
        said = hidden.sentence()
        lines.append(f"Top {hidden.hidden} of compute held out: {said[0].lower()}{said[1:]}")
    return {
        "sentence": sentence(law),
        "lines": lines,
        "warnings": [capital(w) + "." for w in _hero_warnings(analysis)],
        "facts": _facts(analysis),
    }  # fmt: skip


def _support(average: Average) -> str:
    best, weight = average.best, max(average.weights)
    return f"Of {len(average.laws)} forms these runs support {best.name} most (Akaike weight {weight:.2f})."


def _hero_warnings(analysis: Analysis) -> list[str]:
    """What to know before believing the headline. Warnings about other forms stand with the forms."""
    law, largest = analysis.law, float(analysis.envelope.xs[-1])
    told = {w for h in analysis.holdouts for w in h.warnings()}
    told |= {w for form in analysis.forms if form is not law for w in form.warnings} - set(law.warnings)
    kept = [w for w in analysis.warnings if w not in told]
    full = law.cost_at(NO_CEILING).value / largest if law.y == "aa_acc" else math.inf
    if full < 10**FAR:
        where = f"{number(full, 2)} times the largest run" if full > 1 else "within the range of the runs"
        kept.append(f"this law passes {NO_CEILING}% at {where}: it describes these runs and forecasts no others")
    if not analysis.holdouts:
        return kept
    hidden = analysis.holdouts[0]
    losers = [m.name for m in hidden.misses if m.name in {f.name for f in analysis.forms} and not m.beats_baseline]
    if law.name in losers:
        kept.append(
            f"do not extrapolate this law: with the top {hidden.hidden} hidden it misses by more than repeating the "
            f"last seen value does ({len(losers)} of {len(hidden.misses) - len(BASELINES)} forms do)"
        )
    return kept


def sentence(law: Law) -> str:
    """The law as what ten times the compute did, and in points where that stays below 100%."""
    if law.form != "power":
        return law.sentence()
    factor = [10**v for v in (law.alpha, *law.alpha_interval)]
    best = "" if law.envelope.how == "all" else "best "
    said = (
        f"Over the range of these runs, ten times the {phrase(law.x)} multiplied the {best}{phrase(law.y)} by "
        f"{factor[0]:.3f} ({law.level:.0%} interval {factor[1]:.3f} to {factor[2]:.3f})"
    )
    top = float(law.envelope.ys.max())
    if law.y != "aa_acc" or top * factor[2] >= 100:
        return said + "."
    gain, low, high = (fixed(top * (f - 1), signed=True) for f in factor)
    return f"{said}: on top of the best run's {top:.1f}%, {gain} points [{low}, {high}]."


def _facts(analysis: Analysis) -> list[dict[str, str]]:
    law = analysis.law
    facts = [
        _fact("Exponent α", number(law.alpha), f"{law.level:.0%} interval {span(law.alpha_interval)}"),
        _fact("R²", fixed(law.r2, 2), f"{law.n_bins} best runs of {law.n_runs}"),
    ]
    limited = next((form for form in analysis.forms if form.form == "saturating"), None)
    if limited is not None and limited.ceiling < NO_CEILING:
        ends = f"saturating form, {limited.level:.0%} interval {interval(*limited.ceiling_interval)}"
        facts.append(_fact("Ceiling, if there is one", percent(limited.ceiling), ends))
    elif limited is not None:
        facts.append(_fact("Ceiling", "none in sight", "the saturating form puts it at 100%"))
    for hidden in analysis.holdouts[:1]:
        mine, baseline = hidden.miss(law.name), hidden.miss("last value")
        if mine is not None and baseline is not None:
            against = f"top {hidden.hidden} hidden; last value misses by {fixed(baseline.rmse, 2)}"
            facts.append(_fact("Missed out of sample", f"{fixed(mine.rmse, 2)} points", against))
    for reach in analysis.reaches[:1]:
        value = write(reach.x, reach.value) if reach.reachable else "unreachable"
        facts.append(_fact(f"Price of {reach.target:g}%", value, span_of(reach)))
    return facts


def _fact(name: str, value: str, small: str) -> dict[str, str]:
    return {"name": name, "value": value, "small": small}


# -- the sections -----------------------------------------------------------------------------------------------------


def drivers(analysis: Analysis | None) -> dict[str, Any]:
    if analysis is None or (analysis.effects is None and analysis.predictor is None):
        return section("There are too few runs, or too few choices that vary, to say what each choice buys.")
    found, lead, tables = analysis.effects, "", []
    if found is not None:
        for e in found.effects[:1]:
            lead = (
                f"The largest matched-pair effect is {change(e.feature, e.before, e.after)}: "
                f"{fixed(e.gain, signed=True)} points {interval(e.low, e.high)} over {e.n_pairs} pairs of runs that "
                f"differ in "
                f"nothing else."
            )
        tables += [evidence.effects(found), evidence.spreads(found), evidence.interactions(found)]
    if analysis.predictor is not None:
        tables += [evidence.importances(analysis.predictor), evidence.scores(analysis.predictor)]
    return section(lead, tables)


def laws(analysis: Analysis | None) -> dict[str, Any]:
    if analysis is None:
        return section("No law was fitted to these runs.")
    lead = (
        f"{capital(phrase(analysis.y))} against {phrase(analysis.x)}: several forms fitted to the same best runs, "
        f"weighed "
        f"by AICc, and judged on runs that they did not see."
    )
    held_out = [evidence.holdout(h, folded=i > 0) for i, h in enumerate(analysis.holdouts)]
    parts = (evidence.costs, evidence.published, evidence.sensitivity, evidence.splits)
    return section(lead, [evidence.forms(analysis), *held_out, *(part(analysis) for part in parts)])


def collapse(rows: pd.DataFrame, analysis: Analysis | None) -> dict[str, Any]:
    fallen = int(rows["collapsed"].sum())
    tried = int(((rows["loss"] != "standard") & rows["aa_acc"].notna()).sum())
    lead = (
        f"{fallen} of {tried} adversarially trained runs collapsed: their robust accuracy is below 0.3 × their clean "
        f"accuracy. They are left out of the laws, and counted."
    )
    found = analysis.effects if analysis is not None else None
    return section(lead, [evidence.collapse(found)] if found is not None else [])


def prices(analysis: Analysis | None) -> dict[str, Any]:
    if analysis is None or not analysis.reaches:
        return section("No law says what a further point would cost; the runs themselves answer below.")
    first = analysis.reaches[0]
    said = f"is priced at {write(first.x, first.value)} {span_of(first)}" if first.reachable else "is out of reach"
    lead = (
        f"One point more than the best run, {first.target:g}%, {said}; the largest best run took "
        f"{write(first.x, float(analysis.envelope.xs[-1]))}. Where compute is the dear way, better data, another loss "
        f"or "
        f"fewer collapsed runs may be the cheap one: see what drives robustness."
    )
    return section(lead, [evidence.prices(analysis)])


def methods(rows: pd.DataFrame, analysis: Analysis | None, notes: Sequence[str]) -> list[str]:
    out = [
        "AutoAttack accuracy is the share of test images that are classified correctly and that no attack of the "
        "standard ensemble breaks within the threat. Its intervals are 95% Wilson intervals over those images: they "
        "hold "
        "the scatter of the images, not that of the training seed.",
        "FLOP are counted exactly as a counter counts them (2 per multiply-add; an attack step costs two forward "
        "passes, "
        "an update three). The paper's count charges every backward pass twice a forward one and adds the released "
        "code's extra passes.",
        _estimates(rows),
        "Collapsed (catastrophic overfitting) means trained with an adversary, and robust accuracy below 0.3 × clean "
        "accuracy.",
        "What is not known is shown as unknown, and sums say over how many runs they are known.",
    ]
    if analysis is not None:
        out += [
            f"A law is fitted to the best usable run of each bin of compute ({analysis.counts.sentence()}). Its "
            f"intervals "
            f"come from drawing runs with replacement and rebuilding the envelope each time "
            f"({analysis.law.resamples:,} resamples): they hold the doubt about the runs, not about the form. Bands "
            f"of all "
            f"forms weighed together hold both.",
            "A hold-out hides the costliest runs, fits the rest and predicts. A form that misses by more than "
            "repeating "
            "the last seen value is not to be extrapolated.",
            "Matched pairs compare runs that differ in one choice only. A choice that always changes together with "
            "another is named beside it: the table cannot tell the two apart.",
        ]
    return [*out, *notes]


def _estimates(rows: pd.DataFrame) -> str:
    costs = ("train_flops_exact", "train_seconds", "train_energy_kwh", "cost_usd", "co2_kg")
    guessed = [phrase(c) for c in costs if "estimated" in how(rows, c)]
    said = f"Estimated rather than measured, for some runs or all: {', '.join(guessed)}. " if guessed else ""
    return (
        f"{said}Dollars are energy × PUE × price and carbon is energy × grid intensity, both by the price list that "
        f"the "
        f"table was made with."
    )


# -- curves for the chart and the planner -----------------------------------------------------------------------------


def curves(analysis: Analysis | None) -> dict[str, Any] | None:
    """Every law of the result over compute, then all of them together, as points on one grid for the page's script.

    `grids` hold the grid in compute (`x`) and in every cost that the analysis has a law of, `seen` the range of the
    best runs in each: through the law of cost, a law over compute speaks about money and energy too.
    """
    if analysis is None:
        return None
    env = analysis.envelope
    xs = np.geomspace(env.xs[0], env.xs[-1] * 10**FAR, CURVE)
    ends = env.xs[[0, -1]]
    grids, seen = {analysis.x: _points(xs)}, {analysis.x: _points(ends)}
    for cost in analysis.costs:
        if cost.alpha > 0:
            grids[cost.y], seen[cost.y] = _points(cost.predict(xs)), _points(cost.predict(ends))
    speakers: list[tuple[str, Law | Average]] = [(f"{law.name} law", law) for law in analysis.forms]
    if analysis.average is not None:
        speakers.append((f"all forms, {POOLED}", analysis.average))
    lines = []
    for name, law in speakers:
        low, high = law.band(xs)
        lines.append({"name": name, "y": _points(law.predict(xs)), "low": _points(low), "high": _points(high)})
    return {
        "x": analysis.x, "y": analysis.y, "level": f"{analysis.law.level:.0%}", "grids": grids, "seen": seen,
        "lines": lines,
    }  # fmt: skip


def _points(values: np.ndarray) -> list[float | None]:
    """Six digits; unknown is null."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]
