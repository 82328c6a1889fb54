"""What a predictor may look at before training: the choices of a recipe that vary in a table, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.columns import COLUMNS, FEATURES, NONE_IF_MISSING, Scale
from robudget.columns import column as column_named
from robudget.datasets import PUBLISHED
from robudget.errors import InputError, hint, unknown
from robudget.files import fields
from robudget.meter.conventions import wrn_parameters
from robudget.recipe import Recipe, wide_resnet
from robudget.tables.usable import Floats, check_scope, collapsed_rows, failed_rows, level_of, numbers_of

MOST_UNPUBLISHED = 0.2  # a column with more unknown values than this is no feature
MOST_TRIED = 12  # distinct numbers of a choice up to which another number is one that nobody tried
FEWEST_RUNS = 10
MOST_RUNS = 1_000  # a predictor is fitted on; of more, so many are drawn


@dataclass(frozen=True)
class Feature:
    """One feature of a table: `levels` of a category or flag (ascending), `low` and `high` of a number, and its
    `tried` values (ascending) where they are at most MOST_TRIED."""

    name: str
    kind: Scale
    levels: tuple[str, ...] = ()
    low: float = math.nan
    high: float = math.nan
    tried: tuple[float, ...] = ()
    aliases: tuple[str, ...] = ()  # columns that vary only together with this one: their effects cannot be told apart

    @property
    def width(self) -> int:
        """Matrix columns it takes: one, or one per level of a category of three or more."""
        return len(self.levels) if self.kind == "category" and len(self.levels) > 2 else 1


@dataclass(frozen=True)
class Features:
    """The features of a table; `matrix` turns rows into numbers and `names` says what each matrix column is of."""

    columns: tuple[Feature, ...]

    @classmethod
    def of(cls, frame: pd.DataFrame, names: Sequence[str] | None = None) -> Features:
        """The choices that vary in `frame` (or `names` of them), each standing for those that vary only with it.

        Raises InputError for a name the table lacks, or where nothing varies.
        """
        for name in names or ():
            if name not in frame.columns:
                near = hint(name, map(str, frame.columns), 0.4)
                raise InputError(f"the table has no column {name!r} for a feature{near}")
        wanted = [name for name in (names or FEATURES) if name in frame.columns]
        features: list[Feature] = []
        codes: list[tuple[str, NDArray[np.int64]]] = []
        for name in wanted:
            kind = _scale(frame, name)
            values = _values(frame[name], name, kind)
            code = pd.factorize(values)[0]
            if len(set(code[code >= 0])) < 2 or (code < 0).mean() > MOST_UNPUBLISHED:
                continue
            same = next((i for i, (_, other) in enumerate(codes) if _same_split(code, other)), None)
            if same is not None:
                features[same] = replace(features[same], aliases=(*features[same].aliases, name))
                continue
            codes.append((name, code))
            if kind in ("log", "number"):
                numbers = values.astype(float)
                distinct = np.unique(numbers[~np.isnan(numbers)])
                tried = tuple(distinct.tolist()) if len(distinct) <= MOST_TRIED else ()
                features.append(Feature(name, kind, low=float(distinct[0]), high=float(distinct[-1]), tried=tried))
            else:
                features.append(Feature(name, kind, levels=tuple(sorted({str(v) for v in values.dropna()}))))
        if not features:
            raise InputError(
                f"no choice varies among the {len(frame)} runs of the table: there is nothing to predict from (train "
                "recipes that differ in a choice, e.g. in steps or epochs)"
            )
        return cls(tuple(features))

    @property
    def names(self) -> tuple[str, ...]:
        """The feature behind each matrix column, (p,)."""
        return tuple(feature.name for feature in self.columns for _ in range(feature.width))

    def named(self, name: str) -> Feature:
        """The feature of that name, or the one that stands for it. Raises InputError where there is none."""
        feature = next((c for c in self.columns if name == c.name or name in c.aliases), None)
        if feature is None:
            raise unknown("feature", name, [c.name for c in self.columns])
        return feature

    def matrix(self, rows: pd.DataFrame) -> Floats:
        """Rows (n,) as (n, p) numbers. Raises InputError for a missing column, an unknown level or a missing value.

        By hand: scikit-learn's ColumnTransformer with a OneHotEncoder gives the same numbers in four times the time,
        and its errors do not name the level."""
        parts = []
        for feature in self.columns:
            if feature.name not in rows.columns:
                unit = column_named(feature.name).unit
                other = next((c for c in rows.columns if unit == "FLOP" == column_named(str(c)).unit), None)
                why = f"; {other} counts FLOPs by another convention, which cannot stand for it" if other else ""
                raise InputError(f"a prediction needs {feature.name!r} (a feature of the table it was fitted on){why}")
            values = _values(rows[feature.name], feature.name, feature.kind)
            if values.isna().any():
                raise InputError(f"{feature.name} is unknown for {int(values.isna().sum())} of {len(rows)} recipes")
            if feature.kind in ("log", "number"):
                numbers = values.to_numpy(dtype=np.float64)
                parts.append((np.log(np.maximum(numbers, 0.5)) if feature.kind == "log" else numbers)[:, None])
                continue
            texts = values.astype(str)
            new = sorted(set(texts) - set(feature.levels))
            if new:
                raise InputError(
                    f"{feature.name} = {new[0]} is in no run of the table (found: {', '.join(feature.levels)})"
                )
            table = np.stack([(texts == level).to_numpy(dtype=np.float64) for level in feature.levels], axis=1)
            parts.append(table[:, 1:] if feature.width == 1 else table)
        return np.concatenate(parts, axis=1)

    def known(self, rows: pd.DataFrame) -> NDArray[np.bool_]:
        """Rows of which every feature is known, (n,)."""
        complete = np.ones(len(rows), dtype=np.bool_)
        for feature in self.columns:
            complete &= _values(rows[feature.name], feature.name, feature.kind).notna().to_numpy()
        return complete

    def outside(self, rows: pd.DataFrame) -> list[tuple[str, ...]]:
        """For each row, the numeric features that lie outside the fitted table's range: extrapolations."""
        far = []
        for feature, numbers in self._numbers(rows):
            far.append((numbers < feature.low * (1 - 1e-9)) | (numbers > feature.high * (1 + 1e-9)))
        return self._named_where(far, len(rows))

    def unseen(self, rows: pd.DataFrame) -> list[tuple[str, ...]]:
        """For each row, the numeric features at a value that no run of the fitted table has, inside its range or not:
        4 attack steps where 2 and 5 were run. Of a feature with more than MOST_TRIED values, those outside the range
        only. (A category's unseen level is an error of `matrix`.)"""
        new = []
        for feature, numbers in self._numbers(rows):
            tried = np.array(feature.tried or (feature.low, feature.high))
            apart = ~np.isclose(numbers[:, None], tried[None], rtol=1e-6, atol=1e-12).any(axis=1)
            inside = (numbers > feature.low) & (numbers < feature.high) & (not feature.tried)
            new.append(apart & ~inside)
        return self._named_where(new, len(rows))

    def unpaired(self, rows: pd.DataFrame, table: pd.DataFrame) -> list[tuple[str, ...]]:
        """For each row, the aliases whose value never came with this value of their feature in `table`: the feature
        stands for both there, so that nothing is known of this combination. Unknown values are passed over."""
        out: list[list[str]] = [[] for _ in range(len(rows))]
        for feature in self.columns:
            for name in feature.aliases:
                if name not in rows.columns or name not in table.columns:
                    continue
                known = set(zip(comparable(table[feature.name]), comparable(table[name]), strict=True))
                pairs = zip(comparable(rows[feature.name]), comparable(rows[name]), strict=True)
                for i, (value, other) in enumerate(pairs):
                    if other is not None and (value, other) not in known:
                        out[i].append(name)
        return [tuple(names) for names in out]

    def _numbers(self, rows: pd.DataFrame) -> list[tuple[Feature, Floats]]:
        return [
            (feature, _values(rows[feature.name], feature.name, feature.kind).to_numpy(dtype=np.float64))
            for feature in self.columns
            if feature.kind in ("log", "number")
        ]

    def _named_where(self, flags: list[NDArray[np.bool_]], n: int) -> list[tuple[str, ...]]:
        """Flags (n,) of each numeric feature as the names of those that are set, row by row."""
        names = [feature.name for feature in self.columns if feature.kind in ("log", "number")]
        table = np.stack(flags, axis=1) if flags else np.empty((n, 0), dtype=np.bool_)
        return [tuple(name for name, flag in zip(names, row, strict=True) if flag) for row in table]

    def question(self, column: int, upto: float) -> str:
        """What asks whether matrix column `column` is at most `upto`: `attack steps ≤ 1`, `synthetic data or not`."""
        feature = self.columns[self._owners[column]]
        phrase = column_named(feature.name).phrase
        if feature.kind in ("log", "number"):
            value = round(float(np.exp(upto) if feature.kind == "log" else upto), 6)
            if feature.name == "steps" and value < 1:  # no step: no adversary
                return "trained with an adversary or not"
            return f"{phrase} ≤ {column_named(feature.name).level(level_of(value))} or not"
        level = feature.levels[1 if feature.width == 1 else column - self.names.index(feature.name)]
        return (
            f"{phrase} or not"
            if feature.kind == "flag"
            else f"{phrase} {column_named(feature.name).level(level)} or not"
        )

    @property
    def _owners(self) -> tuple[int, ...]:
        return tuple(i for i, feature in enumerate(self.columns) for _ in range(feature.width))

    def to_dict(self) -> dict[str, Any]:
        return fields(self)


