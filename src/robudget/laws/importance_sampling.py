"""A sample of any density of a few numbers, and its integral, by adaptive multiple importance sampling.

Cornuet, Marin, Mira & Robert 2012 (Scandinavian Journal of Statistics 39(4)): every round draws from a mixture of
Student t kernels about points of the rounds before (Cappé, Guillin, Marin & Robert 2004), and all draws of all rounds
are weighed by the mixture of all proposals. Where the weights rest on few draws the kernels follow a tempered density.
By hand: scipy has no sampler of a density that is given by its values alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import gammaln

from robudget.tables.usable import Floats

ROUNDS, PER_ROUND = 20, 200
MOST_ROUNDS = 60  # where they are not worth as many independent draws as were asked for
FREEDOM = 8.0  # of Student's t
KERNELS, KERNEL_WIDTH = 60, 0.65  # centres that a round draws about, and how far, in standard deviations of the whole
MODE_STEPS = 50  # evaluations per dimension on the way to the mode
TINY = 1e-300

LogDensity = Callable[[Floats], Floats]  # (d, p) → (d,), not normalised; −inf where there is none


@dataclass(frozen=True)
class Sample:
    """`draws` (n, p) in random order, ln of the density's integral, and how many independent draws they are worth."""

    log_integral: float
    effective: float
    draws: Floats = field(repr=False)


def sample(log_density: LogDensity, start: Floats, n: int, rng: np.random.Generator, least: float = 0.0) -> Sample:
    """n draws of the density, whose mode is looked for from `start` (p,), by ROUNDS rounds, or as many more as make the
    draws worth `least` independent ones (MOST_ROUNDS at most)."""
    best = mode(log_density, start)
    p = len(best)
    centres, root = np.repeat(best[None], KERNELS, axis=0), np.asarray(np.diag(_widths(log_density, best)))
    draws, densities, sums = np.empty((0, p)), np.empty(0), np.empty(0)
    whiten, white, scale = np.empty((MOST_ROUNDS, p, p)), np.empty((MOST_ROUNDS, p + 2, KERNELS)), np.empty(MOST_ROUNDS)
    logs = np.empty(0)
    for i in range(MOST_ROUNDS):
        jump = rng.standard_normal((PER_ROUND, p)) / np.sqrt(rng.chisquare(FREEDOM, (PER_ROUND, 1)) / FREEDOM)
        new = centres[np.arange(PER_ROUND) % len(centres)] + jump @ root.T
        whiten[i] = np.linalg.inv(root).T
        white[i], scale[i] = _white(centres @ whiten[i]), _t_scale(root)
        of_new = _t_densities(new, whiten[: i + 1], white[: i + 1], scale[: i + 1]).sum(axis=0)
        sums = np.append(sums + _t_densities(draws, whiten[i : i + 1], white[i : i + 1], scale[i : i + 1])[0], of_new)
        draws, densities = np.vstack([draws, new]), np.append(densities, log_density(new))
        logs = densities - np.log(sums / (i + 1) + TINY)
        softer = _tempered(logs)
        off = draws - softer @ draws
        root = np.asarray(np.linalg.cholesky(KERNEL_WIDTH**2 * (off.T * softer) @ off + 1e-8 * np.eye(p)))
        centres = draws[systematic(softer, KERNELS, rng)]
        if i + 1 >= ROUNDS and _worth(_truncated(logs)) >= least:
            break
    weight = _truncated(logs)
    integral = float(np.log(weight.mean()) + logs.max())
    weight /= weight.sum()
    return Sample(integral, _worth(weight), rng.permutation(draws[systematic(weight, n, rng)]))


def _truncated(logs: Floats) -> Floats:
    """Weights, cut off (Ionides 2008): no draw decides alone."""
    weight = np.exp(logs - logs.max())
    return np.asarray(np.minimum(weight, weight.mean() * np.sqrt(len(weight))))


def _worth(weight: Floats) -> float:
    """How many independent draws weights are worth."""
    return float(weight.sum() ** 2 / (weight**2).sum())


def systematic(weight: Floats, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """n positions, each as often as its weight (summing to 1) says, but for a rounding."""
    places = np.searchsorted(np.cumsum(weight), (np.arange(n) + rng.random()) / n)
    return np.minimum(places, len(weight) - 1).astype(np.int64)


def mode(log_density: LogDensity, start: Floats) -> Floats:
    def loss(theta: Floats) -> float:
        return float(np.minimum(-log_density(theta[None])[0], 1e300))

    options = {"maxfev": MODE_STEPS * len(start), "xatol": 1e-2, "fatol": 1e-2}
    return np.asarray(minimize(loss, start, method="Nelder-Mead", options=options).x)  # type: ignore[call-overload]


def _widths(log_density: LogDensity, mode: Floats) -> Floats:
    """How far each coordinate goes from the mode before the density has fallen by e^−½: (p,)."""
    sizes = np.geomspace(1e-3, 10, 60)
    best = float(log_density(mode[None])[0])
    out = np.empty(len(mode))
    for i in range(len(mode)):
        steps = np.zeros((2 * len(sizes), len(mode)))
        steps[:, i] = np.concatenate([sizes, -sizes])
        fall = (best - log_density(mode + steps)).reshape(2, -1).min(axis=0)
        beyond = np.flatnonzero(fall > 0.5)
        out[i] = sizes[beyond[0]] if len(beyond) else sizes[-1]
    return out


def _tempered(logs: Floats) -> Floats:
    """Weights whose sample is worth KERNELS draws at least: of the highest power, at most 1, at which it is."""
    power = 1.0
    while True:
        weight = np.exp(power * (logs - logs.max()))
        weight /= weight.sum()
        if 1 / (weight**2).sum() >= KERNELS or power < 1e-3:
            return np.asarray(weight)
        power *= 0.8


def _t_scale(root: Floats) -> float:
    """The constant before the density of Student's t with the scale matrix root·rootᵀ."""
    p = len(root)
    constant = gammaln((FREEDOM + p) / 2) - gammaln(FREEDOM / 2) - 0.5 * p * np.log(FREEDOM * np.pi)
    return float(np.exp(constant - np.log(np.diag(root)).sum()))


def _white(centres: Floats) -> Floats:
    """Centres (m, p), as they go into `_t_densities`: (p + 2, m)."""
    return np.vstack([centres.T, (centres**2).sum(axis=1) / FREEDOM + 1, np.ones(len(centres))])


def _t_densities(x: Floats, whiten: Floats, white: Floats, scale: Floats) -> Floats:
    """Densities at each row of x (d, p) of k mixtures of Student t kernels, (k, d): `whiten` (k, p, p) takes x to where
    the scale matrix is the identity, and `white` (k, p + 2, m) are the centres there."""
    here = x @ whiten
    size = (here**2).sum(axis=2, keepdims=True) / FREEDOM
    # 1 + |x − centre|² / FREEDOM by one matrix product: passes over (k, d, m) numbers are what takes time here.
    kernel = np.concatenate([here * (-2 / FREEDOM), np.ones_like(size), size], axis=2) @ white
    np.power(kernel, -0.5 * (FREEDOM + x.shape[1]), out=kernel)
    return np.asarray(kernel.mean(axis=2) * scale[:, None])
