"""Formulae, apart from how they are fitted: each form is one row of functions with its analytic gradient.

Sources: `power` is the paper's; `saturating` is M2 and `m4` M4 of Alabdulmohsin 2022 (arXiv 2209.06640), `shifted` is
ours (M2 with a shift of x); `broken` is Caballero 2022 (arXiv 2210.14891) with one break.

Inside, a form works on u = ln(x / reference) and on unconstrained parameters θ, so that no bound needs watching while
fitting; `natural` turns θ into the numbers of the printed formula, in the units of x and y. All functions broadcast:
θ is (..., p), u is (..., n), values are (..., n) and gradients (..., n, p).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.optimize import elementwise
from scipy.special import expit

from robudget.errors import unknown
from robudget.tables.usable import Floats

FormName = Literal["power", "saturating", "shifted", "m4", "broken"]
FORMS: tuple[FormName, ...] = get_args(FormName)

BEND_WIDTH_LN = 0.25  # of a broken law, in ln x: the bend is over within about one octave either side
TOP_PERCENT = 100.0  # no accuracy is above
FARTHEST_LN = 115.0  # in u: fifty decades
LARGEST_LN = 150.0  # exponents are clipped here: a bad trial step must be expensive, not infinite
LARGEST_ALPHA = 5.0  # bound of the exponents that approach a ceiling: x^−5 is a step to any table of runs
LARGEST_GAMMA = 10.0  # bound of M4's γ


@dataclass(frozen=True)
class Shape:
    """What a form must know of its y: does it rise with x, is it a percentage (bounded by 0 and 100), and between which
    u (`low`, `high`) may a law bend?"""

    rising: bool
    percent: bool
    low: float = 0.0
    high: float = 0.0

    @property
    def sign(self) -> float:
        return 1.0 if self.rising else -1.0


@dataclass(frozen=True)
class Form:
    """`value(θ, u, shape) → (value, gradient)`, `natural(θ, reference, shape) → {name: value}`, multi-start points,
    and `inverse(θ (d, p), y, shape) → u (d,)`: where a law rising in x first reaches y (a falling one: falls to y),
    NaN where it never does or runs the other way.

    `exponent` and `coefficient` say which natural parameters are reported as alpha and C; `ceiling` (a floor, for an
    error) names the limit at infinite x where the form has one.
    """

    name: FormName
    formula: str
    names: tuple[str, ...]
    coefficient: str
    exponent: str
    ceiling: str | None
    bounds: dict[str, float]  # natural parameters that cannot exceed these
    value: Callable[[Floats, Floats, Shape], tuple[Floats, Floats]]
    natural: Callable[[Floats, float, Shape], dict[str, Floats]]
    starts: Callable[[Floats, Floats, Shape], Floats]  # (u (n,), y (n,)) → (starts, p)
    inverse: Callable[[Floats, float, Shape], Floats]

    @property
    def n_params(self) -> int:
        return len(self.names)


def form_named(name: str) -> Form:
    """The form of that name. Raises InputError with the nearest valid one."""
    if name not in _FORMS:
        raise unknown("form", name, FORMS)
    return _FORMS[name]


# -- power: y = C·x^α --------------------------------------------------------------------------------------------------


def _power(theta: Floats, u: Floats, shape: Shape) -> tuple[Floats, Floats]:
    value = np.exp(np.clip(theta[..., 0, None] + theta[..., 1, None] * u, -LARGEST_LN, LARGEST_LN))
    return value, np.stack([value, value * u], axis=-1)


def _power_inverse(theta: Floats, y: float, shape: Shape) -> Floats:
    slope = np.where(shape.sign * theta[:, 1] > 0, theta[:, 1], np.nan)
    return np.asarray((np.log(y) - theta[:, 0]) / slope) if y > 0 else np.full(len(theta), np.nan)


def _power_natural(theta: Floats, reference: float, shape: Shape) -> dict[str, Floats]:
    return {"C": np.exp(theta[..., 0] - theta[..., 1] * np.log(reference)), "alpha": theta[..., 1]}


def _power_starts(u: Floats, y: Floats, shape: Shape) -> Floats:
    slope, intercept = _line(u, np.log(np.maximum(y, 1e-12)))
    return np.array([[intercept, slope]])


# -- saturating: y = E − A·x^−α (an error: E + A·x^−α) -----------------------------------------------------------------


def _saturating(theta: Floats, u: Floats, shape: Shape) -> tuple[Floats, Floats]:
    limit, d_limit = _limit(theta[..., 0, None], shape)
    alpha, d_alpha = _bounded(theta[..., 2, None], LARGEST_ALPHA)
    gap = shape.sign * np.exp(np.clip(theta[..., 1, None] - alpha * u, -LARGEST_LN, LARGEST_LN))
    ones = np.ones_like(gap)
    return limit - gap, np.stack([d_limit * ones, -gap, gap * d_alpha * u], axis=-1)


def _saturating_inverse(theta: Floats, y: float, shape: Shape) -> Floats:
    gap = shape.sign * (_limit(theta[:, 0], shape)[0] - y)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(
            (theta[:, 1] - np.log(np.where(gap > 0, gap, np.nan))) / _bounded(theta[:, 2], LARGEST_ALPHA)[0]
        )


def _saturating_natural(theta: Floats, reference: float, shape: Shape) -> dict[str, Floats]:
    alpha = _bounded(theta[..., 2], LARGEST_ALPHA)[0]
    return {
        "E": _limit(theta[..., 0], shape)[0],
        "A": np.exp(np.clip(theta[..., 1] + alpha * np.log(reference), -700, 700)),
        "alpha": alpha,
    }


def _saturating_starts(u: Floats, y: Floats, shape: Shape) -> Floats:
    """For a few exponents, the straight line in x^−α gives the ceiling and the amplitude."""
    out = []
    for alpha in (0.05, 0.2, 0.5, 1.0, 2.0):
        slope, limit = _line(np.exp(-alpha * u), y)
        gap = max(-shape.sign * slope, 1e-3 * (np.ptp(y) + 1e-9))
        out.append([_unlimit(limit, y, shape), np.log(gap), _unbounded(alpha, LARGEST_ALPHA)])
    return np.array(out)


# -- shifted: y = E − A·(x + x0)^−α ------------------------------------------------------------------------------------


def _shifted(theta: Floats, u: Floats, shape: Shape) -> tuple[Floats, Floats]:
    limit, d_limit = _limit(theta[..., 0, None], shape)
    (alpha, d_alpha), shift = _bounded(theta[..., 2, None], LARGEST_ALPHA), theta[..., 3, None]
    v = np.logaddexp(u, shift)
    gap = shape.sign * np.exp(np.clip(theta[..., 1, None] - alpha * v, -LARGEST_LN, LARGEST_LN))
    weight = expit(shift - u)  # ∂v/∂shift
    ones = np.ones_like(gap)
    return limit - gap, np.stack([d_limit * ones, -gap, gap * d_alpha * v, gap * alpha * weight], axis=-1)


def _shifted_inverse(theta: Floats, y: float, shape: Shape) -> Floats:
    """Of v = ln(x + x0) first, then of x; a y that the law exceeds at x = 0 already gives −inf."""
    v = _saturating_inverse(theta, y, shape)
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.isnan(v), np.nan, v + np.log(np.maximum(-np.expm1(theta[:, 3] - v), 0.0)))


def _shifted_natural(theta: Floats, reference: float, shape: Shape) -> dict[str, Floats]:
    x0 = reference * np.exp(np.clip(theta[..., 3], -60, 60))
    return _saturating_natural(theta[..., :3], reference, shape) | {"x0": x0}


def _shifted_starts(u: Floats, y: Floats, shape: Shape) -> Floats:
    plain = _saturating_starts(u, y, shape)[[0, 2, 4]]
    shifts = (u.min() - 3.0, u.min())
    return np.array([[*start, shift] for start in plain for shift in shifts])


# -- M4 (Alabdulmohsin 2022, eq. 4): (ε − ε∞) / (ε0 − ε)^γ = β·x^−α on the error ε, ε0 = 100% -------------------------


def _m4(theta: Floats, u: Floats, shape: Shape) -> tuple[Floats, Floats]:
    """Solved for the error by bisection in its logit between ε∞ and ε0; the gradient follows from the implicit
    function.

    With ε = ε∞ + (ε0 − ε∞)·s the law reads ln s − γ·ln(1 − s) = b − α·u =: q, which rises in s from −∞ to ∞.
    θ = (ceiling of the accuracy, b, α, γ) with the last two bounded; γ → 0 is the saturating law.
    """
    ceiling, d_ceiling = _limit(theta[..., 0, None], Shape(True, True))
    alpha, d_alpha = _bounded(theta[..., 2, None], LARGEST_ALPHA)
    gamma, d_gamma = _bounded(theta[..., 3, None], LARGEST_GAMMA)
    q = theta[..., 1, None] - alpha * u
    # With z = logit(s) the left side is γ·softplus(z) − softplus(−z): smooth, with a slope between γ and 1, so that
    # Newton's method with steps of at most 4 always converges.
    z = np.where(q < 0, q, q / np.maximum(gamma, 1e-3))
    for _ in range(40):
        soft, s = _softplus(z)  # softplus(−z) = softplus(z) − z
        miss = z - soft + gamma * soft - q
        step = np.clip(miss / ((1 - s) + gamma * s), -4, 4)
        z = z - step
        if np.abs(step).max(initial=0.0) < 1e-6:  # the error is the square of the last step
            break
    soft, s = _softplus(z)
    rate = s * (1 - s) / ((1 - s) + gamma * s)  # ∂s/∂q
    by_gamma = -rate * soft * d_gamma  # the left side grows with γ by softplus(z)
    accuracy = ceiling * (1 - s)
    gradient = np.stack(
        [d_ceiling * (1 - s), -ceiling * rate, ceiling * rate * d_alpha * u, -ceiling * by_gamma], axis=-1
    )
    sign = shape.sign
    return (accuracy if shape.rising else TOP_PERCENT - accuracy), sign * gradient


def _softplus(z: Floats) -> tuple[Floats, Floats]:
    """ln(1 + e^z) and its slope, the logistic function; from one exponential, in a fifth of the time of numpy's
    `logaddexp` and scipy's `expit`."""
    small = np.exp(-np.abs(z))
    whole = 1 + small
    return np.maximum(z, 0) + np.log(whole), np.where(z > 0, 1.0, small) / whole


