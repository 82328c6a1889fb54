"""The page's head and its first section: the answer with its numbers, the best run, and what the study cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from robudget.analysis import Analysis
from robudget.columns import COSTS, MAIN_COSTS, column
from robudget.formats import UNKNOWN, fixed, interval, known, number, percent, word
from robudget.laws import Law
from robudget.laws.form_selection import BASELINES
from robudget.report.sections.extrapolation import FAR_DECADES
from robudget.report.table import choices, how, run_name, source, total
from robudget.report.words import capital, price_interval, span, threat

NO_CEILING_PERCENT = 99.5  # a ceiling fitted above is the end of the scale, not a finding


@dataclass(frozen=True)
class Fact:
    """A named number of the page, with a smaller line to it and how it was obtained."""

    name: str
    value: str
    small: str = ""
    how: str = ""


def head(rows: pd.DataFrame) -> str:
    """`319 runs · cifar10 · L∞ 8/255`."""
    datasets = [word(v) for v in rows["dataset"].dropna().unique()]
    threats = [threat(norm, eps) for norm, eps in rows[["norm", "eps"]].drop_duplicates().itertuples(index=False)]
    runs = f"{len(rows):,} run{'' if len(rows) == 1 else 's'}"
    return " · ".join([runs, *([", ".join(datasets)] if datasets else []), ", ".join(threats)])


def answer(analysis: Analysis | None) -> dict[str, Any]:
    """The answer in one sentence with its interval, as `robudget fit` gives it; what it stands on, the paper's law
    beside it, how far that can be trusted, and the numbers behind it."""
    if analysis is None:
        line = (
            "A law needs finished, uncollapsed, adversarially trained runs of one dataset and threat at several levels "
            "of compute. The runs themselves are all below."
        )
        return {"sentence": "No law was fitted to these runs.", "lines": [line], "warnings": [], "facts": []}
    law = analysis.law
    fitted = "every run" if law.envelope.how == "all" else f"the best run in each of {law.n_bins} bins"
    lines = [*analysis.support]
    lines.append(f"The paper's law, fitted to {fitted}: {sentence(law)}")
    lines += [analysis.average.support()] if analysis.average else []
    for hidden in analysis.holdouts[:1]:
        text = hidden.sentence()
        lines.append(f"Top {hidden.hidden} of compute held out: {text[0].lower()}{text[1:]}")
    return {
        "sentence": analysis.answer,
        "lines": lines,
        "warnings": [capital(w) + "." for w in _warnings(analysis)],
        "facts": _facts(analysis),
    }


def _warnings(analysis: Analysis) -> list[str]:
    """What to know before believing the headline. Warnings about other forms stand with the forms."""
    law, largest = analysis.law, float(analysis.envelope.xs[-1])
    elsewhere = {w for h in analysis.holdouts for w in h.warnings()}
    elsewhere |= {w for form in analysis.forms if form is not law for w in form.warnings} - set(law.warnings)
    warnings = [w for w in analysis.warnings if w not in elsewhere]
    full = law.cost_at(NO_CEILING_PERCENT).value / largest if law.y == "aa_acc" else math.inf
    if full < 10**FAR_DECADES:
        where = f"{number(full, 2)} times the largest run" if full > 1 else "within the range of the runs"
        warnings.append(
            f"this law passes {NO_CEILING_PERCENT}% at {where}: it describes these runs and forecasts no others"
        )
    if not analysis.holdouts:
        return warnings
    hidden = analysis.holdouts[0]
    losers = [m.name for m in hidden.misses if m.name in {f.name for f in analysis.forms} and not m.beats_baseline]
    if law.name in losers:
        warnings.append(
            f"do not extrapolate this law: with the top {hidden.hidden} hidden it misses by more than repeating the "
            f"last seen value does ({len(losers)} of {len(hidden.misses) - len(BASELINES)} forms do)"
        )
    return warnings


def sentence(law: Law) -> str:
    """The law as what ten times the compute did, and in points where that stays below 100%."""
    if law.form != "power":
        return law.sentence()
    factor = [10**v for v in (law.alpha, *law.alpha_interval)]
    best = "" if law.envelope.how == "all" else "best "
    text = (
        f"Over the range of these runs, ten times the {column(law.x).phrase} multiplied the "
        f"{best}{column(law.y).phrase} by {factor[0]:.3f} ({law.level:.0%} interval {factor[1]:.3f} to {factor[2]:.3f})"
    )
    top = float(law.envelope.ys.max())
    if law.y != "aa_acc" or top * factor[2] >= 100:
        return text + "."
    gain, low, high = (fixed(top * (f - 1), signed=True) for f in factor)
    return f"{text}: on top of the best run's {top:.1f}%, {gain} points [{low}, {high}]."


def _facts(analysis: Analysis) -> list[Fact]:
    law = analysis.law
    facts = [
        Fact("Exponent α", number(law.alpha), f"{law.level:.0%} interval {span(law.alpha_interval)}"),
        Fact("R²", fixed(law.r2, 2), f"{law.n_bins} best runs of {law.n_runs}"),
    ]
    limited = next((form for form in analysis.forms if form.form == "saturating"), None)
    if limited is not None and limited.ceiling < NO_CEILING_PERCENT:
        ends = f"saturating form, {limited.level:.0%} interval {interval(*limited.ceiling_interval)}"
        facts.append(Fact("Ceiling, if there is one", percent(limited.ceiling), ends))
    elif limited is not None:
        facts.append(Fact("Ceiling", "none found", "the saturating form puts it at 100%"))
    for hidden in analysis.holdouts[:1]:
        mine, baseline = hidden.miss(law.name), hidden.miss("last value")
        if mine is not None and baseline is not None:
            against = f"top {hidden.hidden} hidden; the last value has {fixed(baseline.rmse, 2)}"
            facts.append(Fact("Error out of sample", f"{fixed(mine.rmse, 2)} points", against))
    for price in analysis.prices[:1]:
        value = column(price.x).write(price.value if price.reachable else price.limit)
        facts.append(
            Fact(
                f"Price of {price.target:g}%", value if price.reachable else f"more than {value}", price_interval(price)
            )
        )
    return facts


def best(rows: pd.DataFrame) -> dict[str, Any] | None:
    """The run of the highest known AutoAttack accuracy; `rows` are sorted (table.ranked)."""
    row = rows.iloc[0]
    if not known(row["aa_acc"]):
        return None
    low, high = row["aa_acc_low"], row["aa_acc_high"]
    about = [f"Clean accuracy {column('clean_acc').write(row['clean_acc'])}."]
    spent = ", ".join(
        f"{column(c).write(row[c])} ({source(row, c)})" if source(row, c) else column(c).write(row[c])
        for c in MAIN_COSTS
        if known(row[c])
    )
    if spent:
        about.append(f"Training took {spent}.")
    about += _rivals(rows)
    images = f" on {int(row['n_eval']):,} images" if known(row["n_eval"]) else ""
    return {
        "accuracy": percent(row["aa_acc"]),
        "interval": f"AutoAttack, 95% interval {interval(low, high)}{images}",
        "choices": list(choices(row).values()),
        "about": f"{run_name(row)}. {' '.join(about)}",
    }


def _rivals(rows: pd.DataFrame) -> list[str]:
    """How many runs lie within the best one's interval, and what the cheapest of them cost."""
    low = rows["aa_acc_low"].iloc[0]
    rivals = rows.iloc[1:][rows["aa_acc"].iloc[1:] >= low]
    if rivals.empty:
        return []
    rest = "1 other run lies" if len(rivals) == 1 else f"{len(rivals)} other runs lie"
    sentences = [f"{rest} within its interval: the order among them is not certain."]
    cost = next((c for c in COSTS if rivals[c].notna().any()), None)
    if cost is not None and rivals[cost].min() < rows[cost].iloc[0]:
        cheapest = rivals.loc[rivals[cost].idxmin()]
        factor = rows[cost].iloc[0] / cheapest[cost]
        sentences.append(
            f"The cheapest, {run_name(cheapest)} ({percent(cheapest['aa_acc'])}), took "
            f"{column(cost).write(cheapest[cost])}: {number(factor, 2)} times less."
        )
    return sentences


def bill(rows: pd.DataFrame) -> dict[str, Any]:
    """What all runs cost, training and evaluation together, each with how it was obtained and for how many runs it is
    known."""
    facts = []
    for cost in map(column, MAIN_COSTS):
        evaluation = cost.evaluation
        assert evaluation is not None  # of every main cost
        value, n = total(rows, cost.name, evaluation)
        tested, m = total(rows, evaluation)
        parts = [f"evaluation {cost.write(tested)} of it" if m else "training only"]
        if 0 < n < len(rows):
            parts.append(f"known for {n} of {len(rows)} runs")
        small, origin = ("; ".join(parts), how(rows, cost.name)) if n else ("", UNKNOWN)
        facts.append(Fact(capital(cost.short), cost.write(value), small, origin))
    note = (
        "Energy is that of GPU, CPU and memory. Runs that worked at the same time count in full, so their times add up "
        "to more than the time that passed."
    )
    return {"facts": facts, "note": note}
