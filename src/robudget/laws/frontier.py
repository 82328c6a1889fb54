"""A frontier without bins: what the best recipes reach, from every usable run and not only from the best of each bin.

It answers from the draws of `frontier_posterior`, every form's under both thoughts of the runs near the frontier: an
interval reaches over both, but for one that the runs rule out. Where they favour the second (OPEN), the frontier may
lie higher still: its band has no upper end then, and prices have no lower one.
`bench/laws.py frontier` measures the coverage of α, of the band and of prices; bench/RESULTS.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from robudget.columns import column
from robudget.errors import InputError
from robudget.files import fields
from robudget.formats import fixed, number
from robudget.laws.blocks import ndtr
from robudget.laws.frontier_posterior import CURVES, MOST_RUNS, Curve, Fit, fits_of, kept
from robudget.tables.usable import Counts, Floats, Points, is_error, is_percent, points

LEVEL = 0.95
FEWEST_RUNS, FEWEST_LEVELS = 4, 3
LEAST_VISIBLE = 0.4  # of the decades; of a shorter range the upper third is hidden, not a whole decade
LEAST_NOISE = 0.1  # points: standard deviation of an evaluation whose number of images is unknown
LEAST_FAMILY = 0.05  # weight below which a family of forms is ruled out
NEAR_OF_UNIFORM, NEAR_Z = 0.125, 1.645  # share of runs that near where inefficiencies are uniform; of a test at 5%
OPEN = 0.7  # weight of sparse runs near the frontier from which its level has no upper end
FEW_TO_TELL = 60  # runs, of which a lesser weight may not tell that hardly any is near (bench/RESULTS.md: gamma 3)


@dataclass(frozen=True)
class Test:
    """The frontier of the runs at or below `x_cut`, put to the test at the costliest run, `decades` beyond: what it
    predicts there (percent, with its interval) and what the frontier of all runs says there."""

    x_cut: float
    decades: float
    n_train: int
    predicted: float
    low: float
    high: float
    truth: float


@dataclass(frozen=True)
class Frontier:
    """What the best recipes reach, fitted to all usable runs of `points`; no bins.

    `alpha` and `alpha_interval` are those of its power form C·x^α; everything else is answered by all forms
    (`interval`). `test` is None where too few levels of x are left to hide any. `near` is the
    share of the runs that lie within a quarter of the median inefficiency of the frontier.
    """

    x: str
    y: str
    level: float
    n_runs: int
    alpha: float
    alpha_interval: tuple[float, float]
    weights: dict[str, float]
    near: float
    test: Test | None
    points: Points = field(repr=False)
    fits: tuple[Fit, ...] = field(repr=False)
    u_low: float = field(repr=False)  # ln x of the cheapest and of the costliest run
    u_high: float = field(repr=False)

    @property
    def alpha_sd(self) -> float:
        """The standard deviation of the exponent's draws."""
        power = [fit for fit in self.fits if fit.curve is self.fits[0].curve]
        a, b = (np.concatenate(part)[:, 0] for part in zip(*(fit.ends()[:2] for fit in power), strict=True))
        slopes, weights = np.log(b / a) / (self.u_high - self.u_low), _weights(power)
        return float(np.sqrt(weights @ (slopes - weights @ slopes) ** 2))

    @property
    def x_range(self) -> tuple[float, float]:
        return float(np.exp(self.u_low)), float(np.exp(self.u_high))

    @property
    def tested(self) -> float:
        """How many decades beyond its runs the frontier was put to the test; 0 where it was not."""
        return self.test.decades if self.test else 0.0

    @property
    def sparse(self) -> float:
        """The weight of the thought that hardly any run is near the frontier; beforehand a half."""
        return sum(fit.weight for fit in self.fits if fit.edge == "sparse")

    @property
    def open(self) -> bool:
        """Whether runs near the frontier are so few that it may lie higher than any form says: by the forms' own
        weights, or as fewer runs are within a quarter of the median inefficiency than even a uniform density has."""
        doubt = NEAR_Z * np.sqrt(NEAR_OF_UNIFORM * (1 - NEAR_OF_UNIFORM) / self.n_runs)
        return bool(self.sparse >= OPEN or self.near < NEAR_OF_UNIFORM - doubt)

    @property
    def families(self) -> dict[str, float]:
        """The weight of every family of forms."""
        out: dict[str, float] = {}
        for fit in self.fits:
            out[fit.curve.family] = out.get(fit.curve.family, 0.0) + fit.weight
        return out

    def values(self, x: ArrayLike) -> Floats:
        """The frontier at each x (n,) by every draw of every form, in the units of y: (draws, n)."""
        t = (np.log(np.atleast_1d(np.asarray(x, dtype=np.float64))) - self.u_low) / (self.u_high - self.u_low)
        accuracy = np.concatenate([np.clip(fit.curve.value(t, *fit.ends()), 0, 100) for fit in self.fits])
        return 100 - accuracy if is_error(self.y) else accuracy

    def interval(self, values: Floats, level: float | None = None) -> tuple[Floats, Floats, Floats]:
        """Low, median and high over the first axis of what every draw says (draws, …). The median is that of all draws
        by their weights; the ends are the outermost of those of every family and edge that is not ruled out (weight
        LEAST_FAMILY or more): which is the true one is not a matter of chance."""
        return _interval(values, self.fits, self.level if level is None else level)

    def predict(self, x: ArrayLike) -> Floats:
        """The median of the draws at each x, in the units of y. Same shape as x."""
        return self.interval(self.values(x))[1].reshape(np.shape(x))

    def band(self, x: ArrayLike, level: float | None = None) -> tuple[Floats, Floats]:
        """The frontier's interval at each x: (low, high), the shape of x; without an upper end (100; for an error, a
        lower one: 0) where it is `open`."""
        low, _, high = self.interval(self.values(x), level)
        if self.open:
            low, high = (np.zeros_like(low), high) if is_error(self.y) else (low, np.full_like(high, 100.0))
        return low.reshape(np.shape(x)), high.reshape(np.shape(x))

    def gain(self, factor: float = 10.0) -> tuple[float, float, float]:
        """Points of y that the last `factor` in x bought, up to the costliest run: value, low, high."""
        top = np.exp(self.u_high)
        values = self.values(np.array([top / factor, top]))
        low, middle, high = self.interval(values[:, 1] - values[:, 0])
        return float(middle), float(low), float(high)

    def costs(self, target: float) -> Floats:
        """The x at which every draw reaches `target` (units of y), at least the cheapest run's: (draws,), inf where it
        never does."""
        goal = 100 - target if is_error(self.y) else target
        out = []
        for fit in self.fits:
            a, b, k = fit.ends()
            t = np.where(a >= goal, 0.0, fit.curve.inverse(goal, a, b, k))[:, 0]
            with np.errstate(over="ignore"):
                out.append(np.exp(self.u_low + np.where(np.isnan(t), np.inf, t) * (self.u_high - self.u_low)))
        return np.concatenate(out)

    def share(self, of: NDArray[np.bool_]) -> float:
        """The share of the draws (draws,) for which something holds, by their forms' weights."""
        return float(_weights(self.fits)[of].sum())

    def inefficiency(self) -> Floats:
        """How far each usable run lies below the frontier, in points, as expected of its inefficiency given its
        accuracy (n,), in the order of `points`: the frontier less the run, where that is above the noise."""
        grid = np.linspace(self.u_low, self.u_high, 100)
        values = self.values(np.exp(grid))
        u = np.log(self.points.x)
        sign = -1.0 if is_error(self.y) else 1.0
        gap = sign * (np.interp(u, grid, self.interval(values)[1]) - self.points.y)
        spread = np.hypot(np.maximum(self.points.noise, LEAST_NOISE), np.interp(u, grid, values.std(axis=0)))
        z = gap / spread  # a normal cut off at 0
        return np.asarray(gap + spread * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) / np.maximum(ndtr(z), 1e-12))

    def sentence(self) -> str:
        """What the last tenfold of x bought, with its interval: the answer of `robudget fit`."""
        spent, bought = column(self.x), column(self.y)
        factor = 10.0 if self.u_high - self.u_low >= np.log(10) else float(np.exp(self.u_high - self.u_low))
        value, low, high = self.gain(factor)
        better = high < 0 if is_error(self.y) else low > 0
        worse = low > 0 if is_error(self.y) else high < 0
        times = "Ten times" if factor == 10 else f"{number(factor, 2)} times"
        doubt = "" if better else "; more compute went with less" if worse else "; no gain is not excluded"
        top = self.x_range[1]
        return (
            f"{times} the {spent.phrase} ({spent.write(top / factor)} to {spent.write(top)}) bought the best of these "
            f"{self.n_runs} runs {fixed(value, signed=True)} [{fixed(low, signed=True)}, {fixed(high, signed=True)}] "
            f"points of {bought.phrase}{doubt}."
        )

    def support(self) -> tuple[str, ...]:
        """What that stands on, a sentence each: the exponent, the forms' weights, and the test beyond the runs."""
        low, high = self.alpha_interval
        spent, goal = column(self.x), column(self.y)
        shares = ", ".join(f"{name} {weight:.2f}" for name, weight in self.families.items())
        alike = f", those that lie alike merged (of tables of more than {MOST_RUNS})" if self.n_runs > MOST_RUNS else ""
        out = [
            f"A frontier fitted to all {self.n_runs} runs, without bins{alike}: α = {number(self.alpha)} "
            f"({self.level:.0%}: {number(low, 2)} to {number(high, 2)}) as a power law; weights of forms: {shares}."
        ]
        if self.open:
            out.append(
                f"These runs may all lie well below the frontier (weight of hardly any near it: {self.sparse:.2f}, "
                f"beforehand 0.50; {self.near:.0%} of them are within a quarter of the median distance), which may "
                f"then be higher than these forms say: its level has no upper end here, and a price no lower one than "
                f"the cheapest run's cost."
            )
        elif self.sparse > 0.5 and self.n_runs <= FEW_TO_TELL:
            out.append(
                f"It may be that hardly any of these {self.n_runs} runs is near the frontier (weight of that: "
                f"{self.sparse:.2f}, beforehand 0.50), too few runs to tell: of simulated tables of {FEW_TO_TELL} such "
                f"runs, 95% intervals held the frontier at the costliest run in 83%, a price beyond it in 88%."
            )
        if self.test is None:
            return (*out, "No runs could be hidden to test it: nothing is known beyond the costliest run.")
        test = self.test
        out.append(
            f"Fitted to the {test.n_train} runs up to {spent.write(test.x_cut)} only, it predicts "
            f"{fixed(test.predicted)} [{fixed(test.low)}, {fixed(test.high)}] at {spent.write(self.x_range[1])}, "
            f"{test.decades:.1f} decades on; all runs give {goal.write(test.truth)}."
        )
        return tuple(out)

    def to_dict(self) -> dict[str, Any]:
        value, low, high = self.gain()
        more = {"sparse": self.sparse, "open": self.open}
        return fields(self) | more | {"gain_per_decade": [value, low, high], "x_range": list(self.x_range)}


