"""The fitter: damped Gauss-Newton (Levenberg-Marquardt) over many problems at once, apart from any formula.

Bootstrapping refits a law thousands of times, so the solver takes a batch of problems and of starting points and steps
them all together; each keeps its own damping. It uses the forms' analytic gradients and no random numbers.
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

HUBER = 1e-3  # in ln y (Hoffmann 2022)
MOST_STEPS = 200
TINY = 1e-9  # relative fall of the loss in one step below which a problem has converged
FLOOR = 1e-6  # values below this are clipped before a logarithm, so that a bad trial step is expensive, not undefined


@dataclass(frozen=True)
class Solved:
    """θ (b, p), the loss (b,) (half the weighted sum of squares, or of Huber's function) and whether each converged."""

    theta: Floats
    loss: Floats
    converged: NDArray[np.bool_]


def solve(
    form: Form,
    shape: Shape,
    space: Space,
    u: Floats,
    y: Floats,
    weight: Floats,
    starts: Floats,
    steps: int = MOST_STEPS,
    tolerance: float = TINY,
) -> Solved:
    """Fit every problem from every start and keep each one's best.

    u, y, weight: (b, n), weight 0 hides a point; starts (s, p), or (b, s, p) for starts of their own.
    `space`: least squares on y (`linear`), on ln y (`log`), or Huber's loss on ln y (`huber`).
    """
    b, p = len(y), form.n_params
    starts = np.broadcast_to(starts, (b, *starts.shape[-2:]))
    s = starts.shape[1]
    theta = starts.reshape(b * s, p).copy()
    owner = np.repeat(np.arange(b), s)
    loss, converged = _descend(form, shape, space, u, y, weight, theta, owner, steps, tolerance)
    loss = np.where(np.isfinite(loss), loss, np.inf).reshape(b, s)
    best = loss.argmin(axis=1)
    rows = np.arange(b)
    return Solved(theta.reshape(b, s, p)[rows, best], loss[rows, best], converged.reshape(b, s)[rows, best])


def _descend(
    form: Form, shape: Shape, space: Space, u: Floats, y: Floats, weight: Floats, theta: Floats,
    owner: NDArray[np.int64], steps: int, tolerance: float,
) -> tuple[Floats, NDArray[np.bool_]]:  # fmt: skip
    """Levenberg-Marquardt in place on `theta` (r, p), row i solving problem owner[i]. Returns loss (r,), converged
    (r,).
    """
    r, p = theta.shape
    damping = np.full(r, 1e-3)
    converged = np.zeros(r, dtype=np.bool_)
    loss = np.empty(r)
    live = np.arange(r)
    residual, slope, loss = _evaluate(form, shape, space, u[owner], y[owner], weight[owner], theta)
    diagonal = np.arange(p)
    for _ in range(steps):
        if not len(live):
            break
        push = weight[owner[live]] * _robust(residual[live], space)
        weighted = slope[live] * push[..., None]
        normal = np.swapaxes(weighted, -1, -2) @ slope[live]
        gradient = np.einsum("rnp,rn->rp", weighted, residual[live])
        scale = normal[:, diagonal, diagonal]
        scale = np.maximum(scale, 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300)
        normal[:, diagonal, diagonal] += damping[live, None] * scale
        step = -np.linalg.solve(normal, gradient[..., None])[..., 0]
        step = np.clip(step, -5, 5)
        trial = theta[live] + step
        mine = owner[live]
        new_residual, new_slope, new_loss = _evaluate(form, shape, space, u[mine], y[mine], weight[mine], trial)
        better = new_loss < loss[live]  # NaN is not better
        fall = np.where(better, loss[live] - new_loss, 0.0)
        won = live[better]
        small = better & (fall <= tolerance * (new_loss + 1e-300))
        theta[won], loss[won] = trial[better], new_loss[better]
        residual[won], slope[won] = new_residual[better], new_slope[better]
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
        safe = np.maximum(value, FLOOR)
        residual = np.log(safe) - np.log(np.maximum(y, FLOOR))
        gradient = np.where((value > FLOOR)[..., None], gradient / safe[..., None], 0.0)
    if space == "huber":
        size = np.abs(residual)
        each = np.where(size <= HUBER, 0.5 * residual**2, HUBER * (size - 0.5 * HUBER))
    else:
        each = 0.5 * residual**2
    return residual, gradient, (weight * each).sum(axis=-1)


def _robust(residual: Floats, space: Space) -> Floats:
    """Weights that turn least squares into Huber's loss at this residual."""
    if space != "huber":
        return np.ones_like(residual)
    return HUBER / np.maximum(np.abs(residual), HUBER)
