"""Which alternative is best at equal compute, and what each of many changes does beside the noise of seeds.

`comparison`: all pairs of alternatives by Tukey's honestly significant difference (Tukey 1949; unequal numbers: Kramer
1956). `changes`: each alternative against the first one by Dunnett's test (Dunnett 1955), which is scipy's. Both hold
their error over the whole family of comparisons, so that a dozen alternatives bring no effect by chance. They take runs
to scatter alike in all groups.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from robudget.answers.answer import LEVEL, Answer, TooFewRuns, Usable, Verdict, usable
from robudget.tables.usable import Floats, numbers_of

FEWEST = 2  # runs of an alternative: without a repeat nothing is known of the noise
REPRODUCTION_GAP = 3.6  # points by which the paper missed a published accuracy (arXiv 2312.13131)


def comparison(runs: pd.DataFrame, group: pd.Series | list[str], along: str = "group") -> Answer:
    """Raises TooFewRuns where fewer than two alternatives have FEWEST runs that did not collapse."""
    all_of = usable(runs, group)
    names, samples = _samples(all_of, along)
    means = np.array([sample.mean() for sample in samples])
    sizes = np.array([len(sample) for sample in samples])
    sd, freedom = _scatter(samples)
    order = np.argsort(-means, kind="stable")
    best, second = int(order[0]), int(order[1])
    gaps = means[best] - means
    half = _studentized(len(names), freedom) * sd * np.sqrt((1 / sizes[best] + 1 / sizes) / 2)
    gap, low, high = (float(value[second]) for value in (gaps, gaps - half, gaps + half))
    verdict: Verdict = "yes" if low > 0 else "undecided"
    beaten = [names[i] for i in order[1:] if gaps[i] > half[i]]
    said = (
        f"The best alternative of {along} is {names[best]}"
        if verdict == "yes"
        else f"No alternative of {along} is shown to be the best; {names[best]} has the highest mean"
    )
    behind = f"; shown to be worse than it: {', '.join(beaten)}" if beaten else "; none is shown to be worse than it"
    rows = [_row(all_of, along, names[i], samples[i]) for i in order]
    front = _front(rows)
    for row in rows:
        row["on the front"] = row[along] in front
    ratio = _ratio(all_of.x)
    sentence = (
        f"{said}: {means[best]:.1f}%, {gap:.1f} points [{low:.1f}, {high:.1f}] above "
        f"{names[second]} (Tukey's intervals over {len(names)} alternatives, {sum(map(len, samples))} runs){behind}. "
        f"On the Pareto front of mean accuracy against mean energy: {', '.join(front)}; the runs' training compute is "
        f"equal to a factor of {ratio:.2g}."
    )
    return Answer(verdict, sentence, tuple(rows), all_of.notes + _alone(all_of, names), all_of.points)


def changes(
    runs: pd.DataFrame, group: pd.Series | list[str], along: str = "group", baseline: str | None = None
) -> Answer:
    """`baseline`: the alternative that the others are changes of (default: the first of the table). Raises TooFewRuns
    where it or all others have fewer than FEWEST runs that did not collapse."""
    all_of = usable(runs, group)
    names, samples = _samples(all_of, along)
    first = baseline if baseline is not None else str(next(iter(group)))
    if first not in names:
        raise TooFewRuns(
            f"{first}, which the others are changes of, has fewer than {FEWEST} runs that did not collapse"
        )
    at = names.index(first)
    others = [i for i in range(len(names)) if i != at]
    result: Any = stats.dunnett(*(samples[i] for i in others), control=samples[at], rng=np.random.default_rng(0))
    interval = result.confidence_interval(LEVEL)
    effects = np.array([samples[i].mean() for i in others]) - samples[at].mean()
    sd, freedom = _scatter(samples)
    sd_low, sd_high = (
        float(sd * np.sqrt(freedom / stats.chi2.ppf(q, freedom))) for q in (0.5 + LEVEL / 2, 0.5 - LEVEL / 2)
    )
    clear = [k for k in range(len(others)) if interval.low[k] > 0 or interval.high[k] < 0]
    largest = int(np.argmax(np.abs(effects)))
    verdict: Verdict = "yes" if clear else "undecided"
    said = ", ".join(f"{names[others[k]]} {_effect(effects, interval, k)}" for k in clear)
    what = f"{len(clear)} of {len(others)} changes move the accuracy: {said}" if clear else (
        f"none of {len(others)} changes is shown to move the accuracy; the largest difference is that of "
        f"{names[others[largest]]}, {_effect(effects, interval, largest)}"
    )  # fmt: skip
    sentence = (
        f"{what[0].upper()}{what[1:]} points (Dunnett's intervals, {freedom + len(names)} runs). Seeds of one recipe "
        f"scatter by {sd:.2f} points [{sd_low:.2f}, {sd_high:.2f}]; the paper's reproduction gap of "
        f"{REPRODUCTION_GAP:g} points is {REPRODUCTION_GAP / sd:.1f} of these standard deviations "
        f"[{REPRODUCTION_GAP / sd_high:.1f}, {REPRODUCTION_GAP / sd_low:.1f}] at this size of runs."
    )
    rows = [_row(all_of, along, first, samples[at]) | {"effect": 0.0, "low": np.nan, "high": np.nan}]
    rows += [
        _row(all_of, along, names[i], samples[i])
        | {"effect": float(effects[k]), "low": float(interval.low[k]), "high": float(interval.high[k])}
        for k, i in enumerate(others)
    ]
    return Answer(verdict, sentence, tuple(rows), all_of.notes + _alone(all_of, names), all_of.points)


@cache
def _studentized(groups: int, freedom: int) -> float:
    """The quantile of Tukey's studentized range, kept: an integral of two dimensions."""
    return float(stats.studentized_range.ppf(LEVEL, groups, freedom))


