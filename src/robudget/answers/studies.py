"""From a study and a table to its answer: the study's runs, named by its axes, given to the analysis it asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

from robudget.answers.answer import Answer, TooFewRuns
from robudget.answers.comparison import changes, comparison
from robudget.answers.exponents import exponents
from robudget.answers.forecast import forecast
from robudget.answers.ranking import ranking
from robudget.errors import InputError, unknown

if TYPE_CHECKING:
    from robudget.sweep.study import Study

# Of an analysis that compares the alternatives of one axis: its function of the runs, their alternative and the axis.
ALONG: dict[str, Callable[[pd.DataFrame, pd.Series, str], Answer]] = {
    "exponents": exponents,
    "comparison": comparison,
    "changes": changes,
}
ANALYSES = (*ALONG, "forecast", "ranking")


def answer(study: Study, table: pd.DataFrame, beside: pd.DataFrame | None = None) -> Answer:
    """`table`: runs, of which those of the study count; `beside`: others' runs, for an analysis that predicts them.

    Raises TooFewRuns naming the study's missing runs where the analysis lacks the variation that it needs, and
    InputError for a study that names no analysis.
    """
    if study.analysis is None:
        raise InputError(f"study {study.name} names no analysis (its key analysis allows: {', '.join(ANALYSES)})")
    if study.analysis not in ANALYSES:
        raise unknown(f"analysis of study {study.name}", study.analysis, ANALYSES)
    if study.analysis in ALONG and study.along is None:
        raise InputError(
            f"study {study.name}: analysis {study.analysis} needs along (allowed: {', '.join(study.axes)})"
        )
    place = {recipe.id: i for i, recipe in enumerate(study.recipes)}
    runs = table[table.run_id.isin(place)] if "run_id" in table else table.iloc[:0]
    runs = runs.sort_values("run_id", key=lambda ids: ids.map(place)).reset_index(drop=True)  # in the study's order
    try:
        if study.analysis in ALONG:
            along = str(study.along)
            group = (
                runs.run_id.map(lambda name: study.choices[place[name]][along]) if len(runs) else pd.Series(dtype=str)
            )
            return ALONG[study.analysis](runs, group, along)
        return forecast(runs, beside) if study.analysis == "forecast" else ranking(runs)
    except TooFewRuns as error:
        missing = [recipe for recipe in study.recipes if recipe.id not in set(runs.run_id)]
        shown = ", ".join(f"{recipe.slug}-{recipe.id}" for recipe in missing[:3]) + (", …" if len(missing) > 3 else "")
        without = (
            f"{len(missing)} of its {len(study.recipes)} runs are missing ({shown})" if missing else "no run is missing"
        )
        raise TooFewRuns(f"study {study.name} is not answered: {error}; {without}") from None
