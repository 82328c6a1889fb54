"""Which run to make next: the runs that shrink the interval of a stated question most for what they cost.

Three questions. For the exponent and for the price of a target, the surviving runs in the regime of the best run are
described by ln accuracy = a + α ln compute + a shift for every choice that spends no compute; each run is chosen for
the variance that it takes from α, or from ln price = (ln target − a − shifts) / α, per unit of cost: c-optimal design,
one run after the other (Elfving 1952; Atkinson, Donev & Tobias 2007, 10.2). For the effect of a choice the variance is
that of matched pairs: a group of runs equal in all else with n and m runs at the two levels adds n m / (n + m) to its
information, so that a run without a partner adds nothing and a run that completes a pair much. A run that may collapse
counts with its chance of survival, and another seed of a recipe that was run tells only of the noise of its evaluation,
not of what the recipe has of its own. The model is for choosing runs, not for reporting: what they taught is read from
`robudget fit`. Against random and cheapest-first choices it is measured by `bench/laws.py next` (bench/RESULTS.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robudget.columns import COSTS, column
from robudget.errors import InputError, unknown
from robudget.files import fields
from robudget.formats import known, number
from robudget.laws.price import priced_in
from robudget.planning.allocation import allocation
from robudget.planning.answer import Option
from robudget.prediction.features import Features
from robudget.tables.usable import Floats, collapsed_rows, failed_rows, level_of, numbers_of, standard_rows

EXPONENT, PRICE = "exponent", "price"
LEVEL = 0.95
RANDOM_DRAWS = 20
LITTLE = 0.95  # of the interval left is little gained
AS_GOOD = 0.03  # of a half width that makes no difference
RIDGE = 1e-6  # on the information: what no run says yet is nearly free, but not infinite


@dataclass(frozen=True)
class NextRun:
    """One run to make: the recipe, whether the table has run it already (then with another seed), and the half width of
    the question's interval expected after it and all before it."""

    option: Option
    again: bool
    half_after: float


@dataclass(frozen=True)
class NextRuns:
    """The `runs` to make for `question`, whose interval is `half_now` wide on either side, and their total `cost` in
    `column`. `half_random` and `half_cheapest` are what as much money is expected to leave of it when it is spent on
    recipes drawn at random and on the cheapest ones; the `cheapest` recipe costs so much. Half widths are of α, of
    log10 of the price, or of points."""

    question: str
    column: str
    runs: tuple[NextRun, ...]
    half_now: float
    cost: float
    half_random: float
    half_cheapest: float
    cheapest: float
    n_runs: int

    @property
    def half_after(self) -> float:
        return self.runs[-1].half_after if self.runs else self.half_now

    @property
    def cheapest_as_good(self) -> bool:
        """Whether as much money on the cheapest runs leaves an interval no wider, but for AS_GOOD."""
        return bool(self.half_cheapest <= (1 + AS_GOOD) * self.half_after)

    def sentence(self) -> str:
        if not self.runs:
            least = column(self.column).write(self.cheapest)
            text = f"No recipe fits the budget, so that no run can tell more of {self.question}"
            return f"{text}: the cheapest costs {least}."
        spent = column(self.column).write(self.cost) + (" of electricity" if self.column == "cost_usd" else "")
        first = self.runs[0]
        n = "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"
        return (
            f"To know {self.question} better, train {first.option.name()}{' again' if first.again else ''} first: {n} "
            f"for {spent} are expected to shrink its interval from {self.half(self.half_now)} to "
            f"{self.half(self.half_after)}."
        )

    def support(self) -> tuple[str, ...]:
        lines = [
            f"It stands on {self.n_runs} surviving runs in the best run's regime, and on the scatter that they have."
        ]
        if self.runs and known(self.half_random):
            lines.append(
                f"As much spent on recipes drawn at random is expected to leave {self.half(self.half_random)}, and on "
                f"the cheapest first {self.half(self.half_cheapest)}"
                + (": the cheapest runs first are as good a rule here." if self.cheapest_as_good else ".")
            )
        if self.runs and self.half_after > LITTLE * self.half_now:
            lines.append(
                "That is little: what these recipes can say is nearly said. A size, a length or a step count that the "
                "table lacks would tell more (--study offers such recipes)."
            )
        return tuple(lines)

    def half(self, value: float) -> str:
        """A half width for a reader: `±0.004`, `±0.20 points`, `a factor of 1.8 either way`."""
        if not known(value):
            return "unknown"
        if self.question.startswith("the price"):
            return f"a factor of {number(10**value)} either way" if value < 6 else "more than a factor of 10⁶"
        return f"±{number(value)}" if "exponent" in self.question else f"±{number(value)} points"

    def to_dict(self) -> dict[str, Any]:
        said = {"answer": self.sentence(), "support": list(self.support()), "half_after": self.half_after}
        return said | fields(self) | {"cheapest_as_good": self.cheapest_as_good}