def _weights(fits: Sequence[Fit]) -> Floats:
    """The weight of every draw, summing to 1."""
    weights = np.concatenate([np.full(len(fit.draws), fit.weight / len(fit.draws)) for fit in fits])
    return np.asarray(weights / weights.sum())


def _interval(values: Floats, fits: Sequence[Fit], level: float) -> tuple[Floats, Floats, Floats]:
    """As `Frontier.interval`, of some of its fits."""
    total = sum(fit.weight for fit in fits)
    weights, tail = _weights(fits), (1 - level) / 2
    (middle,) = _quantiles(values, weights, [0.5])
    lows, highs = [middle], [middle]
    for kind in dict.fromkeys((fit.curve.family, fit.edge) for fit in fits):
        own = [kind == (fit.curve.family, fit.edge) for fit in fits]
        if sum(fit.weight for fit, mine in zip(fits, own, strict=True) if mine) >= LEAST_FAMILY * total:
            drawn = np.repeat(own, [len(fit.draws) for fit in fits])
            low, high = _quantiles(values[drawn], weights[drawn] / weights[drawn].sum(), [tail, 1 - tail])
            lows.append(low)
            highs.append(high)
    return np.min(lows, axis=0), middle, np.max(highs, axis=0)


def _quantiles(values: Floats, weights: Floats, shares: list[float]) -> Floats:
    return np.asarray(np.quantile(values, shares, axis=0, weights=weights, method="inverted_cdf"))


