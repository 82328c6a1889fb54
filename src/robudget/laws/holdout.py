"""How far a law can be trusted beyond its data: hide the costliest runs, fit the rest, see who misses by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from robudget.errors import InputError
from robudget.laws import forms
from robudget.laws.averaging import CONTENDERS, Contender
from robudget.laws.envelope import Envelope, envelope_of
from robudget.laws.fit import fit_envelope
from robudget.laws.plain import fields
from robudget.tables.usable import Counts, Points, is_percent

Hidden = Literal["decade", "bin"]
BASELINES = ("last value", "mean")
FEWEST = 3  # levels of x that a law is fitted on
MOST_HIDDEN = 0.4  # share of the envelope that must stay visible; else its upper third is hidden, not a whole decade


@dataclass(frozen=True)
class Miss:
    """One contender's error on the hidden envelope points, in the units of y: root mean square, mean (signed,
    predicted − true) and largest. `beats_baseline`: whether its RMSE is below that of `last value`."""

    name: str
    rmse: float
    bias: float
    worst: float
    beats_baseline: bool


@dataclass(frozen=True)
class Holdout:
    """`hidden` says what was hidden (the top decade of x, or the top bin; of a short range its upper third). `x_cut`
    is the largest x fitted on; `n_train` and `n_test` count envelope points; `decades` is how far beyond `x_cut` the
    farthest hidden point lies. `misses` hold every form that could be fitted and the two baselines; `xs`, `ys`
    (n_test,) are the hidden points, `train_xs`, `train_ys` (n_train,) those fitted on, in bins made anew."""

    hidden: Hidden
    x_cut: float
    n_train: int
    n_test: int
    decades: float
    misses: tuple[Miss, ...]
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    predictions: dict[str, tuple[float, ...]]  # name → (n_test,)
    train_xs: tuple[float, ...]
    train_ys: tuple[float, ...]
    unit: str  # of the misses: points, or what the column y is called

    def miss(self, name: str) -> Miss | None:
        return next((m for m in self.misses if m.name == name), None)

    def best(self) -> Miss | None:
        """The form with the smallest miss; None where too little was left to fit one."""
        return min((m for m in self.misses if m.name not in BASELINES), key=lambda m: m.rmse, default=None)

    def warnings(self) -> tuple[str, ...]:
        """One line that names every form that a baseline beats, and its miss."""
        losers = [m for m in self.misses if m.name not in BASELINES and not m.beats_baseline]
        if not losers:
            return ()
        named = ", ".join(f"{m.name} {self._number(m)}" for m in losers)
        return (
            f"do not extrapolate these forms: with the top {self.hidden} of x hidden they miss by more {self.unit} "
            f"than the last value does ({self._number(self._last())}): {named}",
        )

    def sentence(self) -> str:
        """Who won, against saying the last seen value again."""
        best = self.best()
        said = f"saying the last seen value again ({self._number(self._last())} {self.unit})"
        if best is None:
            return f"Too few runs are left to fit a form; {said} is all there is."
        if best.beats_baseline:
            return (
                f"The smallest miss is that of the {best.name} form ({self._number(best)} {self.unit}), against {said}."
            )
        return f"No form beats {said}; the nearest is {best.name} ({self._number(best)})."

    def _number(self, miss: Miss) -> str:
        return f"{miss.rmse:.2f}" if self.unit == "points" else f"{miss.rmse:.3g}"

    def _last(self) -> Miss:
        return next(m for m in self.misses if m.name == "last value")

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def holdout(env: Envelope, hidden: Hidden = "decade", contenders: Sequence[Contender] = CONTENDERS) -> Holdout:
    """Fit each form to the envelope of the cheaper runs and predict that of the hidden, costlier ones.

    The envelope of the visible runs is rebuilt, in as many bins as it had there. Raises InputError where too little is
    left to fit a law of two parameters, or nothing is hidden.
    """
    x = env.points.x
    cut = _cut(env, hidden)
    visible = x <= cut
    test = env.xs > cut
    if not test.any() or len(np.unique(x[visible])) < FEWEST:
        raise InputError(f"too few levels of {env.x} to hide the top {hidden}")
    train = envelope_of(_only(env.points, visible), max(int((~test).sum()), FEWEST), env.how)
    xs, ys = env.xs[test], env.ys[test]
    predictions: dict[str, np.ndarray[Any, Any]] = {
        "last value": np.full(len(xs), train.ys[-1]),
        "mean": np.full(len(xs), train.ys.mean()),
    }
    for one in contenders:
        if train.n_bins > forms.get(one.form).n_params and one.possible(train):
            guess = fit_envelope(train, one.form, on=one.on, resamples=0).predict(xs)
            predictions[one.name] = np.clip(guess, 0, 100) if is_percent(env.y) else guess
    rmse = {name: float(np.sqrt(((p - ys) ** 2).mean())) for name, p in predictions.items()}
    misses = tuple(
        Miss(name, rmse[name], float((p - ys).mean()), float(np.abs(p - ys).max()), rmse[name] < rmse["last value"])
        for name, p in predictions.items()
    )
    return Holdout(
        hidden, float(train.xs[-1]), train.n_bins, len(xs), float(np.log10(xs[-1] / train.xs[-1])), misses,
        tuple(xs.tolist()), tuple(ys.tolist()), {name: tuple(p.tolist()) for name, p in predictions.items()},
        tuple(train.xs.tolist()), tuple(train.ys.tolist()), "points" if is_percent(env.y) else env.y,
    )  # fmt: skip


def _cut(env: Envelope, hidden: Hidden) -> float:
    """The largest x to fit on: a tenth of the costliest, but never so little that most of the envelope is hidden."""
    if hidden == "bin":
        return float(env.edges[-2]) if len(env.edges) and env.edges[-2] <= env.xs[-1] else float(env.xs[-2])
    decade = float(env.points.x.max() / 10)
    if (env.xs <= decade).sum() >= max(FEWEST, MOST_HIDDEN * env.n_bins):
        return decade
    return float(env.xs[int(np.ceil(2 / 3 * env.n_bins)) - 1])


def _only(points: Points, keep: np.ndarray[Any, Any]) -> Points:
    n = int(keep.sum())
    return Points(
        points.x_name, points.y_name, points.x[keep], points.y[keep], points.rows[keep], points.noise[keep],
        Counts(total=n, used=n),
    )  # fmt: skip
