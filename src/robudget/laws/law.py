"""A law: a form fitted to an envelope, with the draws that give everything it says an interval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from robudget.errors import InputError
from robudget.files import fields, to_plain
from robudget.laws.envelope import Envelope
from robudget.laws.forms import FormName, Shape, form_named
from robudget.laws.least_squares import Space
from robudget.tables.usable import Floats, is_percent

On = Literal["value", "error", "logit"]
Interval = tuple[float, float]

FARTHEST_DECADES = 30.0  # beyond the data; a target farther off counts as unreachable


@dataclass(frozen=True)
class Reach:
    """What a target costs: `value` of the column `x` (inf: the law never gets there), with its interval.

    `high` is inf where more than (1 − level) / 2 of the resampled laws never reach the target; `p_unreachable` is the
    share of them that never do. `decades` says how far outside the range of the runs `value` lies.
    """

    x: str
    y: str
    target: float
    value: float
    low: float
    high: float
    p_unreachable: float
    decades: float
    level: float

    @property
    def reachable(self) -> bool:
        return bool(np.isfinite(self.value))

    def to_dict(self) -> dict[str, Any]:
        return fields(self) | {"reachable": self.reachable}

    def sentence(self) -> str:
        """Such as `75 aa_acc: unreachable (99% of the resampled laws)` or `60 aa_acc needs 2e19 train_flops_exact (95%:
        6e18 to unreachable), 0.4 decades outside the runs`."""
        if not self.reachable:
            return f"{self.target:g} {self.y}: unreachable ({self.p_unreachable:.0%} of the resampled laws)"
        high = f"{self.high:.3g}" if np.isfinite(self.high) else "unreachable"
        text = f"{self.target:g} {self.y} needs {self.value:.3g} {self.x} ({self.level:.0%}: {self.low:.3g} to {high})"
        far = f", {self.decades:.1f} decades outside the runs" if self.decades >= 0.1 else ""
        return text + far


@dataclass(frozen=True)
class Law:
    """A fitted form. `params` and `intervals` are the numbers of `formula`, in the units of the columns `x` and `y`.

    `on` says what the formula gives: the column's `value`, its `error` (100 − y) or, for `logit`, the odds y/(100 − y)
    fitted in log space; `predict` and `band` always answer in the units of `y`. `r2` is taken in the space of the fit
    (`space`: linear or log); `rmse` is in the units of y. `x_ref` scales x inside; `theta` (p,) and `draws`
    (resamples, p) are the form's inner parameters. `level` is the intervals' nominal coverage.

    A resample can only lose a bin's best run, never find a better one, so resampled envelopes lie lower than the real
    one, which lies lower than that of ever more runs by more than as much again; or, where runs differ by the noise of
    their evaluations, higher (`envelope.winners_curse`; known where the table has `n_eval`). `shift` (resamples,), in
    the units of y, takes each of the `draws` to the frontier's level, and is in everything that is computed from them
    about a level (predictions, ceiling, cost at a target); exponents need none. It is 0 where every run is a point.
    An interval that would not hold the law's own value because of it is widened until it does.
    """

    form: FormName
    formula: str
    x: str
    y: str
    on: On
    space: Space
    params: dict[str, float]
    intervals: dict[str, Interval]
    level: float
    r2: float
    rmse: float
    aicc: float
    converged: bool
    resamples: int
    envelope: Envelope
    warnings: tuple[str, ...]
    x_ref: float = field(repr=False)
    shape: Shape = field(repr=False)
    shift: Floats = field(repr=False)
    theta: Floats = field(repr=False)
    draws: Floats = field(repr=False)

    @property
    def C(self) -> float:  # noqa: N802
        """The coefficient before the power: C of a power law, A of a saturating one."""
        return self.params[form_named(self.form).coefficient]

    @property
    def alpha(self) -> float:
        return self.params[form_named(self.form).exponent]

    @property
    def alpha_interval(self) -> Interval:
        return self.intervals[form_named(self.form).exponent]

    @property
    def ceiling(self) -> float:
        """The limit of y at infinite x, in the units of y; NaN where the form has none."""
        name = form_named(self.form).ceiling
        return float(from_scale(np.float64(self.params[name]), self.on)) if name else float("nan")

    @property
    def ceiling_interval(self) -> Interval:
        name = form_named(self.form).ceiling
        if not name:
            return (float("nan"), float("nan"))
        limits = form_named(self.form).natural(self.draws, self.x_ref, self.shape)[name]
        ends = quantiles(from_scale(limits, self.on) + self.shift, self.level)
        low, high = (float(end) for end in np.minimum(ends, 100.0 if is_percent(self.y) else np.inf))
        return float(np.minimum(low, self.ceiling)), float(np.maximum(high, self.ceiling))

    @property
    def name(self) -> str:
        """The form and, where it is not fitted on y itself, the scale: `power`, `power on error`."""
        return form_on(self.form, self.on)

    @property
    def n_runs(self) -> int:
        return self.envelope.n_runs

    @property
    def n_bins(self) -> int:
        return self.envelope.n_bins

    @property
    def n_params(self) -> int:
        return form_named(self.form).n_params

    def predict(self, x: ArrayLike) -> Floats:
        """y at each x, in the units of the column y. Same shape as x."""
        return self._values(self.theta, np.asarray(x, dtype=np.float64))

    def band(self, x: ArrayLike, level: float | None = None) -> tuple[Floats, Floats]:
        """The interval of the law itself (not of a single run) at each x: (low, high), the shape of x."""
        at = np.asarray(x, dtype=np.float64)
        low, high = quantiles(self.resampled_values(at.ravel()), self.level if level is None else level)
        middle = self.predict(at)
        return np.minimum(low.reshape(at.shape), middle), np.maximum(high.reshape(at.shape), middle)

    def cost_at(self, target: float) -> Reach:
        """The x at which the law reaches `target` (units of y), or that it never does."""
        if is_percent(self.y) and not 0 < target < 100:
            raise InputError(f"target = {target:g} for {self.y} (allowed: more than 0 and less than 100, in percent)")
        value = float(self._inverse(self.theta[None], target)[0])
        draws = self.resampled_costs(target)
        edge = (1 - self.level) / 2
        low, high = np.quantile(draws, [edge, 1 - edge], method="higher") if len(draws) else (np.nan, np.nan)
        return Reach(
            self.x, self.y, float(target), value, float(np.minimum(low, value)), float(np.maximum(high, value)),
            float(np.isinf(draws).mean()) if len(draws) else float("nan"), self.decades_beyond(value), self.level,
        )  # fmt: skip

    def resampled_values(self, x: Floats) -> Floats:
        """y at each x (n,) by every resampled law, its bias corrected: (resamples, n)."""
        return self._values(self.draws, x) + self.shift[:, None]

    def resampled_costs(self, target: float) -> Floats:
        """The x at which every resampled law reaches `target`: (resamples,), inf where it never does."""
        costs = np.full(len(self.draws), np.inf)
        for shift in np.unique(self.shift):
            those, goal = self.shift == shift, target - float(shift)
            goal = float(np.clip(goal, 1e-6, 100 - 1e-6)) if is_percent(self.y) else goal
            costs[those] = self._inverse(self.draws[those], goal)
        return costs

    def next_point(self, x: float, gain: float = 1.0) -> Reach:
        """The x where y is `gain` better than the law's value at `x`; less `x`, that is the price of the next point."""
        return self.cost_at(float(self.predict(x)) + (gain if self.envelope.best == "max" else -gain))

    def decades_beyond(self, x: float) -> float:
        """How many powers of ten `x` lies outside the range of the runs (0 inside)."""
        if not np.isfinite(x):
            return float("inf")
        inside = np.clip(x, self.envelope.points.x.min(), self.envelope.points.x.max())
        return float(abs(np.log10(x / inside)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data with form, C, alpha, alpha_interval, r2, n_runs, n_bins, x, y first."""
        first = ("form", "C", "alpha", "alpha_interval", "r2", "n_runs", "n_bins", "x", "y")
        head = {name: to_plain(getattr(self, name)) for name in first}
        span = self.envelope
        tail = {
            "ceiling": to_plain(self.ceiling),
            "ceiling_interval": to_plain(self.ceiling_interval),
            "envelope": {
                "how": span.how,
                "bins": span.bins,
                "x_range": [float(span.points.x.min()), float(span.points.x.max())],
                "decades": span.decades,
            },
            "counts": span.counts.to_dict(),
        }
        return head | {k: v for k, v in fields(self).items() if k not in head} | tail

    def sentence(self) -> str:
        """The law in one line, with its interval and what it stands on."""
        low, high = self.alpha_interval
        numbers = ", ".join(f"{name} = {value:.4g}" for name, value in self.params.items())
        return (
            f"{self.y} against {self.x}: {self.formula} with {numbers}; α {self.level:.0%} interval "
            f"[{low:.3g}, {high:.3g}], R² {self.r2:.2f}, {self.n_bins} points from {self.n_runs} runs over "
            f"{self.envelope.decades:.1f} decades"
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _values(self, theta: Floats, x: Floats) -> Floats:
        """(p,) and any x, or (d, p) and x (n,) → (d, n), in the units of y."""
        u = np.log(x / self.x_ref)
        value, _ = form_named(self.form).value(theta, np.atleast_1d(u), self.shape)
        return from_scale(value.reshape(u.shape) if theta.ndim == 1 else value, self.on)

    def _inverse(self, theta: Floats, target: float) -> Floats:
        """First x at which each law of θ (d, p) reaches the target: (d,), inf where none is within FARTHEST_DECADES.

        A law that runs the wrong way reaches at its cheapest run what it reaches at all.
        """
        form, goal = form_named(self.form), float(to_scale(np.float64(target), self.on))
        first, last = np.log(self.envelope.xs[[0, -1]] / self.x_ref)
        u = form.inverse(theta, goal, self.shape)
        sign = self.shape.sign
        at_first = form.value(theta, np.full((len(theta), 1), first), self.shape)[0][:, 0]
        u = np.where(np.isnan(u), np.where(sign * (at_first - goal) >= 0, first, np.inf), u)
        far = FARTHEST_DECADES * np.log(10)
        u = np.where(u > last + far, np.inf, np.maximum(u, first - far))
        return np.where(np.isinf(u), np.inf, self.x_ref * np.exp(np.minimum(u, last + far)))


def form_on(form: FormName, on: On) -> str:
    return form if on == "value" else f"{form} on {on}"


def to_scale(y: Floats | np.float64, on: On) -> Floats:
    """From the units of y to what the formula gives."""
    if on == "value":
        return np.asarray(y)
    return np.asarray(100 - y if on == "error" else y / (100 - y))


def from_scale(value: Floats | np.float64, on: On) -> Floats:
    if on == "value":
        return np.asarray(value)
    return np.asarray(100 - value if on == "error" else 100 * value / (1 + value))


def quantiles(values: Floats, level: float) -> tuple[Floats, Floats]:
    """The central interval over the first axis (draws); NaN without draws."""
    if not len(values):
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
