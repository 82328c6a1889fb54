"""The runs that the answer of a study stands on: those on its frontier, which are evaluated in full at last."""

from __future__ import annotations

from collections.abc import Sequence

from robudget.recipe import Recipe
from robudget.store import Store


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