def _m4_inverse(theta: Floats, y: float, shape: Shape) -> Floats:
    ceiling = _limit(theta[:, 0], Shape(True, True))[0]
    share = 1 - (y if shape.rising else TOP_PERCENT - y) / ceiling  # of the error above its limit
    share = np.where((share > 0) & (share < 1), share, np.nan)
    alpha, gamma = _bounded(theta[:, 2], LARGEST_ALPHA)[0], _bounded(theta[:, 3], LARGEST_GAMMA)[0]
    with np.errstate(divide="ignore"):
        return np.asarray((theta[:, 1] - np.log(share) + gamma * np.log1p(-share)) / alpha)


def _m4_natural(theta: Floats, reference: float, shape: Shape) -> dict[str, Floats]:
    ceiling = _limit(theta[..., 0], Shape(True, True))[0]
    alpha, gamma = _bounded(theta[..., 2], LARGEST_ALPHA)[0], _bounded(theta[..., 3], LARGEST_GAMMA)[0]
    # ln s − γ ln(1−s) with ε − ε∞ = ceiling·s and ε0 − ε = ceiling·(1 − s)
    log_beta = theta[..., 1] + alpha * np.log(reference) + (1 - gamma) * np.log(ceiling)
    limit = ceiling if shape.rising else TOP_PERCENT - ceiling
    return {"E": limit, "A": np.exp(np.clip(log_beta, -700, 700)), "alpha": alpha, "gamma": gamma}


