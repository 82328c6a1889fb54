"""A study that ends by evaluating its best runs in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from robudget.errors import InputError
from robudget.recipe import Recipe
from robudget.runner import run
from robudget.store import Store
from robudget.sweep.frontier import unconfirmed
from robudget.sweep.study import Study


def finished(store: Store, recipe: Recipe, flops: float, robust: float) -> None:
    folder = store.folder(recipe)
    folder.open(recipe)
    evaluation = {"id": recipe.evaluation_id, "version": recipe.evaluation.version, "robust": robust}
    folder.finish({"training": {"flops_exact": flops}, "evaluation": evaluation})


def test_only_runs_on_the_frontier_of_compute_and_accuracy(tmp_path: Path) -> None:
    store = Store(tmp_path)
    recipes = [Recipe().with_({"seed": seed, "evaluation.version": "quick"}) for seed in range(6)]
    cheap, dominated, full, best, tied, unfinished = recipes
    finished(store, cheap, 1.0, 0.30)
    finished(store, dominated, 2.0, 0.28)
    finished(store, full.evaluated_in_full, 3.0, 0.35)
    finished(store, best, 4.0, 0.40)
    finished(store, tied, 5.0, 0.40)
    assert not store.folder(unfinished).has(unfinished)
    assert [r.id for r in unconfirmed(recipes, store)] == [cheap.id, best.id]
    assert {r.evaluation.version for r in unconfirmed(recipes, store)} == {"standard"}
    # In full, the best is worse than it seemed: now the tied one is on the frontier.
    finished(store, cheap.evaluated_in_full, 1.0, 0.29)
    finished(store, best.evaluated_in_full, 4.0, 0.34)
    assert [r.id for r in unconfirmed(recipes, store)] == [tied.id]


def test_a_full_evaluation_answers_for_a_quick_one(tiny: Recipe, tmp_path: Path) -> None:
    quick = tiny.with_({"evaluation.version": "quick"})
    assert quick.evaluated_in_full.evaluation_id == tiny.evaluation_id
    assert tiny.evaluated_in_full is tiny
    run(quick, store=tmp_path)
    folder = Store(tmp_path).folder(quick)
    (full,) = unconfirmed([quick], Store(tmp_path))
    record = run(full, store=tmp_path).record
    assert record["evaluation"]["version"] == "standard"
    assert folder.has(quick)
    assert folder.has(full)
    assert run(quick, store=tmp_path).record == record
    assert unconfirmed([quick], Store(tmp_path)) == []


def test_a_study_asks_for_it() -> None:
    data = {"base": {"evaluation": {"version": "quick"}}, "axes": {"seed": {"a": {"seed": 1}}}}
    assert not Study.from_dict(data, name="s").frontier
    assert Study.from_dict(data | {"frontier": "standard"}, name="s").frontier
    with pytest.raises(InputError, match=r"frontier = 'plus' .allowed: standard"):
        Study.from_dict(data | {"frontier": "plus"}, name="s")
