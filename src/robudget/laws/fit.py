"""Fit a law to a table: envelope, form, bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from robudget.errors import InputError, unknown
from robudget.laws import forms
from robudget.laws.bootstrap import Drawn, resampled, resampled_lines
from robudget.laws.curse import curse
from robudget.laws.envelope import BINS, Envelope, How, envelope_of
from robudget.laws.forms import Form, FormName, Shape
from robudget.laws.law import Law, On, from_scale, quantiles, to_scale
from robudget.laws.least_squares import SPACES, Space, solve
from robudget.tables.read import as_table
from robudget.tables.usable import Floats, is_error, is_percent, points

RESAMPLES = 2_000
LEVEL = 0.95
FEW = 6  # envelope points below which a law says how little it stands on
BEND_ROOM = 2  # points beyond the first on either side of a broken law's bend
MOST_STARTS = 3  # of each resample's fit, which also
RESAMPLE_STEPS, RESAMPLE_TOLERANCE = 60, 1e-4  # ends sooner: the scatter of the runs hides what it would still gain
RUNS_PER_BIN = 4  # a bin of one run has no "best"


def fit_power_law(
    source: pd.DataFrame | str | Path,
    x: str = "train_flops_exact",
    y: str = "aa_acc",
    *,
    bins: int | Literal["auto"] = "auto",
    resamples: int = RESAMPLES,
    how: How | None = None,
    level: float = LEVEL,
    seed: int = 0,
) -> Law:
    """y = C·x^α on the best run per bin (accuracies; paper: 19 bins in log x) or on every run (costs).

    Accuracies are fitted by least squares on y, as the paper's; costs by a straight line in log-log. `bins="auto"`
    takes 19 where there are at least four runs a bin and fewer otherwise. Raises InputError for a table that holds no
    law.
    """
    return fit_law(source, x, y, "power", bins=bins, resamples=resamples, how=how, level=level, seed=seed)


def fit_law(
    source: pd.DataFrame | str | Path,
    x: str = "train_flops_exact",
    y: str = "aa_acc",
    form: FormName = "power",
    *,
    bins: int | Literal["auto"] = "auto",
    how: How | None = None,
    on: On = "value",
    space: Space | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    drop_collapsed: bool | None = None,
) -> Law:
    """A form of `forms.FORMS` fitted to the envelope of `y` over `x`, with bootstrap intervals over runs.

    `how=None` takes the best run per bin in log x for a percentage and every run for anything else; `space=None` fits
    percentages by least squares on y and the rest on ln y. Each resample draws runs with replacement and rebuilds the
    envelope. Deterministic for a given `seed`.
    """
    chosen = points(as_table(source), x, y, drop_collapsed=drop_collapsed)
    how = how or ("log" if is_percent(y) else "all")
    env = envelope_of(chosen, auto_bins(chosen.counts.used) if bins == "auto" else bins, how)
    return fit_envelope(env, form, on=on, space=space, resamples=resamples, level=level, seed=seed)


def auto_bins(runs: int) -> int:
    """The paper's 19 where there are runs for it, else one bin per RUNS_PER_BIN runs and at least FEW."""
    return int(np.clip(runs // RUNS_PER_BIN, FEW, BINS))


def fit_envelope(
    env: Envelope,
    form: FormName = "power",
    *,
    on: On = "value",
    space: Space | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    drawn: Drawn | None = None,
) -> Law:
    """As `fit_law`, from an envelope that is already there; `drawn` are its resamples, if they were drawn before."""
    formula = forms.get(form)
    _check(env, formula)
    x_ref = float(np.exp(np.log(env.xs).mean()))
    u, y = np.log(env.xs / x_ref), to_scale(env.ys, on)
    task = _Task(formula, shape_of(env.y, on, u), _space(env, form, on, space), on, x_ref)
    fit = solve(formula, task.shape, task.space, u[None], y[None], np.ones((1, len(u))), task.starts(u, y))
    theta, converged = fit.theta[0], bool(fit.converged[0])
    draws = _draws(env, task, np.vstack([theta, task.starts(u, y)[::2]]), resamples, seed, drawn)
    natural = {name: float(v) for name, v in formula.natural(theta, x_ref, task.shape).items()}
    spread = {name: quantiles(v, level) for name, v in formula.natural(draws, x_ref, task.shape).items()}
    value = formula.value(theta, u, task.shape)[0]
    miss = from_scale(value, on) - env.ys
    shift = np.zeros(len(draws))
    if env.how != "all" and len(draws):
        again = from_scale(formula.value(draws, u, task.shape)[0], on)
        shift = _shifts(env, float(np.median(env.ys + miss - again)), len(draws), seed)
    return Law(
        form=form, formula=formula.formula, x=env.x, y=env.y, on=on, space=task.space, params=natural,
        intervals={name: (float(low), float(high)) for name, (low, high) in spread.items()}, level=level,
        r2=_r2(value, y, task.space), rmse=float(np.sqrt((miss**2).mean())), aicc=aicc(miss, formula.n_params),
        converged=converged, resamples=len(draws), envelope=env,
        warnings=_warnings(env, formula, natural, converged), x_ref=x_ref, shape=task.shape, shift=shift,
        theta=theta, draws=draws,
    )  # fmt: skip


@dataclass(frozen=True)
class _Task:
    """What is fitted how; `starts` are its multi-start points (s, p)."""

    form: Form
    shape: Shape
    space: Space
    on: On
    x_ref: float

    def starts(self, u: Floats, y: Floats) -> Floats:
        return self.form.starts(u, y, self.shape)


def shape_of(y: str, on: On, u: Floats) -> Shape:
    """Rising or falling, bounded or not, and where a law may bend: with BEND_ROOM points or more on either side."""
    ascending = np.sort(u)
    room = min(BEND_ROOM, (len(u) - 1) // 2)
    return Shape(
        rising=is_error(y) == (on == "error"), percent=is_percent(y) and on != "logit",
        low=float(ascending[room]), high=float(ascending[-1 - room]),
    )  # fmt: skip


def aicc(miss: Floats, n_params: int) -> float:
    """Akaike's criterion with the small-sample term, on residuals in the units of y; inf without degrees of freedom."""
    n, k = len(miss), n_params + 1  # + the variance
    if n <= k + 1:
        return float("inf")
    variance = max(float((miss**2).mean()), 1e-12)
    return n * float(np.log(variance)) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _draws(env: Envelope, task: _Task, starts: Floats, resamples: int, seed: int, drawn: Drawn | None) -> Floats:
    """θ of every resample, (d, p); resamples that hold fewer points than parameters are left out."""
    if resamples < 1:
        return np.empty((0, task.form.n_params))
    rng = np.random.default_rng(seed)
    if (env.how, task.form.name, task.space, task.on) == ("all", "power", "log", "value"):
        return resampled_lines(env, resamples, rng)
    x, y, weight = drawn or resampled(env, resamples, rng)
    enough = (weight > 0).sum(axis=1) >= task.form.n_params
    x, y, weight = x[enough], y[enough], weight[enough]
    u, goal = np.log(x / task.x_ref), to_scale(y, task.on)
    # A power law has one minimum; the others get more than one start.
    some = starts[:1] if task.form.name == "power" else starts[:MOST_STARTS]
    return solve(task.form, task.shape, task.space, u, goal, weight, some, RESAMPLE_STEPS, RESAMPLE_TOLERANCE).theta


def _shifts(env: Envelope, loss: float, resamples: int, seed: int) -> Floats:
    """From each resampled law's level to the frontier's, (resamples,) in the units of y.

    Up by `loss`, what a resample loses of the envelope, and up again by what the envelope lacks of the frontier. With
    runs right up to the frontier the gaps between the best are exponential, and as a resample misses the k best with
    probability e^−k, it lacks e − 1 times the loss. If runs differ by noise instead, nothing is lacking and the
    envelope owes something to luck. Which of the two a table is, it does not say: half of the resamples take the one,
    half the other.
    """
    sign = 1.0 if env.best == "max" else -1.0
    lift, left = curse(env, np.random.default_rng(seed))
    falls_short = np.e * loss
    lucky = loss + sign * ((np.e - 1) * max(sign * loss - (lift - left), 0.0) - lift)
    return np.where(np.arange(resamples) % 2 == 0, falls_short, lucky if lift > 0 else falls_short)


def _r2(value: Floats, y: Floats, space: Space) -> float:
    """Share of the variance explained, in the space of the fit."""
    if space != "linear":
        value, y = np.log(np.maximum(value, 1e-300)), np.log(np.maximum(y, 1e-300))
    total = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((value - y) ** 2).sum()) / total if total > 0 else float("nan")


def _space(env: Envelope, form: FormName, on: On, space: Space | None) -> Space:
    if space is not None and space not in SPACES:
        raise unknown("space", space, SPACES)
    if on not in ("value", "error", "logit"):
        raise unknown("scale", on, ("value", "error", "logit"))
    if on != "value" and not is_percent(env.y):
        raise InputError(f"on = {on!r} needs a percentage for y, not {env.y!r}")
    if form == "m4" and (not is_percent(env.y) or on == "logit"):
        raise InputError(f"form = 'm4' needs an accuracy or an error for y, not {env.y!r} on {on!r}")
    if on == "logit" and space == "linear":
        raise InputError("on = 'logit' is fitted in log space (allowed: space = log or huber)")
    return space or ("linear" if is_percent(env.y) and on != "logit" else "log")


def _check(env: Envelope, form: Form) -> None:
    if len(np.unique(env.xs)) < 2:
        raise InputError(f"all {env.n_runs} runs have {env.x} = {env.xs[0]:g}: a law needs at least two levels")
    if env.n_bins < form.n_params:
        raise InputError(
            f"{env.n_bins} points (of {env.n_runs} runs) cannot fix the {form.n_params} parameters "
            f"of the {form.name} law"
        )
    if env.best == "max" and not (env.ys > 0).any():
        raise InputError(f"{env.y} is 0 for every run: there is no law in it")


def _warnings(env: Envelope, form: Form, natural: dict[str, float], converged: bool) -> tuple[str, ...]:
    out = []
    if env.n_bins == form.n_params:
        out.append(f"the {form.name} law passes through all its {env.n_bins} points: nothing is left to judge it by")
    elif env.n_bins < FEW:
        out.append(f"the {form.name} law stands on {env.n_bins} points only")
    if env.decades < 1:
        out.append(f"{env.x} spans a factor of {10**env.decades:.3g} only: exponents are poorly determined")
    for name, bound in form.bounds.items():
        if natural[name] > 0.99 * bound:
            out.append(
                f"the {form.name} law's {name} ran to its bound of {bound:g}: trust its curve, not its parameters"
            )
    if not converged:
        out.append(f"the fit of the {form.name} law did not converge")
    return tuple(out)
