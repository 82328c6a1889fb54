"""Competing forms on one envelope, weighed against each other, and what they say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from robudget.errors import InputError
from robudget.laws import forms
from robudget.laws.bootstrap import resampled
from robudget.laws.envelope import Envelope
from robudget.laws.fit import LEVEL, RESAMPLES, fit_envelope
from robudget.laws.forms import FormName
from robudget.laws.law import Law, On, Reach
from robudget.laws.plain import fields
from robudget.tables.usable import Floats, is_percent


@dataclass(frozen=True)
class Contender:
    """A form and the scale it is fitted on."""

    form: FormName
    on: On = "value"

    @property
    def name(self) -> str:
        return self.form if self.on == "value" else f"{self.form} on {self.on}"

    def possible(self, env: Envelope) -> bool:
        """Whether the form makes sense for this y: only a percentage has an error or odds, and M4 needs one."""
        return is_percent(env.y) or (self.on == "value" and self.form != "m4")


CONTENDERS = (
    Contender("power"), Contender("saturating"), Contender("shifted"), Contender("m4"), Contender("broken"),
    Contender("power", "error"), Contender("power", "logit"),
)  # fmt: skip


def name_of(law: Law) -> str:
    return Contender(law.form, law.on).name


@dataclass(frozen=True)
class Average:
    """Laws on one envelope and their Akaike weights (summing to 1), answering together.

    Intervals are those of the mixture: each law's resamples count with its weight, so that both the scatter of the runs
    and the doubt about the form are in them.
    """

    laws: tuple[Law, ...]
    weights: tuple[float, ...]
    level: float

    @property
    def best(self) -> Law:
        """The law of the largest weight."""
        return self.laws[int(np.argmax(self.weights))]

    def weight(self, law: Law) -> float:
        """The weight of one of the laws; 0 for any other."""
        return next((w for w, one in zip(self.weights, self.laws, strict=True) if one is law), 0.0)

    def predict(self, x: ArrayLike) -> Floats:
        """The weighted mean of the laws at each x, in the units of y."""
        return np.asarray(sum(w * law.predict(x) for w, law in zip(self.weights, self.laws, strict=True)))

    def band(self, x: ArrayLike, level: float | None = None) -> tuple[Floats, Floats]:
        """The mixture's central interval at each x: (low, high), the shape of x."""
        at = np.asarray(x, dtype=np.float64)
        values = np.concatenate([law.values(at.ravel()) for law in self.laws])
        edge = (1 - (self.level if level is None else level)) / 2
        ends = _weighted_quantiles(values, self._draw_weights(), (edge, 1 - edge))
        middle = self.predict(at)
        return np.minimum(ends[0].reshape(at.shape), middle), np.maximum(ends[1].reshape(at.shape), middle)

    def cost_at(self, target: float) -> Reach:
        """The x where the mixture's median law reaches `target`; inf where at least half of the weight never does."""
        first = self.laws[0]
        reaches = [law.cost_at(target) for law in self.laws]
        costs = np.concatenate([law.costs(target) for law in self.laws])
        weights = self._draw_weights()
        edge = (1 - self.level) / 2
        points = np.array([reach.value for reach in reaches])
        value = float(_weighted_quantiles(points[:, None], np.array(self.weights), (0.5,))[0, 0])
        low, high = (float(v[0]) for v in _weighted_quantiles(costs[:, None], weights, (edge, 1 - edge)))
        return Reach(
            first.x, first.y, float(target), value, min(low, value), max(high, value),
            float(weights[np.isinf(costs)].sum()), first.decades_beyond(value), self.level,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        names = [name_of(law) for law in self.laws]
        return fields(self) | {"laws": names, "weights": dict(zip(names, self.weights, strict=True))}

    def _draw_weights(self) -> Floats:
        parts = [
            np.full(len(law.draws), w / max(len(law.draws), 1)) for w, law in zip(self.weights, self.laws, strict=True)
        ]
        return np.concatenate(parts)


def fit_forms(
    env: Envelope, contenders: Sequence[Contender] = CONTENDERS, *, resamples: int = RESAMPLES, level: float = LEVEL,
    seed: int = 0,
) -> tuple[Law, ...]:  # fmt: skip
    """Every contender that the envelope has points for (one more than the form's parameters), fitted."""
    drawn = resampled(env, resamples, np.random.default_rng(seed)) if resamples else None
    return tuple(
        fit_envelope(env, one.form, on=one.on, resamples=resamples, level=level, seed=seed, drawn=drawn)
        for one in contenders
        if one.possible(env) and env.n_bins > forms.get(one.form).n_params
    )


def average(laws: Sequence[Law]) -> Average:
    """Akaike weights from each law's AICc on the same envelope. Raises InputError for laws of different envelopes."""
    if not laws:
        raise InputError("no law to average: the envelope has too few points for any form")
    if any(law.envelope is not laws[0].envelope for law in laws):
        raise InputError("only laws of one envelope can be averaged")
    scores = np.array([law.aicc for law in laws])
    if not np.isfinite(scores).any():  # too few points to tell: the simplest speaks
        scores = np.array([float(law.n_params) for law in laws]) * 10
    raw = np.exp(-0.5 * (scores - scores[np.isfinite(scores)].min()))
    weights = raw / raw.sum()
    return Average(tuple(laws), tuple(float(w) for w in weights), laws[0].level)


def _weighted_quantiles(values: Floats, weights: Floats, levels: Sequence[float]) -> Floats:
    """Quantiles over the first axis of (d, n) with weights (d,), by the step function: (len, n)."""
    order = np.argsort(values, axis=0, kind="stable")
    ranked = np.take_along_axis(values, order, axis=0)
    share = np.cumsum(weights[order], axis=0) / weights.sum()
    out = np.empty((len(levels), values.shape[1]))
    for i, level in enumerate(levels):
        index = np.minimum((share < level - 1e-12).sum(axis=0), len(values) - 1)
        out[i] = np.take_along_axis(ranked, index[None], axis=0)[0]
    return out
