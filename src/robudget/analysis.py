"""Everything that laws and predictors say of one table, in one call; `robudget fit` and the report show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import chdtrc

from robudget.columns import COLUMNS, MAIN_COSTS, column
from robudget.errors import InputError
from robudget.files import fields
from robudget.formats import number
from robudget.laws.envelope import Envelope, How, envelope_of
from robudget.laws.fit import LEVEL, RESAMPLES, auto_bins, fit_envelope, fit_power_law
from robudget.laws.form_selection import SCALED_FORMS, Average, Hidden, Holdout, average, fit_forms, holdout
from robudget.laws.forms import FormName, form_named
from robudget.laws.frontier import FEWEST_RUNS, Frontier, fit_frontier
from robudget.laws.frontier_posterior import CURVES
from robudget.laws.law import Law
from robudget.laws.price import Price, cost_laws, next_target, price_limit, price_of, same_clock
from robudget.prediction.effects import Effects, effects, holm
from robudget.prediction.paper_predictor import PaperGBR
from robudget.prediction.predictor import Predictor
from robudget.prediction.small_runs import SmallRuns, small_runs
from robudget.tables.read import as_table
from robudget.tables.usable import (
    Counts,
    Points,
    check_not_tied,
    is_percent,
    numbers_of,
    points,
    select_rows,
    standard_rows,
)

COSTS = tuple(name for name in MAIN_COSTS if COLUMNS[name].unit != "FLOP")
SPLITS = ("steps", "synthetic", "synthetic_amount", "synthetic_fraction", "loss")
SPLIT_RESAMPLES = 500
MOST_LEVELS = 12
PRICED_FORMS = tuple(one for one in SCALED_FORMS if one.form in ("power", "saturating"))  # under other binnings
REGIME = "synthetic"  # the choice within which other splits are repeated
DIFFERENT = 0.05  # p-value below which levels are said to differ


@dataclass(frozen=True)
class BinChoice:
    """The power law under another binning (`how="pareto"` needs none), and what one point more than the best run costs
    by the weighted average of PRICED_FORMS there; inf beyond what prices may say (`price.Price.limit`)."""

    how: How
    bins: int
    n_bins: int
    C: float
    alpha: float
    rmse: float
    next_point: float


@dataclass(frozen=True)
class Split:
    """The runs with `feature` = `level`, or of those the ones with the choice `within` (a column and its level).

    `frontier` is theirs by its power form, from all of them; `law` the paper's on the best of their bins. None where
    they hold none, and `reason` says why.
    """

    feature: str
    level: Any
    n_runs: int
    law: Law | None
    frontier: Frontier | None = None
    reason: str = ""
    within: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Comparison:
    """Whether the exponents of a choice's levels differ: Cochran's Q (1954) over the frontiers' exponents and its
    p-value; `within` as in Split. `low` and `high` span the levels' exponents; `stands` says whether they differ by
    Holm's correction over the `among` comparisons made."""

    feature: str
    within: tuple[str, Any] | None
    levels: int
    low: float
    high: float
    p_value: float
    among: int = 1
    stands: bool = False

    def sentence(self) -> str:
        """Such as `attack steps, within runs with synthetic data: no difference seen between 4 levels (α 0.010 to
        0.012, p = 0.80)`."""
        where = (
            f", within runs with {column(self.within[0]).phrase} {column(self.within[0]).level(self.within[1])}"
            if self.within
            else ""
        )
        chance = f"no difference that stands among the {self.among} comparisons made"
        verdict = "no difference seen" if self.p_value >= DIFFERENT else "a difference" if self.stands else chance
        return (
            f"{column(self.feature).phrase}{where}: {verdict} between the exponents of {self.levels} levels "
            f"(α {number(self.low, 2)} to {number(self.high, 2)}; Cochran's Q, p = {self.p_value:.2g})"
        )


