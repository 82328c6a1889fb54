"""From a study and a table to its answer: the study's runs, named by its axes, given to the analysis it asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

from robudget.answers.amounts import amounts
from robudget.answers.answer import Answer, TooFewRuns
from robudget.answers.comparison import changes, comparison
from robudget.answers.exponents import exponents
from robudget.answers.forecast import forecast
from robudget.answers.ranking import ranking
from robudget.errors import InputError, unknown
from robudget.tables.usable import collapsed_rows

if TYPE_CHECKING:
    from robudget.sweep.study import Study

# Of an analysis that compares the alternatives of one axis: its function of the runs, their alternative and the axis.
ALONG: dict[str, Callable[[pd.DataFrame, pd.Series, str], Answer]] = {
    "exponents": exponents,
    "comparison": comparison,
    "changes": changes,
}
ANALYSES = (*ALONG, "amounts", "forecast", "ranking")


def answer(study: Study, table: pd.DataFrame, beside: pd.DataFrame | None = None) -> Answer:
    """`table`: runs, of which those of the study count; `beside`: others' runs, for an analysis that predicts them.

    Raises TooFewRuns naming the study's missing runs where the analysis lacks the variation that it needs, and
    InputError for a study that names no analysis.
    """
    if study.analysis is None:
        raise InputError(f"study {study.name} names no analysis (its key analysis allows: {', '.join(ANALYSES)})")
    if study.analysis not in ANALYSES:
        raise unknown(f"analysis of study {study.name}", study.analysis, ANALYSES)
    if study.analysis in (*ALONG, "amounts") and study.along is None:
        raise InputError(
            f"study {study.name}: analysis {study.analysis} needs along (allowed: {', '.join(study.axes)})"
        )
    place = {recipe.id: i for i, recipe in enumerate(study.recipes)}
    if "run_id" not in table:
        raise InputError("the table has no column run_id, by which the runs of a study are known")
    runs = table[table.run_id.isin(place)]
    runs = runs.sort_values("run_id", key=lambda ids: ids.map(place)).reset_index(drop=True)  # in the study's order
    mine, along = [place[name] for name in runs.run_id], str(study.along)
    try:
        if study.analysis in ALONG:
            return ALONG[study.analysis](runs, _choices(study, mine, along), along)
        if study.analysis == "amounts":
            return _amounts(study, runs, mine)
        return forecast(runs, beside) if study.analysis == "forecast" else ranking(runs)
    except TooFewRuns as error:
        missing = [recipe for recipe in study.recipes if recipe.id not in set(runs.run_id)]
        shown = ", ".join(f"{recipe.slug}-{recipe.id}" for recipe in missing[:3]) + (", …" if len(missing) > 3 else "")
        without = (
            f"{len(missing)} of its {len(study.recipes)} runs are missing ({shown})" if missing else "no run is missing"
        )
        fell = f", {n} collapsed" if len(runs) and (n := int(collapsed_rows(runs).sum())) else ""
        raise TooFewRuns(f"study {study.name} is not answered: {error}; {without}{fell}") from None


def _choices(study: Study, places: list[int], axis: str) -> pd.Series:
    """The alternative of `axis` of the recipes at `places`."""
    return pd.Series([study.choices[i][axis] for i in places], dtype=object)


def _amounts(study: Study, runs: pd.DataFrame, places: list[int]) -> Answer:
    """The axes of the study that change the number of real images are the amount; all others but `along` the block."""
    recipes, along = [study.recipes[i] for i in places], str(study.along)
    if any(recipe.data.amount is None for recipe in study.recipes):
        raise InputError(f"study {study.name}: analysis amounts needs data.amount in every recipe")
    real = [float(recipe.data.amount or 0) for recipe in recipes]
    others = [
        axis
        for axis, alternatives in study.axes.items()
        if axis != along and not any("data.amount" in change for change in alternatives.values())
    ]
    block = ["/".join(study.choices[i][axis] for axis in others) for i in places]
    return amounts(runs, _choices(study, places, along), real, block, along, next(iter(study.axes[along])))
