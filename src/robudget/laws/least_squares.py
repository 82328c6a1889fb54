"""Least squares over many problems at once: Levenberg-Marquardt (Marquardt 1963) in a batch, apart from any formula.

Bootstrapping refits a law thousands of times, so the fitter takes a batch of problems and of starting points and steps
them all together; each keeps its own damping. It uses the forms' analytic gradients and no random numbers.
By hand: `scipy.optimize.least_squares` takes one problem a call, and 50 times as long for 2,000 resamples.
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
    all_theta = starts.reshape(b * s, p).copy()
    all_loss, all_converged = np.full(b * s, np.inf), np.zeros(b * s, dtype=np.bool_)

    # From here on one row is one problem from one start; rows that are done leave the arrays.
    row, theta = np.arange(b * s), all_theta.copy()
    u, y, weight = (np.repeat(values, s, axis=0) for values in (u, y, weight))
    damping = np.full(b * s, 1e-3)
    residual, slope, loss = _evaluate(form, shape, space, u, y, weight, theta)
    diagonal = np.arange(p)
    for _ in range(steps):
        weighted = slope * (weight * _huber_weight(residual, space))[..., None]
        normal = np.swapaxes(weighted, -1, -2) @ slope
        gradient = np.einsum("rnp,rn->rp", weighted, residual)
        scale = normal[:, diagonal, diagonal]
        scale = np.maximum(scale, 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300)
        normal[:, diagonal, diagonal] += damping[:, None] * scale
        step = np.clip(-_solved(normal, gradient), -5, 5)
        trial = theta + step
        new_residual, new_slope, new_loss = _evaluate(form, shape, space, u, y, weight, trial)
        better = new_loss < loss  # NaN is not better
        small = better & (loss - new_loss <= tolerance * (new_loss + 1e-300))
        theta[better], loss[better] = trial[better], new_loss[better]
        residual[better], slope[better] = new_residual[better], new_slope[better]
        damping *= np.where(better, 0.3, 4)
        done = small | (~better & (damping > 1e8)) | (loss <= 1e-22)
        if done.any():
            all_theta[row[done]], all_loss[row[done]], all_converged[row[done]] = theta[done], loss[done], True
            live = ~done
            if not live.any():
                break
            row, theta, loss, damping = row[live], theta[live], loss[live], damping[live]
            u, y, weight, residual, slope = u[live], y[live], weight[live], residual[live], slope[live]
    else:
        all_theta[row], all_loss[row] = theta, loss

    by_problem = np.where(np.isfinite(all_loss), all_loss, np.inf).reshape(b, s)
    best = np.arange(b), by_problem.argmin(axis=1)
    return Solution(all_theta.reshape(b, s, p)[best], by_problem[best], all_converged.reshape(b, s)[best])


def _solved(normal: Floats, gradient: Floats) -> Floats:
    """The solution of each of the normal equations (r, p, p), (r, p); the shortest one where some parameter changes
    nothing, as where all runs are tied."""
    try:
        return np.asarray(np.linalg.solve(normal, gradient[..., None])[..., 0])
    except np.linalg.LinAlgError:
        return np.asarray((np.linalg.pinv(normal, hermitian=True) @ gradient[..., None])[..., 0])


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