@dataclass(frozen=True)
class Analysis:
    """What one table says.

    `law` is the headline: `y` over `x` on `envelope` by the form that was asked for, the paper's power law otherwise.
    `forms` are all competing forms there (the headline first) and `average` their weighted answer. `frontier` is
    fitted to all usable runs without bins (None where `y` is no percentage or the runs are too few), and `prices` are
    what round targets cost by it. `answer` is the whole in one sentence, `support` what it stands on. `trust` says in
    sentences which form does better and how far any extrapolates. `holdouts` hide the top decade and the top bin.
    `sensitivity` refits the power law and the price of the next point under other binnings. `costs` are power laws of
    every known cost column over `x`, on all runs. `splits` are power laws per attack steps, data regime and loss, by
    their frontiers too, and `comparisons` whether exponents differ. `published` are the paper's own two laws, from its
    published columns, where the table has them. `effects`, `gbr` and `predictor` are None where the table is too small,
    which `warnings` say, and `small_runs` where it cannot say how well cheaper runs rank choices.
    """

    x: str
    y: str
    counts: Counts
    envelope: Envelope
    law: Law
    forms: tuple[Law, ...]
    average: Average | None
    frontier: Frontier | None
    prices: tuple[Price, ...]
    holdouts: tuple[Holdout, ...]
    sensitivity: tuple[BinChoice, ...]
    costs: tuple[Law, ...]
    published: tuple[Law, ...]
    splits: tuple[Split, ...]
    comparisons: tuple[Comparison, ...]
    effects: Effects | None
    gbr: PaperGBR | None
    predictor: Predictor | None
    small_runs: SmallRuns | None
    warnings: tuple[str, ...]
    table: pd.DataFrame = field(repr=False)

    @property
    def laws(self) -> tuple[Law, ...]:
        """Every law fitted to the whole table, the headline first."""
        return (self.law, *self.forms[1:], *self.costs, *self.published)

    @property
    def answer(self) -> str:
        """What these runs say, in a sentence with its interval."""
        return self.frontier.sentence() if self.frontier else self.law.sentence() + "."

    @property
    def support(self) -> tuple[str, ...]:
        """What the answer stands on, a sentence each: runs, frontier, its test, the price of the next point."""
        span = f"The runs used span {self.envelope.decades:.1f} decades of {column(self.x).phrase}."
        out = [f"{self.counts.sentence()}. {span}"]
        if self.frontier:
            out += self.frontier.support()
        if self.prices:
            out.append(f"One point more than the best run: {self.prices[0].sentence()}.")
        return tuple(out)

    @property
    def clocks(self) -> tuple[tuple[Law, dict[str, float]], ...]:
        """The laws of cost, those that are one quantity times constants as one law: the law, and each other column's
        constant."""
        return same_clock(self.costs)

    @property
    def trust(self) -> tuple[str, ...]:
        """Which form the points support, which one held out best, and how far beyond its points any was put to the
        test: one sentence each."""
        out = []
        if self.average is not None:
            out.append(self.average.support())
        for hidden in self.holdouts:
            miss = hidden.miss(self.law.name)
            own = f" The headline's {miss.name} form missed by {miss.rmse:.2f}." if miss else ""
            out.append(f"Hiding the top {hidden.hidden}, {hidden.decades:.1f} decades: {hidden.sentence()}{own}")
        span = self.envelope
        tested = max((h.decades for h in self.holdouts), default=0.0)
        out.append(
            f"The runs span {span.decades:.1f} decades and end at {span.points.x.max():.3g} {self.x}; "
            + (
                f"nothing was tested more than {tested:.1f} decades beyond its points."
                if tested
                else "no extrapolation was tested."
            )
        )
        return tuple(out)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; each of `laws` holds form, C, alpha, alpha_interval, r2, n_runs, n_bins, x, y."""
        rest = {n: v for n, v in fields(self).items() if n not in ("law", "forms", "costs", "published")}
        sentences = {"answer": self.answer, "support": list(self.support), "trust": list(self.trust)}
        return {"laws": [law.to_dict() for law in self.laws]} | sentences | rest


def analyse(
    source: pd.DataFrame | str | Path,
    x: str = "train_flops_exact",
    y: str = "aa_acc",
    *,
    choose: Mapping[str, Any] | None = None,
    form: FormName = "power",
    bins: int | Literal["auto"] = "auto",
    how: How | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    predict: bool = True,
    predictor: bool = True,
    details: bool = True,
    splits: bool = True,
) -> Analysis:
    """Fit everything to a table, with `form` in the headline. `choose` selects rows first, e.g. {"dataset":
    "cifar10"}; `predict=False` leaves the predictor, the paper's regressor and the effects out, `predictor=False` the
    predictor only, `splits=False` the laws of parts of the table and under other binnings.
    Raises InputError for a table that holds no law."""
    form_named(form)
    table = as_table(source)
    frame = select_rows(table, choose)
    runs = points(frame, x, y)
    check_not_tied(y, runs.y)
    kind: How = how or ("log" if is_percent(y) else "all")
    env = envelope_of(runs, auto_bins(runs.counts.used) if bins == "auto" else bins, kind)
    laws = fit_forms(env, resamples=resamples, level=level, seed=seed) if is_percent(y) else ()
    headline = next((law for law in laws if law.name == form), None)
    headline = headline or fit_envelope(env, form, resamples=resamples, level=level, seed=seed)
    forms = (headline, *(law for law in laws if law is not headline))
    warnings = [*table.attrs.get("notes", ()), *(w for law in forms for w in law.warnings)]
    mixture = average(laws) if laws else None
    holdouts = tuple(h for h in (_holdout(env, hidden, warnings) for hidden in ("decade", "bin")) if h is not None)
    warnings += [w for h in holdouts[:1] for w in h.warnings()]
    gains, gbr, fitted = _predictors(frame, seed, predictor, details, warnings) if predict else (None, None, None)
    law = _frontier(runs, level, seed, warnings)
    bills = cost_laws(frame, x, seed=seed) if law else {}
    parts = tuple(_splits(frame, x, y, level, seed, details)) if splits else ()
    return Analysis(
        x=x, y=y, counts=runs.counts, envelope=env, law=headline, forms=forms, average=mixture,
        frontier=law, prices=tuple(price_of(law, t, frame, bills) for t in targets(env)) if law else (),
        holdouts=holdouts, sensitivity=_sensitivity(env, law) if splits and kind != "all" else (),
        costs=_costs(frame, x, y, resamples, level, seed), published=_published(frame, resamples, level, seed),
        splits=parts, comparisons=_comparisons(parts), effects=gains, gbr=gbr, predictor=fitted,
        small_runs=_small_runs(frame, x, seed, warnings) if predict else None,
        warnings=tuple(dict.fromkeys(warnings)), table=frame,
    )  # fmt: skip


def targets(env: Envelope) -> tuple[float, ...]:
    """One point better than the best run, and the fives beyond it up to 90 (below, down to 10, for an error)."""
    if env.best == "max":
        best = float(env.ys.max())
        return (round(best + 1, 1), *(float(t) for t in range(5, 95, 5) if t > best + 1)) if best < 98 else ()
    best = float(env.ys.min())
    return (round(best - 1, 1), *(float(t) for t in range(90, 5, -5) if t < best - 1)) if best > 2 else ()


def _holdout(env: Envelope, hidden: Hidden, warnings: list[str]) -> Holdout | None:
    try:
        return holdout(env, hidden)
    except InputError as error:
        warnings.append(f"no hold-out of the top {hidden}: {error}")
        return None


def _frontier(runs: Points, level: float, seed: int, warnings: list[str]) -> Frontier | None:
    if not is_percent(runs.y_name):
        return None
    try:
        return fit_frontier(runs, level=level, seed=seed)
    except InputError as error:
        warnings.append(f"no frontier and no prices: {error}")
        return None


def _sensitivity(env: Envelope, law: Frontier | None) -> tuple[BinChoice, ...]:
    out = []
    counts = sorted({max(5, env.bins // 2), env.bins, 2 * env.bins})
    limit = price_limit(law) if law else np.inf
    choices: Sequence[tuple[How, int]] = [
        *(("log", n) for n in counts), ("quantile", env.bins), ("linear", env.bins), ("pareto", 1),
    ]  # fmt: skip
    for how, bins in choices:
        try:
            other = envelope_of(env.points, bins, how)
            power = fit_envelope(other, "power", resamples=0)
        except InputError:  # a frontier of a single run
            continue
        forms = fit_forms(other, PRICED_FORMS, resamples=0) if is_percent(env.y) else ()
        cost = average(forms).cost_at(next_target(env.points)).value if forms else np.nan
        cost = cost if cost <= limit else np.inf
        out.append(BinChoice(how, bins, power.n_bins, power.C, power.alpha, power.rmse, float(cost)))
    return tuple(out)


def _costs(frame: pd.DataFrame, x: str, y: str, resamples: int, level: float, seed: int) -> tuple[Law, ...]:
    out = []
    for name in COSTS:
        if name in (x, y) or name not in frame.columns or (numbers_of(frame, name) > 0).sum() < 3:
            continue
        out.append(fit_power_law(frame, x, name, resamples=resamples, level=level, seed=seed))
    return tuple(out)


def _published(frame: pd.DataFrame, resamples: int, level: float, seed: int) -> tuple[Law, ...]:
    x = "published_run_tflops"
    if x not in frame.columns or frame[x].isna().any():
        return ()
    return tuple(
        fit_power_law(frame, x, y, resamples=resamples, level=level, seed=seed) for y in ("aa_acc", "cost_usd")
    )


def _splits(frame: pd.DataFrame, x: str, y: str, level: float, seed: int, details: bool) -> list[Split]:
    out: list[Split] = []
    frame = frame[~standard_rows(frame)]  # no robustness law has a point of theirs
    for name in SPLITS:
        out += _levels(frame, name, x, y, level, seed, details)
    regimes = [s for s in out if s.feature == REGIME]
    for regime in regimes:
        part = frame[(frame[REGIME] == regime.level).to_numpy(dtype=bool)]
        for name in ("steps", "loss"):
            inside = _levels(part, name, x, y, level, seed, details)
            out += [replace(split, within=(REGIME, regime.level)) for split in inside]
    return out


def _levels(frame: pd.DataFrame, name: str, x: str, y: str, level: float, seed: int, details: bool) -> list[Split]:
    levels = sorted(frame[name].dropna().unique()) if name in frame.columns else []
    # Two amounts of synthetic data, one of them none, are what `synthetic` already says.
    if not (3 if name.startswith("synthetic_") else 2) <= len(levels) <= MOST_LEVELS:
        return []
    out = []
    for value in levels:
        part = frame[(frame[name] == value).to_numpy(dtype=bool)]
        plain_level = value.item() if isinstance(value, np.generic) else value
        law = frontier = None
        try:
            runs = points(part, x, y)
            if details:
                law = fit_power_law(part, x, y, resamples=SPLIT_RESAMPLES, level=level, seed=seed)
            if is_percent(y) and len(runs.x) >= FEWEST_RUNS:
                frontier = fit_frontier(runs, level=level, seed=seed, test=False, curves=CURVES[:1])
        except InputError as error:
            out.append(Split(name, plain_level, len(part), None, None, str(error)))
            continue
        out.append(Split(name, plain_level, runs.counts.used, law, frontier))
    return out


def _comparisons(splits: Sequence[Split]) -> tuple[Comparison, ...]:
    out = []
    for feature, within in dict.fromkeys((s.feature, s.within) for s in splits):
        laws = [s.frontier for s in splits if (s.feature, s.within) == (feature, within) and s.frontier]
        if len(laws) < 2:
            continue
        alphas = np.array([law.alpha for law in laws])
        weight = np.array([1 / max(law.alpha_sd, 1e-9) ** 2 for law in laws])
        q = float((weight * (alphas - np.average(alphas, weights=weight)) ** 2).sum())
        p_value = float(chdtrc(len(laws) - 1, q))
        out.append(Comparison(feature, within, len(laws), float(alphas.min()), float(alphas.max()), p_value))
    standing = holm([c.p_value for c in out], DIFFERENT)
    return tuple(replace(c, among=len(out), stands=stands) for c, stands in zip(out, standing, strict=True))


def _predictors(
    frame: pd.DataFrame, seed: int, predictor: bool, details: bool, warnings: list[str]
) -> tuple[Effects | None, PaperGBR | None, Predictor | None]:
    try:
        gains = effects(frame, seed=seed) if details else effects(frame, resamples=0)
        gbr = PaperGBR.fit(frame) if details else None
        return gains, gbr, Predictor.fit(frame, seed=seed) if predictor else None
    except InputError as error:
        warnings.append(f"no effects and no predictor: {error}")
        return None, None, None


def _small_runs(frame: pd.DataFrame, x: str, seed: int, warnings: list[str]) -> SmallRuns | None:
    costs = [name for name in (x, *MAIN_COSTS) if name in MAIN_COSTS and name in frame.columns]
    cost = next((name for name in costs if (numbers_of(frame, name) > 0).any()), None)
    try:
        return small_runs(frame, cost, seed=seed) if cost else None
    except InputError as error:  # nothing that spends compute varies, or nothing else
        warnings.append(str(error))
        return None
