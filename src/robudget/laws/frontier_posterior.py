"""The posterior of a frontier: its forms, the density of the inefficiencies below it, and draws of both.

The model is a stochastic frontier (Aigner, Lovell & Schmidt 1977; Meeusen & van den Broeck 1977):

    accuracy = frontier(compute) − inefficiency + noise

with noise of the evaluation's finite test set, whose size is known (binomial), and inefficiencies ≥ 0 drawn from one
density for all runs: a mixture of an exponential, a half-normal (the two that they and their successors use), a
uniform and a rising part (gamma of shape 2, as Greene 1990: hardly any run is at the frontier). The mixture is ours:
where inefficiencies come in clusters or are uniform, either alone covers too little.

How many runs are near the frontier decides how far above the best of them it lies, and few runs do not say. So every
form is taken with two thoughts beforehand (EDGES): that runs crowd at the frontier, and that they are sparse there.

Where a density is positive at its edge, the usual normal theory of the maximum likelihood fails, and so does the
bootstrap; intervals of the posterior under flat priors keep their coverage (Hirano & Porter 2003, Econometrica 71(5);
Chernozhukov & Hong 2004, Econometrica 72(5)). The likelihood counts with a power below 1, less for few runs: a
posterior that is robust to a density that is not quite the true one (Holmes & Walker 2017; the powers are ours, from
tables of known truth). Each form's evidence gives its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.special import expit, logit

from robudget.cache import remembered
from robudget.laws.blocks import in_blocks, ndtr
from robudget.laws.importance_sampling import TINY, LogDensity, mode, sample, systematic
from robudget.laws.merged_runs import Runs, merged
from robudget.tables.usable import Floats

DRAWS = 1_000  # of the posterior, kept
LEAST_DRAWS = 200  # independent ones that those of merged runs are worth
# What decides these.
ROOMS = tuple(f"laws/{file}.py" for file in ("frontier_posterior", "importance_sampling", "blocks", "merged_runs"))
MOST_RUNS = 500  # of a larger table those that lie alike are merged
ROUGHLY = 300  # runs that the frontier is roughly fitted to before
PARAMETERS = 9  # of the form that has most
TRUST, LEAST_TRUST = 0.75, 0.3  # power of the likelihood; of few runs, TRUST times the share of freedom left
LEAST_WIDTH = 2.0  # points, of the uniform part
WIDTH_SPREAD = 0.3  # standard deviation of its ln beforehand
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


def kept(asked: Sequence[Any], curves: Sequence[Curve], compute: Callable[[], tuple[Fit, ...]]) -> tuple[Fit, ...]:
    """What `compute` says, from an earlier command where one asked the same: the sampling takes most of a fit."""
    named = {curve.name: curve for curve in curves}

    def numbers() -> dict[str, Any]:
        return {"fits": [vars(fit) | {"curve": fit.curve.name, "draws": fit.draws.tolist()} for fit in compute()]}

    kept = remembered("frontier", (*asked, list(named)), ROOMS, numbers)["fits"]
    return tuple(Fit(**one | {"curve": named[one["curve"]], "draws": np.array(one["draws"])}) for one in kept)


def fits_of(t: Floats, y: Floats, noise: Floats, rng: np.random.Generator, curves: Sequence[Curve]) -> tuple[Fit, ...]:
    """Every form's posterior, the straight forms' from one sample, and their weights: families count alike, and alike
    the forms within them, each times its evidence."""
    runs = _looked_at(Runs(t, y, noise), rng, curves[0])
    of_forms: list[Fit] = []
    for curve in curves:
        first = next((fit for fit in of_forms if not (fit.curve.bends or curve.bends)), None)
        of_forms.append(_posterior(curve, runs, rng) if first is None else _restated(first, curve, runs, rng))
    fits = [part for fit in of_forms for part in _by_edge(fit, rng)]
    families = [fit.curve.family for fit in fits]
    logs = np.array([fit.log_evidence - np.log(families.count(fit.curve.family)) for fit in fits])
    weights = np.exp(logs - logs.max())
    return tuple(replace(fit, weight=float(w)) for fit, w in zip(fits, weights / weights.sum(), strict=True))


def _looked_at(runs: Runs, rng: np.random.Generator, curve: Curve) -> Runs:
    """The runs, or of more than MOST_RUNS those that lie alike below a rough frontier merged."""
    if runs.n <= MOST_RUNS:
        return runs
    some = rng.choice(runs.n, ROUGHLY, replace=False)
    few = Runs(runs.t[some], runs.y[some], runs.noise[some])
    rough = mode(_log_density(curve, few), _start(curve, few))
    return merged(runs, curve.value(runs.t, rough[0], rough[1], np.ones(1)))


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


def _restated(fit: Fit, curve: Curve, runs: Runs, rng: np.random.Generator) -> Fit:
    """Another form's posterior by weighing the draws of one that is nearly the same within the runs."""
    logs = _log_likelihood(curve, fit.draws, *runs)
    logs = _trust(runs.n) * (logs - _log_likelihood(fit.curve, fit.draws, *runs))
    weight = np.exp(logs - logs.max())
    evidence = fit.log_evidence + float(np.log(weight.mean()) + logs.max())
    weight /= weight.sum()
    share = float(1 / (weight**2).sum()) / len(weight)
    return Fit(curve, "", evidence, fit.effective * share, 0.0, fit.draws[systematic(weight, len(weight), rng)])


