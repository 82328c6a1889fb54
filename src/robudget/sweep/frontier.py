"""The runs that the answer of a study stands on: those on its frontier, which are evaluated in full at last."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from robudget.recipe import Recipe
from robudget.store import Store
from robudget.sweep.queue import SweepState
from robudget.sweep.study import Study


def with_frontier(
    study: Study, recipes: Sequence[Recipe], store: Store, run_all: Callable[[Sequence[Recipe], str], SweepState]
) -> SweepState:
    """`run_all(recipes, title)`, and where the study asks for it and all its runs are done, again for the full
    evaluation of its frontier until that stands. How the last of these ended."""
    state = run_all(recipes, study.name)
    while study.frontier and state.done + state.early == len(study.recipes) and (best := unconfirmed(recipes, store)):
        full = {recipe.id: recipe for recipe in best}
        asked = [full.get(recipe.id, recipe) for recipe in recipes]
        state = run_all(asked, f"{study.name}: its frontier by the standard ensemble")
    return state


def unconfirmed(recipes: Sequence[Recipe], store: Store) -> list[Recipe]:
    """Of the finished runs that version quick evaluated, those that are more accurate than every run of less training
    compute, as recipes of their full evaluation.

    A full evaluation may lower a run and so bring another one to the frontier: ask again after it, until none is left.
    """
    runs = []
    for recipe in recipes:
        folder = store.folder(recipe)
        if folder.has(recipe):
            record = folder.record()
            evaluation = record["evaluation"]
            runs.append((record["training"]["flops_exact"], -evaluation["robust"], evaluation["version"], recipe))
    best, out = -1.0, []
    for _, negative, version, recipe in sorted(runs, key=lambda run: run[:2]):
        if -negative > best:
            best = -negative
            if version == "quick":
                out.append(recipe.evaluated_in_full)
    return out