def _weight(n: float, noise: float) -> float:
    """What n runs of one recipe tell, in runs of different recipes: `noise` is the share of a run's variance that is
    its evaluation's."""
    return n / (noise + (1 - noise) * n) if n > 0 else 0.0


class _Regression:
    """ln accuracy over ln compute and the choices that spend none; `c` is the question's gradient."""

    def __init__(
        self, runs: pd.DataFrame, options: pd.DataFrame, counts: Floats, best: Mapping[str, Any], target: float | None,
        x: str,
    ) -> None:  # fmt: skip
        names = [c.name for c in Features.of(runs).columns if not _spends(c.name, c.aliases)]
        levels = [(n, v) for n in names for v in sorted(set(map(level_of, runs[n].dropna())), key=str)[1:]]
        centre = float(np.log(numbers_of(runs, x)).mean())

        def design(rows: pd.DataFrame) -> Floats:
            shifts = [[float(level_of(v) == level) for v in rows[n]] for n, level in levels]
            return np.column_stack([np.ones(len(rows)), np.log(numbers_of(rows, x)) - centre, *shifts])

        X, y = design(runs), np.log(numbers_of(runs, "aa_acc"))
        self.information = X.T @ X + RIDGE * np.eye(X.shape[1])
        beta = np.linalg.solve(self.information, X.T @ y)
        self.freedom = len(y) - int(np.linalg.matrix_rank(X))
        self.sd = float(np.sqrt(((y - X @ beta) ** 2).sum() / max(self.freedom, 1)))
        self.rows, self.counts = design(options), counts.copy()
        self.noise = _noise_share(runs, 100 * self.sd)
        shift = np.array([float(best.get(n) == level) for n, level in levels])
        self.c = np.zeros(X.shape[1])
        self.c[1] = 1.0
        self.scale = 1.0
        if target is not None:
            slope = max(float(beta[1]), 1e-3)
            at = (math.log(target) - float(beta[0]) - float(shift @ beta[2:])) / slope
            self.c = np.concatenate([[1.0, at], shift]) / slope
            self.scale = 1 / math.log(10)

    def _added(self, i: int, survive: float) -> float:
        return _weight(self.counts[i] + survive, self.noise) - _weight(self.counts[i], self.noise)

    def gains(self, survive: Floats) -> Floats:
        """By how much each run lowers the variance of c, in units of the residual variance, (n,)."""
        doubt = np.linalg.inv(self.information)
        spread = np.einsum("ij,jk,ik->i", self.rows, doubt, self.rows)
        weight = np.array([self._added(i, p) for i, p in enumerate(survive)])
        return np.asarray(weight * (self.rows @ doubt @ self.c) ** 2 / (1 + weight * spread))

    def add(self, i: int, survive: float) -> None:
        self.information = self.information + self._added(i, survive) * np.outer(self.rows[i], self.rows[i])
        self.freedom += self.counts[i] == 0
        self.counts[i] += survive

    def half(self) -> float:
        from scipy.special import stdtrit

        variance = float(self.c @ np.linalg.solve(self.information, self.c))
        return float(stdtrit(max(self.freedom, 1), (1 + LEVEL) / 2)) * self.sd * math.sqrt(variance) * self.scale