def rows_of(
    recipes: Recipe | Sequence[Recipe] | pd.DataFrame | Mapping[str, Any], table: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Recipes, or features by name, as rows of a table.

    A recipe does not say how many parameters its model has: they are taken from a run of `table` with the same model
    and base, else by arithmetic for a WideResNet on a published dataset, and stay unknown (NaN) otherwise; give
    `parameters` in a mapping then. The images it sees follow from its epochs and the size of the dataset: that of a run
    of `table`, else the published one.
    """
    if isinstance(recipes, pd.DataFrame):
        return recipes
    if isinstance(recipes, Mapping):
        return pd.DataFrame([dict(recipes)])
    listed = [recipes] if isinstance(recipes, Recipe) else list(recipes)
    return pd.DataFrame([_row(recipe, table) for recipe in listed])


def _row(recipe: Recipe, table: pd.DataFrame | None) -> dict[str, Any]:
    return recipe.to_row() | {"parameters": _parameters(recipe, table), "images_seen": _images(recipe, table)}


def _parameters(recipe: Recipe, table: pd.DataFrame | None) -> float:
    if table is not None and {"model", "parameters"} <= set(table.columns):
        same = (table["model"] == recipe.model.name).to_numpy()
        if "base" in table.columns:
            same = same & (table["base"] == recipe.model.base).to_numpy()
        sizes = table.loc[same, "parameters"].dropna()
        if len(sizes):
            return float(sizes.iloc[0])
    shape, dataset = wide_resnet(recipe.model.name), PUBLISHED.get(recipe.data.name)
    if shape is None or dataset is None:
        return math.nan
    channels = dataset.image_shape[0]
    return wrn_parameters(*shape, classes=dataset.classes, base=recipe.model.base, channels=channels)


def _images(recipe: Recipe, table: pd.DataFrame | None) -> float:
    """Images of the whole training: epochs × (`epoch_images`, or what an epoch of the table's dataset holds)."""
    each = float(recipe.epoch_images or math.nan)
    if math.isnan(each) and table is not None and {"dataset", "images_seen", "epochs", "epoch_images"} <= set(table):
        whole = table[(table["dataset"] == recipe.data.name) & table["epoch_images"].isna()]
        images = (whole["images_seen"] / whole["epochs"]).dropna()
        each = float(images.median()) if len(images) else each
    if math.isnan(each) and recipe.data.name in PUBLISHED:
        each = float(PUBLISHED[recipe.data.name].train)
    return recipe.epochs * each


def _scale(frame: pd.DataFrame, name: str) -> Scale:
    if name in COLUMNS:
        return COLUMNS[name].scale
    return "number" if pd.api.types.is_numeric_dtype(frame[name]) else "category"


def _values(series: pd.Series[Any], name: str, kind: Scale) -> pd.Series[Any]:
    if kind in ("log", "number"):
        numbers = pd.to_numeric(series, errors="coerce").astype(float)
        return numbers.fillna(0.0) if name in NONE_IF_MISSING else numbers
    if kind == "flag":
        return series.map(lambda v: v if pd.isna(v) else bool(v)).astype(object)
    return series


def comparable(series: pd.Series[Any]) -> list[Any]:
    """Values that compare across tables: rounded numbers, plain booleans and texts, None where unknown."""
    out: list[Any] = []
    for value in series:
        if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
            out.append(None)
        elif isinstance(value, bool | np.bool_):
            out.append(bool(value))
        elif isinstance(value, int | float | np.number):
            out.append(float(f"{float(value):.6g}"))
        else:
            out.append(str(value))
    return out


def _same_split(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    """Whether two factorised columns split the rows alike."""
    pairs = len(np.unique(a.astype(np.int64) * (b.max() + 2) + b))
    return pairs == len(np.unique(a)) == len(np.unique(b))


# -- the runs to predict from ------------------------------------------------------------------------------------------


def finished_runs(frame: pd.DataFrame) -> tuple[pd.DataFrame, Floats, NDArray[np.bool_]]:
    """Finished runs with a known robust accuracy, their accuracy (n,) in percent, and which collapsed (n,)."""
    check_scope(frame)
    keep = ~failed_rows(frame) & ~np.isnan(numbers_of(frame, "aa_acc", "the target"))
    runs = frame[keep]
    if len(runs) < FEWEST_RUNS:
        raise InputError(
            f"{len(runs)} finished runs are too few for a predictor (allowed: {FEWEST_RUNS} or more, of recipes that "
            "differ in a choice)"
        )
    return runs, numbers_of(runs, "aa_acc"), collapsed_rows(runs)


def runs_with_features(
    frame: pd.DataFrame, names: Sequence[str] | None, seed: int = 0
) -> tuple[pd.DataFrame, Floats, NDArray[np.bool_], Features, NDArray[np.int64]]:
    """As `finished_runs`, but no row of an unknown feature and at most MOST_RUNS; and their positions in `frame`."""
    runs, _, _ = finished_runs(frame.assign(_position=np.arange(len(frame))))
    features = Features.of(runs, names)
    runs = runs[features.known(runs)]
    if len(runs) > MOST_RUNS:
        runs = runs.iloc[np.sort(np.random.default_rng(seed).choice(len(runs), MOST_RUNS, replace=False))]
    runs, y, is_collapsed = finished_runs(runs)
    positions = runs["_position"].to_numpy()
    return runs.drop(columns="_position"), y, is_collapsed, features, positions