def _m4_starts(u: Floats, y: Floats, shape: Shape) -> Floats:
    accuracy = y if shape.rising else TOP_PERCENT - y
    out = []
    for margin in (1.01, 1.1):
        ceiling = min(accuracy.max() * margin, 99.9)
        s = np.clip(1 - accuracy / ceiling, 1e-4, 1 - 1e-4)
        for gamma in (0.05, 1.0):
            slope, b = _line(u, np.log(s) - gamma * np.log1p(-s))
            alpha = float(np.clip(-slope, 0.02, 3))
            out.append(
                [
                    _unlimit(ceiling, accuracy, Shape(True, True)),
                    b,
                    _unbounded(alpha, LARGEST_ALPHA),
                    _unbounded(gamma, LARGEST_GAMMA),
                ]
            )
    return np.array(out)


# -- broken: y = C·x^α up to the break xb, exponent alpha2 beyond (Caballero 2022, one break) -------------------------


def _broken(theta: Floats, u: Floats, shape: Shape) -> tuple[Floats, Floats]:
    """ln y = c + α·u + (α2 − α)·d·softplus((u − ub)/d); θ = (c, α, α2, ub in shape.low … high), d = BEND_WIDTH_LN."""
    c, first, second = (theta[..., i, None] for i in range(3))
    within, d_at = _bounded(theta[..., 3, None], shape.high - shape.low)
    at = shape.low + within
    bend = BEND_WIDTH_LN * np.logaddexp(0, (u - at) / BEND_WIDTH_LN)
    value = np.exp(np.clip(c + first * u + (second - first) * bend, -LARGEST_LN, LARGEST_LN))
    past = expit((u - at) / BEND_WIDTH_LN)
    gradient = np.stack([value, value * (u - bend), value * bend, -value * (second - first) * past * d_at], axis=-1)
    return value, gradient


