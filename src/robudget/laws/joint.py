"""Laws in several quantities at once: how robustness splits between parameters, data and the quality of the data.

The form is Bartoldson 2024's (arXiv 2404.09349): an adversarial loss L = A/N^a + B·g^b/D^d + Q·g^q in the parameters N,
the training images D and the quality g of the data, and an accuracy linear in it. Their published numbers are
`BARTOLDSON`; `fit_joint` fits the same form, with attack steps and a quality that adds, to a table of one's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import brentq, least_squares, minimize_scalar

from robudget.errors import InputError
from robudget.files import fields
from robudget.tables.read import as_table
from robudget.tables.usable import Floats, check_not_tied, is_accuracy, is_percent, numbers_of, points

STARTS = ((0.1, 0.1), (0.3, 0.3), (0.5, 0.2), (0.2, 0.5), (1.0, 1.0))
LEVEL = 0.95
LARGEST_EXPONENT = 5.0
RESAMPLE_STEPS = 40  # of the fit to a bootstrap table, from the law itself: the scatter of the runs hides more
HUBER_SDS = 1.345  # 95% efficient where the noise is normal (Huber 1981)
PROFILE_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the best N


@dataclass(frozen=True)
class Bartoldson:
    """The published law. Accuracy is the robust accuracy in percent against CW-PGD on CIFAR-10, L∞, 8/255.

    L = A/N^a + B·g^b/D^d + Q·g^q with g = (1 + FID)/2.65, accuracy = 100·(top − slope·L), FLOPs = per_sample·N·D (27
    forwards an image: TRADES with ten steps).
    """

    A: float = 6.687
    a: float = 0.2443
    B: float = 7.552
    b: float = -0.2768
    d: float = 0.2281
    Q: float = 0.5604
    q: float = 0.1555
    top: float = 1.2575
    slope: float = 0.7496
    per_sample: float = 7822.0

    def loss(self, parameters: ArrayLike, images: ArrayLike, fid: float) -> Floats:
        """The adversarial loss at N parameters and D training images of a generator with that FID."""
        g = _quality(fid)
        N, D = np.asarray(parameters, dtype=np.float64), np.asarray(images, dtype=np.float64)
        return np.asarray(self.A / N**self.a + self.B * g**self.b / D**self.d + self.Q * g**self.q)

    def accuracy(self, parameters: ArrayLike, images: ArrayLike, fid: float) -> Floats:
        """Robust accuracy in percent."""
        return np.asarray(100 * (self.top - self.slope * self.loss(parameters, images, fid)))

    def flops(self, parameters: ArrayLike, images: ArrayLike) -> Floats:
        """Training FLOPs."""
        return np.asarray(self.per_sample * np.asarray(parameters) * np.asarray(images))

    def optimum(self, flops: float, fid: float) -> tuple[float, float]:
        """Parameters and training images of the lowest loss for so many FLOPs: where the derivative along N·D = const
        is zero, N ∝ C^(d/(a+d)) and D ∝ C^(a/(a+d))."""
        if not flops > 0:
            raise InputError(f"flops = {flops} (allowed: more than 0)")
        product = flops / self.per_sample
        data = self.B * _quality(fid) ** self.b
        N = (self.a * self.A / (self.d * data)) ** (1 / (self.a + self.d)) * product ** (self.d / (self.a + self.d))
        return float(N), float(product / N)

    def best(self, flops: float, fid: float) -> float:
        """The best robust accuracy, in percent, that the budget buys."""
        return float(self.accuracy(*self.optimum(flops, fid), fid))

    def ceiling(self, fid: float) -> float:
        """Robust accuracy in percent at infinite parameters and data of that quality."""
        return float(100 * (self.top - self.slope * self.Q * _quality(fid) ** self.q))

    def cost_at(self, target: float, fid: float) -> float:
        """FLOPs of the cheapest way to `target` percent; inf at or above the ceiling."""
        if target >= self.ceiling(fid):
            return float("inf")
        low, high = 0.0, 80.0
        if self.best(10.0**low, fid) >= target:
            return float(10.0**low)
        if self.best(10.0**high, fid) < target:
            return float("inf")
        return float(10 ** brentq(lambda logs: self.best(10.0**logs, fid) - target, low, high, xtol=1e-12))


BARTOLDSON = Bartoldson()


def _quality(fid: float) -> float:
    if fid < 0:
        raise InputError(f"fid = {fid} (allowed: 0 or more)")
    return (1 + fid) / 2.65


@dataclass(frozen=True)
class Optimum:
    """The best split of a budget of training FLOP: N and D, and the predicted y. `profile` holds y along the budget
    (an isoFLOP profile, Hoffmann 2022): (N, D, y) at PROFILE_FACTORS of the best N."""

    flops: float
    n: float
    d: float
    y: float
    profile: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Joint:
    """y = E − A·N^−a − B·D^−d − S·K^−s + Q·g (a loss or an error: with every sign turned), fitted to all usable runs.

    N = `n_column`, D = `d_column`; K = `k_column` are attack steps and g = `g_column` is a quality of the data, a flag
    or a number; each of the two only where it was asked for. `intervals` hold each parameter's bootstrap interval over
    runs, and `n_exponent`'s; `r2` and `rmse` (units of y) are in sample. `flops_per` is training FLOP per N·D·(K + 3/2)
    (per N·D without steps), the median over the runs, NaN where the table has no FLOP.
    """

    n_column: str
    d_column: str
    k_column: str | None
    g_column: str | None
    y: str
    params: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    level: float
    r2: float
    rmse: float
    n_runs: int
    converged: bool
    huber: bool
    falls: bool
    flops_per: float
    flops_range: tuple[float, float]
    k_typical: float
    warnings: tuple[str, ...]

    @property
    def n_exponent(self) -> float:
        """x in N ∝ FLOP^x along the best split, d/(a + d); D ∝ FLOP^(1 − x)."""
        return self.params["d"] / (self.params["a"] + self.params["d"])

    def predict(self, n: ArrayLike, d: ArrayLike, k: ArrayLike | None = None, g: ArrayLike = 0.0) -> Floats:
        """y at N, D, K (default: the median of the runs) and g."""
        p = self.params
        N, D = np.asarray(n, dtype=np.float64), np.asarray(d, dtype=np.float64)
        value = p["E"] - p["A"] * N ** -p["a"] - p["B"] * D ** -p["d"]
        if self.k_column:
            value = value - p["S"] * np.asarray(self.k_typical if k is None else k, dtype=np.float64) ** -p["s"]
        if self.g_column:
            value = value + p["Q"] * np.asarray(g, dtype=np.float64)
        return np.asarray(-value if self.falls else value)

    def split(self, product: float) -> tuple[float, float]:
        """The N and D with N·D = `product` of the best prediction: how to split a budget that buys N·D."""
        sign = -1.0 if self.falls else 1.0
        best = minimize_scalar(
            lambda log_n: -sign * float(self.predict(np.exp(log_n), product / np.exp(log_n))),
            bounds=(0.0, float(np.log(product))), method="bounded", options={"xatol": 1e-10},
        )  # fmt: skip
        N = float(np.exp(best.x))
        return N, product / N

    def optimum(self, flops: float, k: float | None = None, g: float = 0.0) -> Optimum:
        """The best split of so many training FLOP at K steps. Raises InputError where the table has no FLOP."""
        if not np.isfinite(self.flops_per):
            raise InputError("the table knows the training FLOP of no run: a budget of FLOP cannot be split")
        steps = self.k_typical if k is None else k
        product = flops / (self.flops_per * (steps + 1.5 if self.k_column else 1.0))
        N, D = self.split(product)
        profile = tuple((N * f, D / f, float(self.predict(N * f, D / f, steps, g))) for f in PROFILE_FACTORS)
        return Optimum(flops, N, D, float(self.predict(N, D, steps, g)), profile)

    def optima(self) -> tuple[Optimum, ...]:
        """Budgets from the cheapest run's FLOP to ten times the costliest's, a decade apart; none without FLOP."""
        if not np.isfinite(self.flops_per):
            return ()
        low, high = self.flops_range
        n = max(2, int(np.ceil(np.log10(high / low))) + 1)
        return tuple(self.optimum(float(flops)) for flops in [*np.geomspace(low, high, n), 10 * high])

    def sentence(self) -> str:
        """The split in a sentence with its interval."""
        low, high = self.intervals.get("n_exponent", (float("nan"), float("nan")))
        return (
            f"By {self.n_runs} runs, a budget of FLOP is best split so that {self.n_column} grow as FLOP^"
            f"{self.n_exponent:.2f} [{low:.2f}, {high:.2f}] and {self.d_column} as FLOP^{1 - self.n_exponent:.2f} "
            f"[{1 - high:.2f}, {1 - low:.2f}]; the law misses {self.y} by {self.rmse:.2g} in sample (R² {self.r2:.2f})."
        )

    def to_dict(self) -> dict[str, Any]:
        return fields(self) | {
            "n_exponent": self.n_exponent, "sentence": self.sentence(), "optima": [fields(o) for o in self.optima()],
        }  # fmt: skip


def fit_joint(
    source: pd.DataFrame | str | Path,
    n: str = "parameters",
    d: str = "images_seen",
    y: str = "aa_acc",
    *,
    k: str | None = None,
    g: str | None = None,
    flops: str = "train_flops_exact",
    huber: bool = False,
    resamples: int = 200,
    level: float = LEVEL,
    seed: int = 0,
) -> Joint:
    """Fit the law of `Joint` to every usable run from several starts, by least squares or (`huber`) Huber's loss beyond
    HUBER_SDS robust standard deviations of a first fit, with percentile bootstrap intervals over runs.

    `k` names attack steps and `g` a quality of the data; y may be an accuracy, an error or a loss (what is no accuracy
    falls). Raises InputError where N, D or K has fewer than three levels (two do not determine a curve), g has one, or
    there are fewer runs than parameters.
    """
    frame = as_table(source)
    runs = points(frame, n, y)
    names = [name for name in (n, d, k) if name is not None]
    xs = [numbers_of(frame, name)[runs.rows] for name in names]
    quality = numbers_of(frame, g, "g")[runs.rows] if g else np.zeros(len(runs.y))
    keep = np.all([values > 0 for values in xs], axis=0) & ~np.isnan(quality)
    xs, quality, falls = [values[keep] for values in xs], quality[keep], not is_accuracy(y)
    goal = -runs.y[keep] if falls else runs.y[keep]
    for name, values in zip(names, xs, strict=True):
        if len(np.unique(values)) < 3:
            levels = len(np.unique(values))
            raise InputError(
                f"the runs have {levels} {'level' if levels == 1 else 'levels'} of {name}: a joint law needs 3 or more "
                f"of {' and of '.join(names)}, independent of each other (train recipes that differ in it)"
            )
    if g and len(np.unique(quality)) < 2:
        raise InputError(f"{g} has one level: its effect cannot be told")
    check_not_tied(y, goal)
    size = 1 + 2 * len(names) + bool(g)
    if len(goal) <= size:
        raise InputError(f"{len(goal)} runs cannot fix the {size} parameters of the joint law")
    scales = [float(np.exp(np.log(values).mean())) for values in xs]
    design = np.stack([*(np.log(v / scale) for v, scale in zip(xs, scales, strict=True)), quality], axis=1)
    top = 100.0 if is_percent(y) and not falls else 0.0
    theta, loss, converged = _fit(design, goal, STARTS, top, g is not None)
    width = np.inf
    if huber:
        residual = _residual(theta, design, goal)
        width = HUBER_SDS * max(1.4826 * float(np.median(np.abs(residual))), 1e-6)
        theta, _, converged = _fit(design, goal, STARTS, top, g is not None, width)
        loss = 0.5 * float((_residual(theta, design, goal) ** 2).sum())
    params = _natural(theta, scales, bool(k), bool(g))
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        rows = rng.integers(len(goal), size=len(goal))
        start = [tuple(theta[2 : 2 + 2 * len(names) : 2])]
        draw = _natural(_fit(design[rows], goal[rows], start, top, g is not None, width)[0], scales, bool(k), bool(g))
        draws.append(draw | {"n_exponent": draw["d"] / max(draw["a"] + draw["d"], 1e-12)})
    edge = (1 - level) / 2
    intervals = {}
    for name in draws[0] if draws else ():
        low, high = np.quantile([draw[name] for draw in draws], [edge, 1 - edge])
        intervals[name] = (float(low), float(high))
    total = float(((goal - goal.mean()) ** 2).sum())
    steps = xs[2] if k else np.zeros(len(goal))
    spent = numbers_of(frame, flops)[runs.rows][keep] if flops in frame.columns else np.full(len(goal), np.nan)
    each = spent / (xs[0] * xs[1] * (steps + 1.5 if k else 1.0))
    known = np.isfinite(each) & (each > 0)
    exponents = dict(zip("ads", names, strict=False))
    return Joint(
        n, d, k, g, y, params, intervals, level, 1 - 2 * loss / total if total else 0.0,
        float(np.sqrt(2 * loss / len(goal))), len(goal), converged, huber, falls,
        float(np.median(each[known])) if known.any() else float("nan"),
        (float(spent[known].min()), float(spent[known].max())) if known.any() else (float("nan"), float("nan")),
        float(np.median(steps)) if k else float("nan"),
        tuple(
            f"the exponent of {name} ran to its bound: the table does not determine it"
            for key, name in exponents.items() if params[key] > 0.99 * LARGEST_EXPONENT or params[key] < 1e-3
        ),
    )  # fmt: skip


def fit_table(source: pd.DataFrame | str | Path, y: str = "aa_acc", *, seed: int = 0) -> Joint:
    """`fit_joint` by Huber's loss with what the table can tell: attack steps where it has three levels of them, and
    synthetic data where some runs have it and some have not."""
    frame = as_table(source)
    used = frame.iloc[points(frame, "parameters", y).rows]
    steps = "steps" in used and (used["steps"] > 0).all() and used["steps"].nunique() >= 3
    synthetic = "synthetic" in used and used["synthetic"].nunique() == 2
    k, g = "steps" if steps else None, "synthetic" if synthetic else None
    return fit_joint(frame, y=y, k=k, g=g, huber=True, seed=seed)


def _residual(theta: Floats, design: Floats, y: Floats) -> Floats:
    """θ = (E, amplitude and exponent of every logarithm, effect of g); `design` (n, logarithms + 1)."""
    value = theta[0] - y
    for i in range((len(theta) - 1) // 2):
        value = value - theta[1 + 2 * i] * np.exp(-theta[2 + 2 * i] * design[:, i])
    return np.asarray(value + theta[-1] * design[:, -1] if len(theta) % 2 == 0 else value)


def _jacobian(theta: Floats, design: Floats, y: Floats) -> Floats:
    columns = [np.ones(len(y))]
    for i in range((len(theta) - 1) // 2):
        power = np.exp(-theta[2 + 2 * i] * design[:, i])
        columns += [-power, theta[1 + 2 * i] * design[:, i] * power]
    return np.stack([*columns, design[:, -1]] if len(theta) % 2 == 0 else columns, axis=1)


def _fit(
    design: Floats, y: Floats, starts: Any, top: float, quality: bool, width: float = np.inf
) -> tuple[Floats, float, bool]:
    """On centred logarithms; amplitudes ≥ 0, exponents from 0 to LARGEST_EXPONENT, E at most `top`; from pairs of
    exponents, the last also of K."""
    terms = design.shape[1] - 1
    best = None
    for exponents in starts:
        each = [*exponents, *[exponents[-1]] * (terms - len(exponents))]
        inside = [float(np.clip(v, 0.0, LARGEST_EXPONENT * 0.99)) for v in each]
        spread = max(float(np.ptp(y)), 1e-6)
        first = min(float(y.max()) + 0.1 * spread, top - 1e-3)
        begin = [first, *(v for e in inside for v in (min(1.0, spread), e)), *([0.0] if quality else [])]
        low = [-np.inf, *([0.0, 0.0] * terms), *([-np.inf] if quality else [])]
        high = [top, *([1e4, LARGEST_EXPONENT] * terms), *([np.inf] if quality else [])]
        scale = [10, *([1, 0.1] * terms), *([1] if quality else [])]
        solution = least_squares(
            _residual, begin, _jacobian, bounds=(low, high), x_scale=scale, args=(design, y),
            loss="huber" if np.isfinite(width) else "linear", f_scale=width if np.isfinite(width) else 1.0,
            max_nfev=RESAMPLE_STEPS if len(starts) == 1 else None, ftol=1e-5 if len(starts) == 1 else 1e-8,
        )  # fmt: skip
        if best is None or solution.cost < best.cost - 1e-12:
            best = solution
    assert best is not None
    return np.asarray(best.x), float(best.cost), bool(best.success)


def _natural(theta: Floats, scales: list[float], steps: bool, quality: bool) -> dict[str, float]:
    """The numbers of the formula: amplitudes at N = D = K = 1."""
    out = {"E": float(theta[0])}
    for i, (amplitude, exponent) in enumerate((("A", "a"), ("B", "d"), ("S", "s"))[: 3 if steps else 2]):
        power = float(theta[2 + 2 * i])
        out |= {amplitude: float(theta[1 + 2 * i]) * scales[i] ** power, exponent: power}
    return out | ({"Q": float(theta[-1])} if quality else {})
