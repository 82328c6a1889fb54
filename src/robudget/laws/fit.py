"""Fit a law to a table: envelope, multi-start least squares, bootstrap intervals.

Intervals are percentiles over bootstrap tables of runs (Efron & Tibshirani 1993, chapter 13). How the level of the
resampled envelopes is corrected (`_frontier_shifts`) is ours; `bench/laws.py coverage` measures the coverage of every
interval, bench/RESULTS.md has the numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from robudget.errors import InputError, unknown
from robudget.laws.envelope import (
    BINS,
    NUMBERS_AT_ONCE,
    Envelope,
    How,
    Resamples,
    bootstrap_envelopes,
    draw_counts,
    envelope_of,
    most_resamples,
    winners_curse,
)  # fmt: skip
from robudget.laws.forms import Form, FormName, Shape, form_named
from robudget.laws.law import Law, On, from_scale, quantiles, to_scale
from robudget.laws.least_squares import SPACES, Space, levenberg_marquardt, r_squared
from robudget.tables.read import as_table
from robudget.tables.usable import Floats, is_error, is_percent, points

RESAMPLES = 2_000
LEVEL = 0.95
FEW_POINTS = 6  # envelope points below which a law says how little it stands on
FEW_OF_CEILING = 12  # best runs of bins below which intervals of a law with a ceiling are known to be too narrow
# Measured by `bench/laws.py coverage --runs`, of the saturating form (bench/RESULTS.md).
CEILING_COVERAGE = (
    "intervals of laws with a ceiling may be too narrow on {} points: on tables of known truth the saturating law's "
    "95% intervals of predictions and prices held the truth in 82% to 93% of tables with 6 points, 86% to 96% with 10"
)
POINTS_BEYOND_BEND = 2  # beyond the first, on either side of a broken law's bend
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
    runs = points(as_table(source), x, y, drop_collapsed=drop_collapsed)
    how = how or ("log" if is_percent(y) else "all")
    env = envelope_of(runs, auto_bins(runs.counts.used) if bins == "auto" else bins, how)
    return fit_envelope(env, form, on=on, space=space, resamples=resamples, level=level, seed=seed)


def auto_bins(runs: int) -> int:
    """The paper's 19 where there are runs for it, else one bin per RUNS_PER_BIN runs and at least FEW_POINTS."""
    return int(np.clip(runs // RUNS_PER_BIN, FEW_POINTS, BINS))


def fit_envelope(
    env: Envelope,
    form: FormName = "power",
    *,
    on: On = "value",
    space: Space | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    tables: Resamples | None = None,
) -> Law:
    """As `fit_law`, from an envelope that is already there; `tables` are its bootstrap envelopes, where they are."""
    f = form_named(form)
    space = _checked_space(env, f, on, space)
    x_ref = float(np.exp(np.log(env.xs).mean()))
    u, goal = np.log(env.xs / x_ref), to_scale(env.ys, on)
    shape = shape_of(env.y, on, u)

    starts = f.starts(u, goal, shape)
    solution = levenberg_marquardt(f, shape, space, u[None], goal[None], np.ones((1, len(u))), starts)
    theta, converged = solution.theta[0], bool(solution.converged[0])

    # The same fit to every bootstrap table, from the law itself and some of its starts; a power law has one minimum.
    rng = np.random.default_rng(seed)
    if resamples < 1:
        draws = np.empty((0, f.n_params))
    elif (env.how, form, space, on) == ("all", "power", "log", "value"):
        draws = bootstrap_lines(env, resamples, rng)
    else:
        xs, ys, weight = tables or bootstrap_envelopes(env, resamples, rng)
        enough = (weight > 0).sum(axis=1) >= f.n_params  # resamples of fewer points than parameters are left out
        xs, ys, weight = xs[enough], ys[enough], weight[enough]
        near = np.vstack([theta, starts[::2]])[: 1 if form == "power" else MOST_STARTS]
        draws = levenberg_marquardt(
            f, shape, space, np.log(xs / x_ref), to_scale(ys, on), weight, near, RESAMPLE_STEPS, RESAMPLE_TOLERANCE
        ).theta

    value = f.value(theta, u, shape)[0]
    residual = from_scale(value, on) - env.ys
    if form == "power" and env.how != "all" and len(draws) and env.n_bins > f.n_params:
        draws = _as_wide_as_residuals(f, shape, space, u, goal, theta, draws, level)
    shift = np.zeros(len(draws))
    if env.how != "all" and len(draws):
        resampled = from_scale(f.value(draws, u, shape)[0], on)
        shift = _frontier_shifts(env, float(np.median(env.ys + residual - resampled)), len(draws), seed)

    params = {name: float(v) for name, v in f.natural(theta, x_ref, shape).items()}
    spread = {name: quantiles(v, level) for name, v in f.natural(draws, x_ref, shape).items()}
    if space != "linear":
        value, goal = (np.log(np.maximum(v, 1e-300)) for v in (value, goal))
    return Law(
        form=form, formula=f.formula, x=env.x, y=env.y, on=on, space=space, params=params,
        intervals={name: (float(low), float(high)) for name, (low, high) in spread.items()}, level=level,
        r2=r_squared(value - goal, goal), rmse=float(np.sqrt((residual**2).mean())),
        aicc=aicc(residual, f.n_params), converged=converged, resamples=len(draws), envelope=env,
        warnings=_warnings(env, f, params, converged), x_ref=x_ref, shape=shape, shift=shift, theta=theta, draws=draws,
    )  # fmt: skip


def shape_of(y: str, on: On, u: Floats) -> Shape:
    """Rising or falling, bounded or not, and where a law may bend: past POINTS_BEYOND_BEND points on either side."""
    ascending = np.sort(u)
    room = min(POINTS_BEYOND_BEND, (len(u) - 1) // 2)
    return Shape(
        rising=is_error(y) == (on == "error"), percent=is_percent(y) and on != "logit",
        low=float(ascending[room]), high=float(ascending[-1 - room]),
    )  # fmt: skip


def aicc(residual: Floats, n_params: int) -> float:
    """Akaike's criterion with the small-sample term (Hurvich & Tsai 1989), on residuals in the units of y; inf without
    degrees of freedom."""
    n, k = len(residual), n_params + 1  # + the variance
    if n <= k + 1:
        return float("inf")
    variance = max(float((residual**2).mean()), 1e-12)
    return n * float(np.log(variance)) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def bootstrap_lines(env: Envelope, resamples: int, rng: np.random.Generator) -> Floats:
    """Intercept and slope of the straight line through (ln x, ln y) of all runs, for bootstrap tables: (resamples, 2).

    ln x is taken from the mean of ln `env.xs`. In closed form, from sums over the drawn runs; large tables get fewer
    resamples (first axis).
    """
    u = np.log(env.points.x) - np.log(env.xs).mean()
    v = np.log(env.points.y)
    sums = np.stack([np.ones_like(u), u, v, u * u, u * v], axis=1)
    resamples = min(resamples, most_resamples(len(u)))
    chunk = max(1, NUMBERS_AT_ONCE // len(u))
    parts = [draw_counts(len(u), min(chunk, resamples - start), rng) @ sums for start in range(0, resamples, chunk)]
    n, su, sv, suu, suv = np.concatenate(parts).T
    spread = n * suu - su**2
    keep = spread > 1e-12 * n * suu  # a resample of one level has no slope
    n, su, sv, suv, spread = n[keep], su[keep], sv[keep], suv[keep], spread[keep]
    slope = (n * suv - su * sv) / spread
    return np.stack([(sv - slope * su) / n, slope], axis=1)


def _as_wide_as_residuals(
    form: Form, shape: Shape, space: Space, u: Floats, goal: Floats, theta: Floats, draws: Floats, level: float
) -> Floats:
    """The draws (d, p), spread about the law until each parameter's interval is no narrower than Student's t interval
    from the residuals of the points: few points that happen to be the best in most resamples hardly differ between
    them, however badly the law fits."""
    value, slope = form.value(theta, u, shape)
    if space != "linear":
        slope = slope / np.maximum(value, 1e-300)[:, None]
        value, goal = np.log(np.maximum(value, 1e-300)), np.log(np.maximum(goal, 1e-300))
    freedom = len(u) - form.n_params
    variance = float(((value - goal) ** 2).sum()) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.pinv(slope.T @ slope)))
    half = stdtrit(freedom, (1 + level) / 2) * errors
    low, high = quantiles(draws, level)
    wider = np.maximum(1.0, 2 * half / np.maximum(high - low, 1e-300))
    middle = np.median(draws, axis=0)
    return np.asarray(middle + np.where(np.isfinite(wider), wider, 1.0) * (draws - middle))


def _frontier_shifts(env: Envelope, loss: float, resamples: int, seed: int) -> Floats:
    """From each resampled law's level to the frontier's, (resamples,) in the units of y.

    Up by `loss`, what a resample loses of the envelope, and up again by what the envelope lacks of the frontier. With
    runs right up to the frontier the gaps between the best are exponential, and as a resample misses the k best with
    probability e^−k, it lacks e − 1 times the loss. If runs differ by noise instead, nothing is lacking and the
    envelope is too high by the winner's curse. The table does not say which of the two it is: half of the
    resamples are shifted for the one, half for the other.
    """
    lift, resampled_lift = winners_curse(env, np.random.default_rng(seed))
    by_gaps = np.e * loss
    by_noise = loss + env.sign * ((np.e - 1) * max(env.sign * loss - (lift - resampled_lift), 0.0) - lift)
    return np.where(np.arange(resamples) % 2 == 0, by_gaps, by_noise if lift > 0 else by_gaps)


def _checked_space(env: Envelope, form: Form, on: On, space: Space | None) -> Space:
    """The space to fit in. Raises InputError where the form, the scale or the space does not go with the envelope."""
    if space is not None and space not in SPACES:
        raise unknown("space", space, SPACES)
    if on not in ("value", "error", "logit"):
        raise unknown("scale", on, ("value", "error", "logit"))
    if on != "value" and not is_percent(env.y):
        raise InputError(f"on = {on!r} needs a percentage for y, not {env.y!r}")
    if form.name == "m4" and (not is_percent(env.y) or on == "logit"):
        raise InputError(f"form = 'm4' needs an accuracy or an error for y, not {env.y!r} on {on!r}")
    if on == "logit" and space == "linear":
        raise InputError("on = 'logit' is fitted in log space (allowed: space = log or huber)")
    if len(np.unique(env.xs)) < 2:
        raise InputError(
            f"all {env.n_runs} runs have {env.x} = {env.xs[0]:g}: a law needs at least two levels of it (train recipes "
            "of another size, length or step count)"
        )
    if env.n_bins < form.n_params:
        raise InputError(
            f"{env.n_bins} points (of {env.n_runs} runs) cannot fix the {form.n_params} parameters "
            f"of the {form.name} law"
        )
    if env.best == "max" and not (env.ys > 0).any():
        raise InputError(f"{env.y} is 0 for every run: there is no law in it")
    return space or ("linear" if is_percent(env.y) and on != "logit" else "log")


def _warnings(env: Envelope, form: Form, params: dict[str, float], converged: bool) -> tuple[str, ...]:
    out = []
    if env.how == "pareto":
        out.append("a Pareto frontier rises by construction: it cannot give an exponent of 0 or below")
    if env.n_bins == form.n_params:
        out.append(f"the {form.name} law passes through all its {env.n_bins} points: nothing is left to judge it by")
    elif env.n_bins < FEW_POINTS:
        out.append(f"the {form.name} law stands on {env.n_bins} points only")
    if form.ceiling and env.how != "all" and is_percent(env.y) and env.n_bins < FEW_OF_CEILING:
        out.append(CEILING_COVERAGE.format(env.n_bins))
    if env.decades < 1:
        out.append(f"{env.x} spans a factor of {10**env.decades:.3g} only: exponents are poorly determined")
    for name, bound in form.bounds.items():
        if params[name] > 0.99 * bound:
            out.append(
                f"the {form.name} law's {name} ran to its bound of {bound:g}: trust its curve, not its parameters"
            )
    if not converged:
        out.append(f"the fit of the {form.name} law did not converge")
    return tuple(out)
