"""Everything that laws and predictors say of one table, in one call; `robudget fit` and the report show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from robudget.columns import COLUMNS, MAIN_COSTS
from robudget.errors import InputError
from robudget.files import fields
from robudget.laws.envelope import Envelope, How, envelope_of
from robudget.laws.fit import LEVEL, RESAMPLES, auto_bins, fit_envelope, fit_power_law
from robudget.laws.form_selection import Average, Hidden, Holdout, average, fit_forms, holdout
from robudget.laws.forms import FormName, form_named
from robudget.laws.law import Law, Reach
from robudget.prediction.effects import Effects, effects
from robudget.prediction.predictor import PaperGBR, Predictor
from robudget.tables.read import as_table
from robudget.tables.usable import Counts, is_percent, numbers_of, points, select_rows, standard_rows

COSTS = tuple(name for name in MAIN_COSTS if COLUMNS[name].unit != "FLOP")
SPLITS = ("steps", "synthetic", "synthetic_amount", "synthetic_fraction", "loss")
SPLIT_RESAMPLES = 500
MOST_LEVELS = 12


@dataclass(frozen=True)
class BinChoice:
    """The power law under another binning; `how="pareto"` needs none."""

    how: How
    bins: int
    n_bins: int
    C: float
    alpha: float
    rmse: float


@dataclass(frozen=True)
class Split:
    """The power law of the runs with `feature` = `level`; `law` is None where they hold none, and `reason` says why."""

    feature: str
    level: Any
    n_runs: int
    law: Law | None
    reason: str = ""


@dataclass(frozen=True)
class Analysis:
    """What one table says.

    `law` is the headline: `y` over `x` on `envelope` by the form that was asked for, the paper's power law otherwise.
    `forms` are all competing forms there (the headline first) and `average` their weighted answer; `reaches` is what
    round targets cost by that average. `trust` says in sentences which form does better and how far any extrapolates.
    `holdouts` hide the top decade and the top bin. `sensitivity` refits the power law under other binnings. `costs`
    are power laws of every known cost column over `x`, on all runs. `splits` are power laws per attack steps, data
    regime and loss. `published` are the paper's own two laws, from its published columns, where the table has them.
    `effects`, `gbr` and `predictor` are None where the table is too small, which `warnings` say.
    """

    x: str
    y: str
    counts: Counts
    envelope: Envelope
    law: Law
    forms: tuple[Law, ...]
    average: Average | None
    reaches: tuple[Reach, ...]
    holdouts: tuple[Holdout, ...]
    sensitivity: tuple[BinChoice, ...]
    costs: tuple[Law, ...]
    published: tuple[Law, ...]
    splits: tuple[Split, ...]
    effects: Effects | None
    gbr: PaperGBR | None
    predictor: Predictor | None
    warnings: tuple[str, ...]
    table: pd.DataFrame = field(repr=False)

    @property
    def laws(self) -> tuple[Law, ...]:
        """Every law fitted to the whole table, the headline first."""
        return (self.law, *self.forms[1:], *self.costs, *self.published)

    @property
    def trust(self) -> tuple[str, ...]:
        """Which form the points support, which one held out best, and how far beyond its points any was put to the
        test: one sentence each."""
        out = []
        if self.average is not None:
            best, weight = self.average.best, max(self.average.weights)
            out.append(
                f"Of {len(self.average.laws)} forms these points support {best.name} most (Akaike weight "
                f"{weight:.2f}; the headline's {self.law.name}: {self.average.weight(self.law):.2f})."
            )
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
        return {"laws": [law.to_dict() for law in self.laws], "trust": list(self.trust)} | rest


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
) -> Analysis:
    """Fit everything to a table, with `form` in the headline. `choose` selects rows first, e.g. {"dataset":
    "cifar10"}; `predict=False` leaves the predictor, the paper's regressor and the effects out. Raises InputError for a
    table that holds no law."""
    form_named(form)
    table = as_table(source)
    frame = select_rows(table, choose)
    runs = points(frame, x, y)
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
    gains, gbr, predictor = _predictors(frame, seed, warnings) if predict else (None, None, None)
    return Analysis(
        x=x, y=y, counts=runs.counts, envelope=env, law=headline, forms=forms, average=mixture,
        reaches=tuple(mixture.cost_at(t) for t in targets(env)) if mixture else (), holdouts=holdouts,
        sensitivity=_sensitivity(env) if kind != "all" else (),
        costs=_costs(frame, x, y, resamples, level, seed), published=_published(frame, resamples, level, seed),
        splits=tuple(_splits(frame, x, y, level, seed)), effects=gains, gbr=gbr, predictor=predictor,
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


def _sensitivity(env: Envelope) -> tuple[BinChoice, ...]:
    out = []
    counts = sorted({max(5, env.bins // 2), env.bins, 2 * env.bins})
    choices: Sequence[tuple[How, int]] = [
        *(("log", n) for n in counts), ("quantile", env.bins), ("linear", env.bins), ("pareto", 1),
    ]  # fmt: skip
    for how, bins in choices:
        try:
            law = fit_envelope(envelope_of(env.points, bins, how), "power", resamples=0)
        except InputError:  # a frontier of a single run
            continue
        out.append(BinChoice(how, bins, law.n_bins, law.C, law.alpha, law.rmse))
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


def _splits(frame: pd.DataFrame, x: str, y: str, level: float, seed: int) -> list[Split]:
    out: list[Split] = []
    frame = frame[~standard_rows(frame)]  # no robustness law has a point of theirs
    for name in SPLITS:
        levels = sorted(frame[name].dropna().unique()) if name in frame.columns else []
        # Two amounts of synthetic data, one of them none, are what `synthetic` already says.
        if not (3 if name.startswith("synthetic_") else 2) <= len(levels) <= MOST_LEVELS:
            continue
        for value in levels:
            part = frame[(frame[name] == value).to_numpy(dtype=bool)]
            plain_level = value.item() if isinstance(value, np.generic) else value
            try:
                law = fit_power_law(part, x, y, resamples=SPLIT_RESAMPLES, level=level, seed=seed)
            except InputError as error:
                out.append(Split(name, plain_level, len(part), None, str(error)))
                continue
            out.append(Split(name, plain_level, law.n_runs, law))
    return out


def _predictors(
    frame: pd.DataFrame, seed: int, warnings: list[str]
) -> tuple[Effects | None, PaperGBR | None, Predictor | None]:
    try:
        return effects(frame, seed=seed), PaperGBR.fit(frame), Predictor.fit(frame, seed=seed)
    except InputError as error:
        warnings.append(f"no effects and no predictor: {error}")
        return None, None, None