class _Pairs:
    """Matched pairs of a choice's first and last level; a run's group is what it has of all other choices."""

    def __init__(self, runs: pd.DataFrame, options: pd.DataFrame, name: str) -> None:
        features = Features.of(runs)
        own = features.named(name)
        levels = sorted(set(map(level_of, runs[own.name].dropna())))
        self.ends = levels[0], levels[-1]
        others = [c.name for c in features.columns if c.name != own.name]
        self.groups = [tuple(map(str, row)) for row in options[others].itertuples(index=False)]
        self.sides = [self._side(level_of(v)) for v in options[own.name]]
        self.counts: dict[tuple[str, ...], list[float]] = {group: [0.0, 0.0] for group in self.groups}
        accuracy: dict[tuple[str, ...], list[list[float]]] = {}
        values = zip(runs[others].itertuples(index=False), runs[own.name], numbers_of(runs, "aa_acc"), strict=True)
        for row, level, y in values:
            group, side = tuple(map(str, row)), self._side(level_of(level))
            if side is not None:
                self.counts.setdefault(group, [0.0, 0.0])[side] += 1
                accuracy.setdefault(group, [[], []])[side].append(float(y))
        gains = [np.mean(b) - np.mean(a) for a, b in accuracy.values() if a and b]
        if len(gains) < 2:
            raise InputError(
                f"{column(name).phrase}: {len(gains)} matched pairs say nothing of its scatter (2 or more)"
            )
        self.sd = float(np.std(gains, ddof=1)) / math.sqrt(2)  # of one run
        self.freedom = len(gains) - 1
        self.noise = _noise_share(runs, self.sd)

    def _side(self, level: Any) -> int | None:
        return self.ends.index(level) if level in self.ends else None

    def _told(self, counts: Sequence[float]) -> float:
        n, m = (_weight(count, self.noise) for count in counts)
        return n * m / (n + m) if n and m else 0.0

    def _information(self) -> float:
        return sum(self._told(counts) for counts in self.counts.values())

    def gains(self, survive: Floats) -> Floats:
        now, out = self._information(), np.zeros(len(self.groups))
        for i, (group, side) in enumerate(zip(self.groups, self.sides, strict=True)):
            if side is not None:
                after = list(self.counts[group])
                after[side] += survive[i]
                # The first run of a group is worth half of the pair that it begins.
                out[i] = self._told(after) - self._told(self.counts[group]) if all(after) else survive[i] / 4
        return out / max(now, 1e-9) ** 2

    def add(self, i: int, survive: float) -> None:
        side = self.sides[i]
        if side is not None:
            self.counts[self.groups[i]][side] += survive

    def half(self) -> float:
        from scipy.special import stdtrit

        information = self._information()
        if not information:
            return math.nan
        return float(stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.sd / math.sqrt(information)


def _noise_share(runs: pd.DataFrame, sd: float) -> float:
    """The share of a run's variance (sd in points, or in percent of itself) that is its evaluation's; all of it where
    the number of test images is unknown."""
    share = numbers_of(runs, "aa_acc") / 100
    images = numbers_of(runs, "n_eval") if "n_eval" in runs else np.full(len(runs), np.nan)
    noise = 100 * np.sqrt(share * (1 - share) / images)
    known_noise = noise[np.isfinite(noise)]
    return float(min(1.0, (known_noise**2).mean() / max(sd, 1e-9) ** 2)) if len(known_noise) else 1.0


def next_runs(
    table: pd.DataFrame, options: Sequence[Option], rows: pd.DataFrame, counted: str, n: int, *,
    question: str = EXPONENT, target: float | None = None, budget: float = math.inf, tried_only: bool = True,
    seed: int = 0,
) -> NextRuns:  # fmt: skip
    """The next `n` runs among `options` (with their `rows` of features) for `question`: `exponent`, `price` (of
    `target`) or a choice; their costs in `counted` together at most `budget`.

    Raises InputError for a question that is none, a price without a target, or too few runs to say.
    """
    if n < 1:
        raise InputError(f"next = {n} (allowed: 1 or more)")
    if question == PRICE and target is None:
        raise InputError("the price of which target? (add --target, e.g. --target 61)")
    kept = table[~failed_rows(table) & ~collapsed_rows(table) & ~standard_rows(table)]
    kept = kept[numbers_of(kept, "aa_acc") > 0]
    if len(kept) < 3:
        raise InputError(f"{len(kept)} surviving runs are too few to choose the next by (allowed: 3 or more)")
    best = {
        str(k): level_of(v) for k, v in kept.iloc[int(numbers_of(kept, "aa_acc").argmax())].items() if not pd.isna(v)
    }
    x = priced_in(table)
    found = allocation(table, best, counted if counted in COSTS else x)
    held = [(name, value) for name, value in (found.held if found else ()) if name != question]
    fits = np.array([not (tried_only and o.untried) and known(o.costs[counted]) for o in options])
    if "loss" in rows:
        fits &= (rows["loss"] != "standard").to_numpy()
    for name, value in held:
        kept = kept[[level_of(v) == value for v in kept[name]]]
        fits &= np.array([level_of(v) == value for v in rows[name]])
    chosen = np.flatnonzero(fits)
    if not len(chosen):
        raise InputError("no recipe at tried levels is left to run")
    pool, picked = rows.iloc[chosen].reset_index(drop=True), [options[int(i)] for i in chosen]
    pool = pool.assign(**{x: [o.costs.get(x, math.nan) for o in picked]})
    cost, survive = (np.array(v) for v in zip(*[(o.costs[counted], 1 - o.p_collapse) for o in picked], strict=True))

    counts = np.array([float(len(o.measured.run_ids)) if o.measured else 0.0 for o in picked])

    def start() -> _Regression | _Pairs:
        if question in (EXPONENT, PRICE):
            return _Regression(kept, pool, counts, best, target if question == PRICE else None, x)
        names = [c.name for c in Features.of(kept).columns]
        if question not in names:
            raise unknown("question", question, [EXPONENT, PRICE, *names])
        return _Pairs(kept, pool, question)

    def spend(order: str, money: float, most: int, draw: int = 0) -> tuple[list[tuple[int, float]], float]:
        """The runs made, each with the half width after it, and the half width at the end."""
        model, left = start(), money
        out: list[tuple[int, float]] = []
        rng, tries = np.random.default_rng((seed, draw)), np.zeros(len(cost))
        while len(out) < most:
            affordable = cost <= left * (1 + 1e-9)
            if not affordable.any():
                break
            if order == "design":
                score = np.where(affordable, model.gains(survive) / cost, -1.0)
            elif order == "cheapest":
                score = np.where(affordable, -cost * (1 + tries), -np.inf)
            else:
                score = np.where(affordable, rng.random(len(cost)), -1.0)
            i = int(np.argmax(score))
            model.add(i, float(survive[i]))
            tries[i] += 1
            left -= float(cost[i])
            out.append((i, model.half()))
        return out, model.half()

    now = start().half()
    made, _ = spend("design", budget, n)
    total = float(sum(cost[i] for i, _ in made))
    drawn = [spend("random", total, 10 * n, draw)[1] for draw in range(RANDOM_DRAWS)] if made else [math.nan]
    cheapest = spend("cheapest", total, 10 * n)[1] if made else math.nan
    names = {EXPONENT: "the exponent of accuracy over compute", PRICE: f"the price of {target or 0:g}%"}
    text = names.get(question, f"the effect of {column(question).phrase}")
    runs = tuple(NextRun(picked[i], picked[i].measured is not None, half) for i, half in made)
    return NextRuns(text, counted, runs, now, total, float(np.mean(drawn)), cheapest, float(cost.min()), len(kept))


def _spends(name: str, aliases: Sequence[str]) -> bool:
    return column(name).spends or any(column(alias).spends for alias in aliases)