def fit_frontier(
    source: pd.DataFrame | Points, x: str = "train_flops_exact", y: str = "aa_acc", *, level: float = LEVEL,
    seed: int = 0, test: bool = True, curves: Sequence[Curve] = CURVES,
) -> Frontier:  # fmt: skip
    """The frontier of a table's usable runs, or of runs already chosen. `test` hides the top decade of x (of a short
    range its upper third) and predicts it; `curves` are the forms, the power law first. Raises InputError where y is
    no percentage, for fewer than FEWEST_RUNS runs or a single level of x."""
    runs = source if isinstance(source, Points) else points(source, x, y)
    if not is_percent(runs.y_name):
        raise InputError(f"a frontier needs a percentage for y, not {runs.y_name!r}")
    if len(np.unique(runs.x)) < 2:
        raise InputError(
            f"all {len(runs.x)} runs have {runs.x_name} = {runs.x[0]:g}: a law needs at least two levels of it "
            "(train recipes of another size, length or step count)"
        )
    if len(runs.x) < FEWEST_RUNS:
        raise InputError(f"{len(runs.x)} runs cannot fix a frontier (allowed: {FEWEST_RUNS} or more)")
    rng = np.random.default_rng(seed)
    u, accuracy = np.log(runs.x), 100 - runs.y if is_error(runs.y_name) else runs.y
    noise = np.where(runs.noise > 0, np.maximum(runs.noise, LEAST_NOISE), LEAST_NOISE)
    chosen = (u - u.min()) / np.ptp(u), accuracy, noise
    fits = kept((*chosen, len(u), seed), curves, lambda: fits_of(*chosen, rng, curves))
    power = [fit for fit in fits if fit.curve is curves[0]]
    ends = [np.concatenate(part) for part in zip(*(fit.ends()[:2] for fit in power), strict=True)]
    low, middle, high = _interval(np.log(ends[1] / ends[0])[:, 0] / np.ptp(u), power, level)
    first, last = (_weights(power) @ end[:, 0] for end in ends)
    gap = curves[0].value(chosen[0], first, last, np.ones(1)) - chosen[1]
    out = Frontier(
        runs.x_name, runs.y_name, level, len(u), float(middle), (float(low), float(high)),
        {curve.name: sum(fit.weight for fit in fits if fit.curve is curve) for curve in curves},
        float((gap < np.median(gap) / 4).mean()), None, runs, fits, float(u.min()), float(u.max()),
    )  # fmt: skip
    return replace(out, test=_tested(out, seed)) if test else out


def _tested(whole: Frontier, seed: int) -> Test | None:
    runs = whole.points
    decades = (whole.u_high - whole.u_low) / np.log(10)
    cut = whole.x_range[1] / 10 ** (1.0 if decades >= 1 / (1 - LEAST_VISIBLE) else decades / 3)
    visible = runs.x <= cut * (1 + 1e-9)
    if len(np.unique(runs.x[visible])) < FEWEST_LEVELS or visible.sum() < FEWEST_RUNS or visible.all():
        return None
    n = int(visible.sum())
    part = Points(
        runs.x_name, runs.y_name, runs.x[visible], runs.y[visible], runs.rows[visible], runs.noise[visible],
        Counts(total=n, used=n),
    )  # fmt: skip
    cheaper = fit_frontier(part, level=whole.level, seed=seed, test=False)
    top = np.array([whole.x_range[1]])
    low, high = (float(v[0]) for v in cheaper.band(top))
    x_cut = float(part.x.max())
    return Test(x_cut, float(np.log10(top[0] / x_cut)), n, float(cheaper.predict(top)[0]), low, high,
                float(whole.predict(top)[0]))  # fmt: skip
