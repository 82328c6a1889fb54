from pathlib import Path

import pytest

from robudget.errors import InputError
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.sweep.ray import sweep_on_ray
from robudget.tables.read import load_runs


def test_a_cluster_of_this_machine_runs_what_is_not_done(tiny: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    recipes = [tiny, tiny.with_({"seed": 1}), tiny.with_({"model.name": "wrn-11-1"})]
    state = sweep_on_ray(recipes, store=tmp_path, site=Site(device="cpu", threads=1), gpus_per_run=0)
    assert sorted(state.finished) == [0, 1]
    assert "depth must be 6n + 4" in state.failed[2]
    assert len(load_runs(tmp_path)) == 2
    again = sweep_on_ray(recipes[:2], store=tmp_path, gpus_per_run=0)
    assert (again.done, again.to_do) == (2, [])


def test_without_ray_it_says_how_to_get_it(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"robudget\[ray\]"):
        sweep_on_ray([tiny], store=tmp_path)
