"""Which form to trust: all forms fitted to one envelope, their Akaike weights and average, and what hold-outs say.

Weights are Akaike's from AICc (Burnham & Anderson 2002, section 2.9). A hold-out hides the costliest runs, fits the
rest and measures by how much each form misses the hidden ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from robudget.errors import InputError
from robudget.files import fields
from robudget.laws.envelope import Envelope, bootstrap_envelopes, envelope_of
from robudget.laws.fit import LEVEL, RESAMPLES, fit_envelope
from robudget.laws.forms import FormName, form_named
from robudget.laws.law import Law, On, Reach, form_on
from robudget.tables.usable import Counts, Floats, Points, is_percent

Hidden = Literal["decade", "bin"]
BASELINES = ("last value", "mean")
FEWEST_LEVELS = 3  # of x that a law is fitted on
PREFERENCE = 2.0  # times the next family's weight that one must have to be called supported most
LEAST_VISIBLE = 0.4  # share of the envelope that must stay visible; else its upper third is hidden, not a whole decade


@dataclass(frozen=True)
class ScaledForm:
    """A form and the scale it is fitted on."""

    form: FormName
    on: On = "value"

    @property
    def name(self) -> str:
        return form_on(self.form, self.on)

    def possible(self, env: Envelope) -> bool:
        """Whether the form makes sense for this y: only a percentage has an error or odds, and M4 needs one."""
        return is_percent(env.y) or (self.on == "value" and self.form != "m4")


SCALED_FORMS = (
    ScaledForm("power"), ScaledForm("saturating"), ScaledForm("shifted"), ScaledForm("m4"), ScaledForm("broken"),
    ScaledForm("power", "error"), ScaledForm("power", "logit"),
)  # fmt: skip


@dataclass(frozen=True)
class Average:
    """Laws on one envelope and their Akaike weights (summing to 1), answering together.

    Laws of one form on several scales (power on value, error and log-odds) say nearly the same and are a family: they
    share one weight, or three copies of one curve would count three times.

    Intervals are those of the mixture: each law's resamples count with its weight, so that both the scatter of the runs
    and the uncertainty about the form are in them.
    """

    laws: tuple[Law, ...]
    weights: tuple[float, ...]
    level: float

    @property
    def families(self) -> dict[str, float]:
        """The weight of every family of forms, the largest first."""
        out: dict[str, float] = {}
        for law, weight in zip(self.laws, self.weights, strict=True):
            out[law.form] = out.get(law.form, 0.0) + weight
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    @property
    def best(self) -> Law:
        """The law of the largest weight within the family of the largest weight."""
        first = next(iter(self.families))
        return max((law for law in self.laws if law.form == first), key=self.weight)

    def support(self) -> str:
        """Which family the points support, in a sentence; only one of twice the next one's weight is preferred."""
        ranked = list(self.families.items())
        named = ", ".join(f"{name} {weight:.2f}" for name, weight in ranked)
        if len(ranked) > 1 and ranked[0][1] < PREFERENCE * ranked[1][1]:
            return f"These points do not decide between forms (weights of {len(ranked)} families: {named})."
        return f"Of {len(ranked)} families of forms these points support {ranked[0][0]} most (weights: {named})."

    def weight(self, law: Law) -> float:
        """The weight of one of the laws; 0 for any other."""
        return next((w for w, one in zip(self.weights, self.laws, strict=True) if one is law), 0.0)

    def predict(self, x: ArrayLike) -> Floats:
        """The weighted mean of the laws at each x, in the units of y."""
        return np.asarray(sum(w * law.predict(x) for w, law in zip(self.weights, self.laws, strict=True)))

    def band(self, x: ArrayLike, level: float | None = None) -> tuple[Floats, Floats]:
        """The mixture's central interval at each x: (low, high), the shape of x."""
        at = np.asarray(x, dtype=np.float64)
        values = np.concatenate([law.resampled_values(at.ravel()) for law in self.laws])
        edge = (1 - (self.level if level is None else level)) / 2
        low, high = _quantiles(values, self._draw_weights(), [edge, 1 - edge])
        middle = self.predict(at)
        return np.minimum(low.reshape(at.shape), middle), np.maximum(high.reshape(at.shape), middle)

    def cost_at(self, target: float) -> Reach:
        """The x where the mixture's median law reaches `target`; inf where at least half of the weight never does."""
        first = self.laws[0]
        reaches = [law.cost_at(target) for law in self.laws]
        costs = np.concatenate([law.resampled_costs(target) for law in self.laws])
        weights = self._draw_weights()
        edge = (1 - self.level) / 2
        value = float(_quantiles(np.array([reach.value for reach in reaches]), np.array(self.weights), 0.5))
        low = high = float("nan")
        if len(costs):
            low, high = (float(v) for v in _quantiles(costs, weights, [edge, 1 - edge]))
        return Reach(
            first.x, first.y, float(target), value, min(low, value), max(high, value),
            float(weights[np.isinf(costs)].sum()), first.decades_beyond(value), self.level,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        names = [law.name for law in self.laws]
        return fields(self) | {"laws": names, "weights": dict(zip(names, self.weights, strict=True))}

    def _draw_weights(self) -> Floats:
        parts = [
            np.full(len(law.draws), w / max(len(law.draws), 1)) for w, law in zip(self.weights, self.laws, strict=True)
        ]
        return np.concatenate(parts)


def fit_forms(
    env: Envelope, candidates: Sequence[ScaledForm] = SCALED_FORMS, *, resamples: int = RESAMPLES, level: float = LEVEL,
    seed: int = 0,
) -> tuple[Law, ...]:  # fmt: skip
    """Every form that the envelope has points for (one more than the form's parameters), fitted."""
    tables = bootstrap_envelopes(env, resamples, np.random.default_rng(seed)) if resamples else None
    return tuple(
        fit_envelope(env, one.form, on=one.on, resamples=resamples, level=level, seed=seed, tables=tables)
        for one in candidates
        if one.possible(env) and env.n_bins > form_named(one.form).n_params
    )


def average(laws: Sequence[Law]) -> Average:
    """Akaike weights from each law's AICc on the same envelope. Raises InputError for laws of different envelopes."""
    if not laws:
        raise InputError("no law to average: the envelope has too few points for any form")
    if any(law.envelope is not laws[0].envelope for law in laws):
        raise InputError("only laws of one envelope can be averaged")
    scores = np.array([law.aicc for law in laws])
    if not np.isfinite(scores).any():  # too few points to tell: the fewest parameters win
        scores = np.array([float(law.n_params) for law in laws]) * 10
    copies = np.array([sum(other.form == law.form for other in laws) for law in laws])
    raw = np.exp(-0.5 * (scores - scores[np.isfinite(scores)].min())) / copies
    weights = raw / raw.sum()
    return Average(tuple(laws), tuple(float(w) for w in weights), laws[0].level)


def _quantiles(values: Floats, weights: Floats, shares: float | list[float]) -> Floats:
    """Quantiles over the first axis of (d, …) with weights (d,), by the step function; infinite values count."""
    return np.asarray(np.quantile(values, shares, axis=0, weights=weights, method="inverted_cdf"))


# -- hold-outs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Miss:
    """One form's error on the hidden envelope points, in the units of y: root mean square, mean (signed,
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
    (n_test,) are the hidden points, `train_xs`, `train_ys` (n_train,) those fitted on, in bins of their own."""

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
        """Which form missed least, against repeating the last value."""
        best = self.best()
        repeat = f"saying the last seen value again ({self._number(self._last())} {self.unit})"
        if best is None:
            return f"Too few runs are left to fit a form; {repeat} is all there is."
        if best.beats_baseline:
            miss = f"{self._number(best)} {self.unit}"
            return f"The smallest miss is that of the {best.name} form ({miss}), against {repeat}."
        return f"No form beats {repeat}; the nearest is {best.name} ({self._number(best)})."

    def _number(self, miss: Miss) -> str:
        return f"{miss.rmse:.2f}" if self.unit == "points" else f"{miss.rmse:.3g}"

    def _last(self) -> Miss:
        return next(m for m in self.misses if m.name == "last value")

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def holdout(env: Envelope, hidden: Hidden = "decade", candidates: Sequence[ScaledForm] = SCALED_FORMS) -> Holdout:
    """Fit each form to the envelope of the cheaper runs and predict that of the hidden, costlier ones.

    The envelope of the visible runs is rebuilt, in as many bins as it had there. Raises InputError where too little is
    left to fit a law of two parameters, or nothing is hidden.
    """
    x = env.points.x
    cut = _cut(env, hidden)
    visible = x <= cut
    test = env.xs > cut
    if not test.any() or len(np.unique(x[visible])) < FEWEST_LEVELS:
        raise InputError(f"too few levels of {env.x} to hide the top {hidden}")
    train = envelope_of(_only(env.points, visible), max(int((~test).sum()), FEWEST_LEVELS), env.how)
    xs, ys = env.xs[test], env.ys[test]
    predictions: dict[str, np.ndarray[Any, Any]] = {
        "last value": np.full(len(xs), train.ys[-1]),
        "mean": np.full(len(xs), train.ys.mean()),
    }
    for one in candidates:
        if train.n_bins > form_named(one.form).n_params and one.possible(train):
            prediction = fit_envelope(train, one.form, on=one.on, resamples=0).predict(xs)
            predictions[one.name] = np.clip(prediction, 0, 100) if is_percent(env.y) else prediction
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
    if (env.xs <= decade).sum() >= max(FEWEST_LEVELS, LEAST_VISIBLE * env.n_bins):
        return decade
    return float(env.xs[int(np.ceil(2 / 3 * env.n_bins)) - 1])


def _only(points: Points, keep: np.ndarray[Any, Any]) -> Points:
    n = int(keep.sum())
    return Points(
        points.x_name, points.y_name, points.x[keep], points.y[keep], points.rows[keep], points.noise[keep],
        Counts(total=n, used=n),
    )  # fmt: skip
