"""A frontier without bins: what the best recipes reach, from every usable run and not only from the best of each bin.

The model is a stochastic frontier (Aigner, Lovell & Schmidt 1977; Meeusen & van den Broeck 1977):

    accuracy = frontier(compute) − inefficiency + noise

with noise of the evaluation's finite test set, whose size is known (binomial), and inefficiencies ≥ 0 drawn from one
density for all runs: a mixture of an exponential, a half-normal (the two that they and their successors use), a
uniform and a rising part (gamma of shape 2, as Greene 1990: hardly any run is at the frontier). The mixture is ours:
where inefficiencies come in clusters or are uniform, either alone covers too little.

How many runs are near the frontier decides how far above the best of them it lies, and few runs do not say. So every
form is taken with two thoughts beforehand (EDGES): that runs crowd at the frontier, and that they are sparse there; an
interval reaches over both, but for one that the runs rule out. Where they favour the second (OPEN), the
frontier may lie higher still: its band has no upper end then, and prices have no lower one.

Where a density is positive at its edge, the usual normal theory of the maximum likelihood fails, and so does the
bootstrap; intervals of the posterior under flat priors keep their coverage (Hirano & Porter 2003, Econometrica 71(5);
Chernozhukov & Hong 2004, Econometrica 72(5)). The likelihood counts with a power below 1, less for few runs: a
posterior that is robust to a density that is not quite the true one (Holmes & Walker 2017; the powers are ours, from
tables of known truth). Each form's evidence gives its weight.
`bench/laws.py frontier` measures the coverage of α, of the band and of prices; bench/RESULTS.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from robudget.cache import remembered
from robudget.columns import column
from robudget.errors import InputError
from robudget.files import fields
from robudget.formats import fixed, number
from robudget.laws.blocks import in_blocks, ndtr
from robudget.laws.importance_sampling import TINY, sample, systematic
from robudget.tables.usable import Counts, Floats, Points, is_error, is_percent, points

LEVEL = 0.95
DRAWS = 1_000  # of the posterior, kept
FEWEST_RUNS, FEWEST_LEVELS = 4, 3
LEAST_VISIBLE = 0.4  # of the decades; of a shorter range the upper third is hidden, not a whole decade
MOST_RUNS = 3_000  # runs of a larger table that are looked at, drawn at random
LEAST_NOISE = 0.1  # points: standard deviation of an evaluation whose number of images is unknown
PARAMETERS = 9  # of the form that has most
TRUST, LEAST_TRUST = 0.75, 0.3  # power of the likelihood; of few runs, TRUST times the share of freedom left
LEAST_FAMILY = 0.05  # weight below which a family of forms is ruled out
LEAST_WIDTH = 2.0  # points, of the uniform part
ROOMS = ("laws/frontier.py", "laws/importance_sampling.py", "laws/blocks.py")  # what decides the kept posteriors
WIDTH_SPREAD = 0.3  # standard deviation of its ln beforehand
NEAR_OF_UNIFORM, NEAR_Z = 0.125, 1.645  # share of runs that near where inefficiencies are uniform; of a test at 5%
OPEN = 0.7  # weight of sparse runs near the frontier from which its level has no upper end
CONVICTION = 4  # power of the share of the parts that a thought of EDGES expects
# What may be thought of the runs near the frontier: from the share of the rising part, that of the parts expected; and
# the mean of its power where all four shares are alike beforehand.
EDGES: dict[str, tuple[Callable[[Floats], Floats], float]] = {
    "crowded": (lambda rising: 1 - rising, 3 / (3 + CONVICTION)),
    "sparse": (lambda rising: rising, 6 / ((CONVICTION + 1) * (CONVICTION + 2) * (CONVICTION + 3))),
}
PHI_0 = float(1 / np.sqrt(2 * np.pi))
SHARPEST = 30.0  # of the exponential part, in its means in a standard deviation of the noise: sharper is the same
HALF_NORMAL = float(np.sqrt(2 / np.pi))


@dataclass(frozen=True)
class Curve:
    """A form of the frontier between its values `a` and `b` (percent) at the cheapest and the costliest run.

    `value(t, a, b, k)` and `inverse(y, a, b, k)` work on t, which is 0 and 1 there and linear in ln x; `k` is the bend
    of the forms that have one. `inverse` gives NaN where the curve never reaches y. Forms of one `family` say nearly
    the same within the runs and share one weight.
    """

    name: str
    family: str
    bends: bool
    value: Callable[[Floats, Floats, Floats, Floats], Floats]
    inverse: Callable[[float, Floats, Floats, Floats], Floats]


def _straight(to: Callable[[Any], Any], back: Callable[[Any], Any]) -> tuple[Any, Any]:
    """A straight line in ln x on another scale of the accuracy."""

    def value(t: Floats, a: Floats, b: Floats, k: Floats) -> Floats:
        first = to(a)
        return np.asarray(back(first + (to(b) - first) * t))

    def inverse(y: float, a: Floats, b: Floats, k: Floats) -> Floats:
        first = to(a)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(b > a, (to(y) - first) / (to(b) - first), np.nan))

    return value, inverse


def _saturating(t: Floats, a: Floats, b: Floats, k: Floats) -> Floats:
    return np.asarray(a + (b - a) * np.expm1(-k * t) / np.expm1(-k))


def _saturating_inverse(y: float, a: Floats, b: Floats, k: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (y - a) / (b - a) * -np.expm1(-k)
        return np.asarray(np.where((b > a) & (share < 1), -np.log1p(-np.minimum(share, 1.0)) / k, np.nan))


CURVES = (
    Curve("power", "power", False, *_straight(np.log, np.exp)),
    Curve("power on error", "power", False, *_straight(lambda y: -np.log(100 - y), lambda v: 100 - np.exp(-v))),
    Curve("power on logit", "power", False, *_straight(lambda y: logit(y / 100), lambda v: 100 * expit(v))),
    Curve("saturating", "saturating", True, _saturating, _saturating_inverse),
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """One form's posterior. `draws` (d, 8 or 9): a, b, ln of the scale of the exponential and the rising part and of
    the half-normal part, ln of the odds of these three's shares against the uniform part (exponential, half-normal,
    rising), ln of where the uniform part ends, and ln k where the form bends.

    `edge` is what was thought of the runs near the frontier beforehand (EDGES; empty: nothing), `effective` how many
    independent draws they are worth; `weight` the share of all forms and edges.
    """

    curve: Curve
    edge: str
    log_evidence: float
    effective: float
    weight: float
    draws: Floats = field(repr=False)

    def ends(self) -> tuple[Floats, Floats, Floats]:
        """a, b and k of the draws: (d, 1) each."""
        draws = self.draws
        k = np.exp(draws[:, 8, None]) if self.curve.bends else np.ones((len(draws), 1))
        return draws[:, 0, None], draws[:, 1, None], k


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
    (`interval`). `test` is None where too few levels of x are left to hide any. `n_fitted` is
    below the number of usable runs where a table is so large that a sample of it was looked at. `near` is the share of
    the runs that lie within a quarter of the median inefficiency of the frontier.
    """

    x: str
    y: str
    level: float
    n_runs: int
    n_fitted: int
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
        doubt = NEAR_Z * np.sqrt(NEAR_OF_UNIFORM * (1 - NEAR_OF_UNIFORM) / self.n_fitted)
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
        out = [
            f"A frontier fitted to all {self.n_runs} runs, without bins: α = {number(self.alpha)} "
            f"({self.level:.0%}: {number(low, 2)} to {number(high, 2)}) as a power law; weights of forms: {shares}."
        ]
        if self.open:
            out.append(
                f"These runs may all lie well below the frontier (weight of hardly any near it: {self.sparse:.2f}, "
                f"beforehand 0.50; {self.near:.0%} of them are within a quarter of the median distance), which may "
                f"then be higher than these forms say: its level has no upper end here, and a price no lower one than "
                f"the cheapest run's cost."
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
    rows = np.arange(len(u))
    if len(rows) > MOST_RUNS:
        rows = np.sort(rng.choice(rows, MOST_RUNS, replace=False))
    chosen = (u[rows] - u.min()) / np.ptp(u), accuracy[rows], noise[rows]
    fits = _kept((*chosen, len(u), seed), curves, lambda: _fits(*chosen, rng, curves))
    power = [fit for fit in fits if fit.curve is curves[0]]
    ends = [np.concatenate(part) for part in zip(*(fit.ends()[:2] for fit in power), strict=True)]
    low, middle, high = _interval(np.log(ends[1] / ends[0])[:, 0] / np.ptp(u), power, level)
    first, last = (_weights(power) @ end[:, 0] for end in ends)
    gap = curves[0].value(chosen[0], first, last, np.ones(1)) - chosen[1]
    out = Frontier(
        runs.x_name, runs.y_name, level, len(u), len(rows), float(middle), (float(low), float(high)),
        {curve.name: sum(fit.weight for fit in fits if fit.curve is curve) for curve in curves},
        float((gap < np.median(gap) / 4).mean()), None, runs, fits, float(u.min()), float(u.max()),
    )  # fmt: skip
    return replace(out, test=_tested(out, seed)) if test else out


def _kept(asked: Sequence[Any], curves: Sequence[Curve], compute: Callable[[], tuple[Fit, ...]]) -> tuple[Fit, ...]:
    """What `compute` says, from an earlier command where one asked the same: the sampling takes most of a fit."""
    named = {curve.name: curve for curve in curves}

    def numbers() -> dict[str, Any]:
        return {"fits": [vars(fit) | {"curve": fit.curve.name, "draws": fit.draws.tolist()} for fit in compute()]}

    kept = remembered("frontier", (*asked, list(named)), ROOMS, numbers)["fits"]
    return tuple(Fit(**one | {"curve": named[one["curve"]], "draws": np.array(one["draws"])}) for one in kept)


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


def _fits(t: Floats, y: Floats, noise: Floats, rng: np.random.Generator, curves: Sequence[Curve]) -> tuple[Fit, ...]:
    """Every form's posterior, the straight forms' from one sample, and their weights: families count alike, and alike
    the forms within them, each times its evidence."""
    of_forms: list[Fit] = []
    for curve in curves:
        first = next((fit for fit in of_forms if not (fit.curve.bends or curve.bends)), None)
        of_forms.append(
            _posterior(curve, t, y, noise, rng) if first is None else _restated(first, curve, t, y, noise, rng)
        )
    fits = [part for fit in of_forms for part in _by_edge(fit, rng)]
    families = [fit.curve.family for fit in fits]
    logs = np.array([fit.log_evidence - np.log(families.count(fit.curve.family)) for fit in fits])
    weights = np.exp(logs - logs.max())
    return tuple(replace(fit, weight=float(w)) for fit, w in zip(fits, weights / weights.sum(), strict=True))


def _by_edge(fit: Fit, rng: np.random.Generator) -> list[Fit]:
    """A form's posterior under either thought of the EDGES, by weighing its draws."""
    rising = _shares(fit.draws)[2]
    out = []
    for edge, (of, mean) in EDGES.items():
        weight = of(rising) ** CONVICTION / mean
        evidence = fit.log_evidence + float(np.log(weight.mean() + TINY))
        weight = (weight + TINY) / (weight + TINY).sum()
        share = float(1 / (weight**2).sum()) / len(weight)
        draws = fit.draws[systematic(weight, len(weight), rng)]
        out.append(replace(fit, edge=edge, log_evidence=evidence, effective=fit.effective * share, draws=draws))
    return out


def _restated(fit: Fit, curve: Curve, t: Floats, y: Floats, noise: Floats, rng: np.random.Generator) -> Fit:
    """Another form's posterior by weighing the draws of one that is nearly the same within the runs."""
    logs = _log_likelihood(curve, fit.draws, t, y, noise)
    logs = _trust(len(y)) * (logs - _log_likelihood(fit.curve, fit.draws, t, y, noise))
    weight = np.exp(logs - logs.max())
    evidence = fit.log_evidence + float(np.log(weight.mean()) + logs.max())
    weight /= weight.sum()
    share = float(1 / (weight**2).sum()) / len(weight)
    return Fit(curve, "", evidence, fit.effective * share, 0.0, fit.draws[systematic(weight, len(weight), rng)])


@in_blocks
def _log_likelihood(curve: Curve, theta: Floats, t: Floats, y: Floats, noise: Floats) -> Floats:
    """Of every row of θ (d, 8 or 9): (d,). `t`, `y` and `noise` (n,)."""
    a, b, log_mean, log_sigma = (theta[:, i, None] for i in range(4))
    share = _shares(theta)[..., None]
    k = np.exp(theta[:, 8, None]) if curve.bends else np.ones_like(a)
    gap = (curve.value(t, a, b, k) - y) / noise  # in standard deviations of the noise; above the frontier < 0
    sharp = np.minimum(noise / np.exp(log_mean), SHARPEST)
    away = gap - sharp
    with np.errstate(over="ignore"):
        exponential = np.exp(np.minimum(0.5 * sharp**2 - sharp * gap, 600)) * ndtr(away) * sharp
    rising = sharp * np.maximum(away * exponential + sharp * PHI_0 * np.exp(-0.5 * gap**2), 0.0)
    ratio = np.exp(log_sigma) / noise
    whole = np.sqrt(1 + ratio**2)
    half = np.exp(-0.5 * (gap / whole) ** 2) * ndtr(gap * ratio / whole) * (HALF_NORMAL / whole)
    wide = np.exp(theta[:, 7, None]) / noise
    uniform = np.maximum(ndtr(gap) - ndtr(gap - wide), 0.0) / wide
    density = share[0] * exponential + share[1] * half + share[2] * rising + share[3] * uniform
    return np.asarray(np.log((density + TINY) / noise).sum(axis=1))


def _shares(theta: Floats) -> Floats:
    """Of the exponential, the half-normal and the uniform part: (3, d)."""
    odds = np.exp(np.clip(theta[:, 4:7].T, -30, 30))
    return np.asarray(np.stack([*odds, np.ones(len(theta))]) / (1 + odds.sum(axis=0)))


def _log_prior(curve: Curve, theta: Floats) -> Floats:
    """Flat in the frontier's two ends between 0 and 100; the rest broad: both sizes of inefficiency log-normal about 4
    points (a factor of e^1.5 either way), the four shares uniform on their simplex, k log-normal about 1.5. Where the
    uniform part ends has its prior in `_posterior`."""
    a, b, log_mean, log_sigma = theta[:, :4].T
    inside = (a > 0) & (a < 100) & (b > 0) & (b < 100)
    log = -0.5 * ((log_mean - np.log(4)) / 1.5) ** 2 - 0.5 * ((log_sigma - np.log(4)) / 1.5) ** 2
    log = log + np.log(_shares(theta)).sum(axis=0)  # of the shares' odds: their simplex is flat
    if curve.bends:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            limit = a + (b - a) / -np.expm1(-np.exp(theta[:, 8]))
        inside &= limit <= 100
        log = log - 0.5 * (theta[:, 8] - 0.4) ** 2 - 0.5 * np.log(2 * np.pi)
    return np.where(inside, log, -np.inf)


def _posterior(curve: Curve, t: Floats, y: Floats, noise: Floats, rng: np.random.Generator) -> Fit:
    start = _start(curve, t, y)

    def log_density(theta: Floats) -> Floats:
        out: Floats = _log_prior(curve, theta) - 0.5 * ((theta[:, 7] - start[7]) / WIDTH_SPREAD) ** 2
        good = np.isfinite(out)
        out[good] += _trust(len(y)) * _log_likelihood(curve, theta[good], t, y, noise)
        return out

    found = sample(log_density, start, DRAWS, rng)
    return Fit(curve, "", found.log_integral, found.effective, 0.0, found.draws)


def _trust(runs: int) -> float:
    """The power of the likelihood, the same for all forms."""
    return max(TRUST * (1 - PARAMETERS / runs), LEAST_TRUST)


def _start(curve: Curve, t: Floats, y: Floats) -> Floats:
    low, high = t <= np.median(t), t >= np.median(t)
    ends = np.clip([y[low].max(), y[high].max()], 1.0, 99.0)
    gap = np.maximum(ends[0] + (ends[1] - ends[0]) * t - y, 0.0)
    widest = max(1.05 * float(gap.max()), LEAST_WIDTH)
    size = np.log(max(float(gap.mean()), 0.2))
    start = [*ends, size, size, 0.0, 0.0, 0.0, np.log(widest)]
    return np.array([*start, 0.4] if curve.bends else start)