def _scatter(samples: list[Floats]) -> tuple[float, int]:
    """The standard deviation within groups, and its degrees of freedom."""
    freedom = sum(len(sample) - 1 for sample in samples)
    return float(np.sqrt(sum(((sample - sample.mean()) ** 2).sum() for sample in samples) / freedom)), freedom


def _samples(all_of: Usable, along: str) -> tuple[list[str], list[Floats]]:
    names = [name for name in all_of.names if (all_of.group == name).sum() >= FEWEST]
    if len(names) < 2:
        raise TooFewRuns(
            f"{len(names)} alternatives of {along} have {FEWEST} runs that did not collapse (allowed: two or more)"
        )
    return names, [all_of.y[all_of.group == name] for name in names]


def _row(all_of: Usable, along: str, name: str, sample: Floats) -> dict[str, Any]:
    mine = all_of.group == name
    t = stats.t.ppf(0.5 + LEVEL / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    costs = {
        short: float(np.mean(numbers_of(all_of.runs, column)[mine])) if column in all_of.runs else np.nan
        for short, column in (("FLOP", "train_flops_exact"), ("kWh", "train_energy_kwh"), ("seconds", "train_seconds"))
    }
    return {
        along: name,
        "runs": len(sample),
        "accuracy": float(sample.mean()),
        "accuracy low": float(sample.mean() - t),
        "accuracy high": float(sample.mean() + t),
        "collapsed": all_of.collapsed.get(name, 0),
    } | costs


def _front(rows: list[dict[str, Any]]) -> list[str]:
    """The alternatives that no other one beats in mean accuracy at no more energy; of compute where energy is not
    known of all. The cheapest first."""
    cost = "kWh" if all(np.isfinite(row["kWh"]) for row in rows) else "FLOP"
    along, best, front = next(iter(rows[0])), -np.inf, []
    for row in sorted(rows, key=lambda row: (row[cost], -row["accuracy"])):
        if row["accuracy"] > best:
            best = row["accuracy"]
            front.append(row[along])
    return front


def _effect(effects: Floats, interval: Any, k: int) -> str:
    return f"{effects[k]:+.1f} [{interval.low[k]:+.1f}, {interval.high[k]:+.1f}]"


def _ratio(x: Floats) -> float:
    return float(x.max() / x.min())


def _alone(all_of: Usable, names: list[str]) -> tuple[str, ...]:
    """A note of the alternatives that are not compared."""
    dropped = [name for name in all_of.collapsed if name not in names]
    return (f"fewer than {FEWEST} runs that did not collapse: {', '.join(dropped)}",) if dropped else ()