def _broken_inverse(theta: Floats, y: float, shape: Shape) -> Floats:
    """By scipy's elementwise root finder, between where the law turns (if it does) and far away."""
    first, second = shape.sign * theta[:, 1], shape.sign * theta[:, 2]
    turn = shape.low + _bounded(theta[:, 3], shape.high - shape.low)[0]
    low = np.where(first > 0, -FARTHEST_LN, turn)
    high = np.where(second > 0, FARTHEST_LN, turn)

    def lead(u: Floats, *columns: Floats) -> Floats:
        value = _broken(np.stack(columns, axis=-1), u[..., None], shape)[0][..., 0]
        return np.asarray(shape.sign * (value - y))

    at_low, at_high = lead(low, *theta.T), lead(high, *theta.T)
    never = (at_high < 0) | ((first <= 0) & (second <= 0))
    root = elementwise.find_root(lead, (low, high), args=tuple(theta.T)).x
    return np.where(never, np.nan, np.where(at_low < 0, root, low))


def _broken_natural(theta: Floats, reference: float, shape: Shape) -> dict[str, Floats]:
    return {
        "C": np.exp(theta[..., 0] - theta[..., 1] * np.log(reference)),
        "alpha": theta[..., 1],
        "alpha2": theta[..., 2],
        "xb": reference * np.exp(shape.low + _bounded(theta[..., 3], shape.high - shape.low)[0]),
    }


def _broken_starts(u: Floats, y: Floats, shape: Shape) -> Floats:
    out, logs = [], np.log(np.maximum(y, 1e-12))
    for share in (0.15, 0.5, 0.85):
        at = shape.low + share * (shape.high - shape.low)
        bend = np.maximum(u - at, 0)
        design = np.stack([np.ones_like(u), u - bend, bend], axis=-1)
        c, first, second = np.linalg.lstsq(design, logs, rcond=None)[0]
        out.append([c, first, second, np.log(share / (1 - share))])
    return np.array(out)


# -- shared ------------------------------------------------------------------------------------------------------------


def _limit(theta: Floats, shape: Shape) -> tuple[Floats, Floats]:
    """The ceiling or floor and its derivative: inside (0, 100) for a percentage, positive otherwise."""
    if shape.percent:
        share = expit(theta)
        return TOP_PERCENT * share, TOP_PERCENT * share * (1 - share)
    value = np.exp(np.clip(theta, -LARGEST_LN, LARGEST_LN))
    return value, value


def _bounded(theta: Floats, top: float) -> tuple[Floats, Floats]:
    """A number in (0, top) and its derivative."""
    share = expit(theta)
    return top * share, top * share * (1 - share)


def _unbounded(value: float, top: float) -> float:
    share = float(np.clip(value / top, 1e-6, 1 - 1e-6))
    return float(np.log(share / (1 - share)))


def _unlimit(limit: float, y: Floats, shape: Shape) -> float:
    """θ of a ceiling (floor), pulled to the far side of the data where a start lands on the wrong one."""
    spread = float(np.ptp(y)) + 1e-3 * float(np.abs(y).max()) + 1e-12
    if shape.rising:
        limit = max(limit, float(y.max()) + 0.02 * spread)
    else:
        limit = min(limit, float(y.min()) - 0.02 * spread)
    if not shape.percent:
        return float(np.log(max(limit, 1e-9 * spread)))
    share = float(np.clip(limit / TOP_PERCENT, 1e-4, 1 - 1e-4))
    return float(np.log(share / (1 - share)))


def _line(u: Floats, y: Floats) -> tuple[float, float]:
    """Slope and intercept of the least-squares line; slope 0 where u does not vary."""
    centred = u - u.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread if spread > 0 else 0.0
    return slope, float(y.mean() - slope * u.mean())


_FORMS: dict[str, Form] = {
    "power": Form(
        "power", "y = C·x^α", ("C", "alpha"), "C", "alpha", None, {},
        _power, _power_natural, _power_starts, _power_inverse,
    ),
    "saturating": Form(
        "saturating", "y = E − A·x^−α", ("E", "A", "alpha"), "A", "alpha", "E", {"alpha": LARGEST_ALPHA},
        _saturating, _saturating_natural, _saturating_starts, _saturating_inverse,
    ),
    "shifted": Form(
        "shifted", "y = E − A·(x + x0)^−α", ("E", "A", "alpha", "x0"), "A", "alpha", "E", {"alpha": LARGEST_ALPHA},
        _shifted, _shifted_natural, _shifted_starts, _shifted_inverse,
    ),
    "m4": Form(
        "m4", "(E − y) / y^γ = A·x^−α", ("E", "A", "alpha", "gamma"), "A", "alpha", "E",
        {"alpha": LARGEST_ALPHA, "gamma": LARGEST_GAMMA},
        _m4, _m4_natural, _m4_starts, _m4_inverse,
    ),
    "broken": Form(
        "broken", "y = C·x^α, exponent α2 beyond xb", ("C", "alpha", "alpha2", "xb"), "C", "alpha", None, {},
        _broken, _broken_natural, _broken_starts, _broken_inverse,
    ),
}  # fmt: skip
