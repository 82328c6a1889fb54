"""Least squares over many problems at once: Levenberg-Marquardt (Marquardt 1963) in a batch, apart from any formula.

Bootstrapping refits a law thousands of times, so the fitter takes a batch of problems and of starting points and steps
them all together; each keeps its own damping. It uses the forms' analytic gradients and no random numbers.
`scipy.optimize.least_squares` is kept out: it takes one problem a call, hundreds of times slower for 2,000 resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from robudget.laws.forms import Form, Shape
from robudget.tables.usable import Floats

Space = Literal["linear", "log", "huber"]
SPACES: tuple[Space, ...] = get_args(Space)

HUBER_DELTA_LN = 1e-3  # in ln y (Hoffmann 2022)
MOST_STEPS = 200
TOLERANCE = 1e-9  # relative fall of the loss in one step below which a problem has converged
SMALLEST = 1e-6  # values are clipped here before a logarithm, so that a bad trial step is expensive, not undefined


@dataclass(frozen=True)
class Solution:
    """θ (b, p), the loss (b,) (half the weighted sum of squares, or of Huber's function) and whether each converged."""

    theta: Floats
    loss: Floats
    converged: NDArray[np.bool_]


def levenberg_marquardt(
    form: Form,
    shape: Shape,
    space: Space,
    u: Floats,
    y: Floats,
    weight: Floats,
    starts: Floats,
    steps: int = MOST_STEPS,
    tolerance: float = TOLERANCE,
) -> Solution:
    """Fit every problem from every start and keep each one's best.

    u, y, weight: (b, n), weight 0 hides a point; starts (s, p), or (b, s, p) for starts of their own.
    `space`: least squares on y (`linear`), on ln y (`log`), or Huber's loss on ln y (`huber`).
    """
    b, p = len(y), form.n_params
    starts = np.broadcast_to(starts, (b, *starts.shape[-2:]))
    s = starts.shape[1]
    theta = starts.reshape(b * s, p).copy()
    problem = np.repeat(np.arange(b), s)
    loss, converged = _descend(form, shape, space, u, y, weight, theta, problem, steps, tolerance)
    loss = np.where(np.isfinite(loss), loss, np.inf).reshape(b, s)
    best = np.arange(b), loss.argmin(axis=1)
    return Solution(theta.reshape(b, s, p)[best], loss[best], converged.reshape(b, s)[best])


def _descend(
    form: Form, shape: Shape, space: Space, u: Floats, y: Floats, weight: Floats, theta: Floats,
    problem: NDArray[np.int64], steps: int, tolerance: float,
) -> tuple[Floats, NDArray[np.bool_]]:  # fmt: skip
    """Levenberg-Marquardt in place on `theta` (r, p), row i solving problem problem[i]. Returns loss (r,), converged
    (r,).
    """
    r, p = theta.shape
    damping = np.full(r, 1e-3)
    converged = np.zeros(r, dtype=np.bool_)
    loss = np.empty(r)
    live = np.arange(r)
    residual, slope, loss = _evaluate(form, shape, space, u[problem], y[problem], weight[problem], theta)
    diagonal = np.arange(p)
    for _ in range(steps):
        if not len(live):
            break
        huber = weight[problem[live]] * _huber_weight(residual[live], space)
        weighted = slope[live] * huber[..., None]
        normal = np.swapaxes(weighted, -1, -2) @ slope[live]
        gradient = np.einsum("rnp,rn->rp", weighted, residual[live])
        scale = normal[:, diagonal, diagonal]
        scale = np.maximum(scale, 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300)
        normal[:, diagonal, diagonal] += damping[live, None] * scale
        step = -np.linalg.solve(normal, gradient[..., None])[..., 0]
        step = np.clip(step, -5, 5)
        trial = theta[live] + step
        of = problem[live]
        new_residual, new_slope, new_loss = _evaluate(form, shape, space, u[of], y[of], weight[of], trial)
        better = new_loss < loss[live]  # NaN is not better
        fall = np.where(better, loss[live] - new_loss, 0.0)
        improved = live[better]
        small = better & (fall <= tolerance * (new_loss + 1e-300))
        theta[improved], loss[improved] = trial[better], new_loss[better]
        residual[improved], slope[improved] = new_residual[better], new_slope[better]
        damping[live] = np.where(better, damping[live] * 0.3, damping[live] * 4)
        stuck = ~better & (damping[live] > 1e8)
        done = small | stuck | (loss[live] <= 1e-22)
        converged[live[done]] = True
        live = live[~done]
    return loss, converged


def _evaluate(
    form: Form, shape: Shape, space: Space, u: Floats, y: Floats, weight: Floats, theta: Floats
) -> tuple[Floats, Floats, Floats]:
    """Residuals (r, n), their gradients (r, n, p) and the loss (r,)."""
    value, gradient = form.value(theta, u, shape)
    if space == "linear":
        residual = value - y
    else:
        safe = np.maximum(value, SMALLEST)
        residual = np.log(safe) - np.log(np.maximum(y, SMALLEST))
        gradient = np.where((value > SMALLEST)[..., None], gradient / safe[..., None], 0.0)
    if space == "huber":
        size = np.abs(residual)
        each = np.where(size <= HUBER_DELTA_LN, 0.5 * residual**2, HUBER_DELTA_LN * (size - 0.5 * HUBER_DELTA_LN))
    else:
        each = 0.5 * residual**2
    return residual, gradient, (weight * each).sum(axis=-1)


def _huber_weight(residual: Floats, space: Space) -> Floats:
    """Weights that turn least squares into Huber's loss at this residual."""
    if space != "huber":
        return np.ones_like(residual)
    return HUBER_DELTA_LN / np.maximum(np.abs(residual), HUBER_DELTA_LN)


def r_squared(residual: Floats, y: Floats) -> float:
    """The share of the variance of y (n,) that leaves `residual` (n,): 1 − Σr² / Σ(y − ȳ)²; NaN where y is constant."""
    total = float(((y - y.mean()) ** 2).sum())
    return 1 - float((residual**2).sum()) / total if total > 0 else float("nan")