@in_blocks
def _log_likelihood(curve: Curve, theta: Floats, t: Floats, y: Floats, noise: Floats, weight: Floats | None) -> Floats:
    """Of every row of θ (d, 8 or 9): (d,). `t`, `y`, `noise` and `weight` (n,) as in `Runs`."""
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
    logs = np.log((density + TINY) / noise)
    return np.asarray(logs.sum(axis=1) if weight is None else logs @ weight)


def _shares(theta: Floats) -> Floats:
    """Of the exponential, the half-normal and the uniform part: (3, d)."""
    odds = np.exp(np.clip(theta[:, 4:7].T, -30, 30))
    return np.asarray(np.stack([*odds, np.ones(len(theta))]) / (1 + odds.sum(axis=0)))


def _log_prior(curve: Curve, theta: Floats) -> Floats:
    """Flat in the frontier's two ends between 0 and 100; the rest broad: both sizes of inefficiency log-normal about 4
    points (a factor of e^1.5 either way), the four shares uniform on their simplex, k log-normal about 1.5. Where the
    uniform part ends has its prior in `_log_density`."""
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


def _posterior(curve: Curve, runs: Runs, rng: np.random.Generator) -> Fit:
    found = sample(
        _log_density(curve, runs), _start(curve, runs), DRAWS, rng, 0.0 if runs.weight is None else LEAST_DRAWS
    )
    return Fit(curve, "", found.log_integral, found.effective, 0.0, found.draws)


def _log_density(curve: Curve, runs: Runs) -> LogDensity:
    """Of the posterior, not normalised."""
    width = _start(curve, runs)[7]

    def log_density(theta: Floats) -> Floats:
        out: Floats = _log_prior(curve, theta) - 0.5 * ((theta[:, 7] - width) / WIDTH_SPREAD) ** 2
        good = np.isfinite(out)
        out[good] += _trust(runs.n) * _log_likelihood(curve, theta[good], *runs)
        return out

    return log_density


def _trust(runs: int) -> float:
    """The power of the likelihood, the same for all forms."""
    return max(TRUST * (1 - PARAMETERS / runs), LEAST_TRUST)


def _start(curve: Curve, runs: Runs) -> Floats:
    t, y = runs.t, runs.y
    low, high = t <= np.median(t), t >= np.median(t)
    ends = np.clip([y[low].max(), y[high].max()], 1.0, 99.0)
    gap = np.maximum(ends[0] + (ends[1] - ends[0]) * t - y, 0.0)
    widest = max(1.05 * float(gap.max()), LEAST_WIDTH)
    size = np.log(max(float(gap.mean() if runs.weight is None else np.average(gap, weights=runs.weight)), 0.2))
    start = [*ends, size, size, 0.0, 0.0, 0.0, np.log(widest)]
    return np.array([*start, 0.4] if curve.bends else start)
