"""Laws in several quantities at once: how robustness splits between parameters, data and the quality of the data.

The form is Bartoldson 2024's (arXiv 2404.09349): an adversarial loss L = A/N^a + B·g^b/D^d + Q·g^q in the parameters N,
the training images D and the quality g of the data, and an accuracy linear in it. Their published numbers are
`BARTOLDSON`; `fit_joint` fits the same form without g to a table of one's own.
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
from robudget.tables.usable import Floats, numbers_of, points

STARTS = ((0.1, 0.1), (0.3, 0.3), (0.5, 0.2), (0.2, 0.5), (1.0, 1.0))
LEVEL = 0.95
LARGEST_EXPONENT = 5.0


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
class Joint:
    """accuracy = E − A·N^−a − B·D^−d in percent, with N = `n_column` and D = `d_column`, fitted to all usable runs.

    `intervals` hold each parameter's bootstrap interval over runs; `r2` and `rmse` (points) are in sample.
    """

    n_column: str
    d_column: str
    y: str
    params: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    level: float
    r2: float
    rmse: float
    n_runs: int
    converged: bool
    warnings: tuple[str, ...]

    def predict(self, n: ArrayLike, d: ArrayLike) -> Floats:
        """Accuracy in percent at N and D."""
        p = self.params
        N, D = np.asarray(n, dtype=np.float64), np.asarray(d, dtype=np.float64)
        return np.asarray(p["E"] - p["A"] * N ** -p["a"] - p["B"] * D ** -p["d"])

    def split(self, product: float) -> tuple[float, float]:
        """The N and D with N·D = `product` of the best predicted accuracy: how to split a budget that buys N·D."""
        best = minimize_scalar(
            lambda log_n: -float(self.predict(np.exp(log_n), product / np.exp(log_n))),
            bounds=(0.0, float(np.log(product))), method="bounded", options={"xatol": 1e-10},
        )  # fmt: skip
        N = float(np.exp(best.x))
        return N, product / N

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def fit_joint(
    source: pd.DataFrame | str | Path,
    n: str = "parameters",
    d: str = "images_seen",
    y: str = "aa_acc",
    *,
    resamples: int = 200,
    level: float = LEVEL,
    seed: int = 0,
) -> Joint:
    """Fit accuracy = E − A·N^−a − B·D^−d to every usable run by least squares, from several starts, with analytic
    gradients and percentile bootstrap intervals over runs. Raises InputError where N or D has fewer than three levels
    (two do not determine a curve) or there are fewer runs than parameters."""
    frame = as_table(source)
    runs = points(frame, n, y)
    D_all = numbers_of(frame, d, "d")[runs.rows]
    keep = D_all > 0
    N, D, accuracy = runs.x[keep], D_all[keep], runs.y[keep]
    for name, values in ((n, N), (d, D)):
        if len(np.unique(values)) < 3:
            raise InputError(f"{name} has {len(np.unique(values))} levels: a joint law needs at least 3 of N and of D")
    if len(accuracy) <= 5:
        raise InputError(f"{len(accuracy)} runs cannot fix the 5 parameters of the joint law")
    scale = (float(np.exp(np.log(N).mean())), float(np.exp(np.log(D).mean())))
    theta, loss, converged = _fit(np.log(N / scale[0]), np.log(D / scale[1]), accuracy, STARTS)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        rows = rng.integers(len(accuracy), size=len(accuracy))
        u, v = np.log(N[rows] / scale[0]), np.log(D[rows] / scale[1])
        draws.append(_natural(_fit(u, v, accuracy[rows], [tuple(theta[3:])])[0], scale))
    edge = (1 - level) / 2
    params = _natural(theta, scale)
    intervals = {
        name: tuple(float(q) for q in np.quantile([draw[name] for draw in draws], [edge, 1 - edge])) for name in params
    } if draws else {}  # fmt: skip
    total = float(((accuracy - accuracy.mean()) ** 2).sum())
    names = {"a": n, "d": d}
    return Joint(
        n, d, y, params, {k: (v[0], v[1]) for k, v in intervals.items()}, level, 1 - 2 * loss / total if total else 0.0,
        float(np.sqrt(2 * loss / len(accuracy))), len(accuracy), converged,
        tuple(
            f"the exponent of {names[key]} ran to its bound: the table does not determine it"
            for key in names if params[key] > 0.99 * LARGEST_EXPONENT or params[key] < 1e-3
        ),
    )  # fmt: skip


def _fit(u: Floats, v: Floats, y: Floats, starts: Any) -> tuple[Floats, float, bool]:
    """θ = (E, A, B, a, d) on centred logarithms; A, B ≥ 0 and 0 ≤ a, d ≤ LARGEST_EXPONENT; E at most 100."""

    def residual(theta: Floats) -> Floats:
        E, A, B, a, d = theta
        return np.asarray(E - A * np.exp(-a * u) - B * np.exp(-d * v) - y)

    def jacobian(theta: Floats) -> Floats:
        _, A, B, a, d = theta
        first, second = np.exp(-a * u), np.exp(-d * v)
        return np.stack([np.ones_like(u), -first, -second, A * u * first, B * v * second], axis=1)

    best = None
    for a, d in starts:
        begin = [
            min(float(y.max()) + 1, 99.9),
            1.0,
            1.0,
            min(a, LARGEST_EXPONENT * 0.99),
            min(d, LARGEST_EXPONENT * 0.99),
        ]
        low, high = [0.0, 0.0, 0.0, 0.0, 0.0], [100.0, 1e4, 1e4, LARGEST_EXPONENT, LARGEST_EXPONENT]
        solution = least_squares(residual, begin, jacobian, bounds=(low, high), x_scale=[10, 1, 1, 0.1, 0.1])
        if best is None or solution.cost < best.cost - 1e-12:
            best = solution
    assert best is not None
    return np.asarray(best.x), float(best.cost), bool(best.success)


def _natural(theta: Floats, scale: tuple[float, float]) -> dict[str, float]:
    E, A, B, a, d = (float(v) for v in theta)
    return {"E": E, "A": A * scale[0] ** a, "B": B * scale[1] ** d, "a": a, "d": d}
