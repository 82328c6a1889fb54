"""Adaptive stopping: on made-up curves, beside the published algorithm written plainly; and for real."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from robudget.errors import InputError
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Store
from robudget.sweep.drive import Terms, drive
from robudget.sweep.executor import Event, Job
from robudget.sweep.halving import Adaptive, Standing, judge, rungs
from robudget.sweep.queue import SweepState
from robudget.tables.read import load_runs
from robudget.tables.usable import points

Run = Callable[..., tuple[int, str, str]]
EPOCHS = 27
CPU = Site(device="cpu")


def study(n: int, **changes: Any) -> list[Recipe]:
    return [Recipe().with_({"seed": seed, "epochs": EPOCHS} | changes) for seed in range(n)]


class Curves:
    """An executor of trainings that follow made-up curves of validation; attempts end in the order of their begin."""

    def __init__(self, recipes: Sequence[Recipe], curves: Sequence[Sequence[float]], slots: int) -> None:
        self.recipes, self.curves, self.slots = recipes, curves, slots
        self.jobs: list[tuple[int, int]] = []  # run, where it pauses
        self.flying: list[tuple[int, Job]] = []
        self.until_killed = -1

    def submit(self, number: int, job: Job) -> None:
        self.jobs.append((number, job.pause_epoch))
        self.flying.append((number, job))

    def events(self, timeout: float) -> list[Event]:
        if not self.flying:
            return []
        if self.until_killed == 0:
            raise KeyboardInterrupt
        self.until_killed -= 1
        number, job = self.flying.pop(0)
        recipe, curve = self.recipes[number], self.curves[number]
        folder = Store(job.store).folder(recipe)
        folder.open(recipe)
        folder.go_on()
        begun = max((event["epoch"] for event in folder.events("epoch")), default=0)
        for epoch in range(begun + 1, (job.pause_epoch or EPOCHS) + 1):
            folder.log("epoch", epoch=epoch, val_robust=curve[epoch - 1])
        training = {"seconds": 1.0, "energy": {"kwh": 1.0}, "flops_exact": 1e9, "collapsed_at": []}
        if job.pause_epoch:
            folder.leave({"status": "paused", "why": "", "training": training, "recipe": recipe.to_dict()})
            return [Event(number, "paused")]
        folder.finish({"environment": {}, "training": training, "evaluation": {"id": recipe.evaluation_id} | training})
        return [Event(number, "done")]

    def cancel(self, number: int) -> None:
        raise AssertionError

    def close(self) -> None:
        pass


def made_up(n: int, seed: int) -> list[list[float]]:
    """Noisy rises to levels of their own, so that ranks change on the way."""
    chance = random.Random(seed)
    curves = []
    for _ in range(n):
        level, speed = chance.uniform(0.2, 0.6), chance.uniform(0.05, 0.5)
        curves.append([level * (1 - (1 - speed) ** (e + 1)) + chance.uniform(-0.05, 0.05) for e in range(EPOCHS)])
    return curves


def sweep(recipes: Sequence[Recipe], executor: Curves, store: Path, eta: int = 3) -> SweepState:
    terms = Terms(ranks=range(len(recipes)), adaptive=Adaptive(eta))
    return drive(recipes, lambda runs: executor, store=store, site=CPU, terms=terms)


def asha(curves: Sequence[Sequence[float]], eta: int, at: Sequence[int], workers: int) -> list[tuple[int, int]]:
    """Algorithm 2 of Li et al. 2020 over a finite list of configurations: jobs as (configuration, rung's epoch)."""
    reached: list[dict[int, float]] = [{} for _ in at]
    promoted: list[set[int]] = [set() for _ in at]
    fresh, flying, jobs = list(range(len(curves))), [], []
    goals = [*at, 0]

    def best(rung: int) -> list[int]:
        return sorted(reached[rung], key=lambda i: (-reached[rung][i], i))

    def get_job() -> tuple[int, int] | None:
        for rung in reversed(range(len(at))):
            for i in best(rung)[: len(reached[rung]) // eta]:
                if i not in promoted[rung]:
                    promoted[rung].add(i)
                    return i, rung + 1
        if fresh:
            return fresh.pop(0), 0
        for rung in range(len(at)):  # ours: where nobody else can come, the best of too few goes on
            if any(goal <= rung for _, goal in flying):
                return None
            if reached[rung] and len(reached[rung]) < eta and not promoted[rung]:
                promoted[rung].add(best(rung)[0])
                return best(rung)[0], rung + 1
        return None

    while True:
        while len(flying) < workers and (job := get_job()) is not None:
            flying.append(job)
            jobs.append((job[0], goals[job[1]]))
        if not flying:
            return jobs
        i, goal = flying.pop(0)
        if goal < len(at):
            reached[goal][i] = max(curves[i][: at[goal]])


@pytest.mark.parametrize(("n", "workers", "seed"), [(1, 1, 0), (2, 2, 1), (9, 1, 2), (20, 3, 3), (31, 8, 4)])
def test_the_driver_makes_the_jobs_of_the_published_algorithm(n: int, workers: int, seed: int, tmp_path: Path) -> None:
    recipes, curves = study(n), made_up(n, seed)
    executor = Curves(recipes, curves, workers)
    state = sweep(recipes, executor, tmp_path)
    assert executor.jobs == asha(curves, 3, [1, 3, 9], workers)
    assert state.finished
    assert sorted([*state.finished, *state.ended_early]) == list(range(n))
    for index, why in state.ended_early.items():
        assert why.startswith("ended early at epoch ")
        assert [e["text"] for e in Store(tmp_path).folder(recipes[index]).events("ended early")] == [why]


def test_a_driver_that_was_killed_decides_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipes, curves = study(12), made_up(12, 5)
    whole = sweep(recipes, Curves(recipes, curves, 1), tmp_path / "whole")
    for jobs in (3, 4, 6):
        executor = Curves(recipes, curves, 1)
        executor.until_killed = jobs
        with pytest.raises(KeyboardInterrupt):
            sweep(recipes, executor, tmp_path / "killed")
    last = sweep(recipes, Curves(recipes, curves, 1), tmp_path / "killed")
    kept = {folder.recipe.seed for folder in Store(tmp_path / "killed").folders() if folder.done}
    assert kept == set(whole.finished)
    assert last.ended_early | last.ended_before == whole.ended_early


def test_ended_runs_stay_ended_until_the_sweep_is_typed_without_the_option(tmp_path: Path) -> None:
    recipes, curves = study(6), made_up(6, 6)
    first = sweep(recipes, Curves(recipes, curves, 2), tmp_path)
    again = sweep(recipes, executor := Curves(recipes, curves, 2), tmp_path)
    assert (executor.jobs, again.to_do) == ([], [])
    assert again.ended_before == first.ended_early
    assert again.done == len(first.finished)
    plain = drive(recipes, lambda runs: executor, store=tmp_path, site=CPU)
    assert plain.done == 6
    assert {index for index, _ in executor.jobs} == set(first.ended_early)
    epochs = [[event["epoch"] for event in folder.events("epoch")] for folder in Store(tmp_path).folders()]
    assert epochs == [list(range(1, EPOCHS + 1))] * 6, "finished from where they were"
    assert not any(folder.ended_early for folder in Store(tmp_path).folders())


def test_a_limit_ends_no_run_and_a_failed_run_holds_none_up(tmp_path: Path) -> None:
    recipes, curves = study(6), made_up(6, 7)
    terms = Terms(ranks=range(6), adaptive=Adaptive(3), limit=3)
    state = drive(recipes, lambda runs: Curves(recipes, curves, 1), store=tmp_path, site=CPU, terms=terms)
    assert (state.ended_early, state.failed) == ({}, {})
    one = Standing((0.5,), waits=True)
    assert judge({0: one, 1: Standing()}, 3) == ([], {})
    assert judge({0: one, 1: Standing(over=True)}, 3) == ([0], {})


def test_rungs_are_shares_of_the_epochs_that_are_validated() -> None:
    assert rungs(study(1), 3) == [(1, 3, 9)]
    long = Recipe().with_({"epochs": 100})
    assert rungs([long, *study(1)], 3) == [(4, 11, 33), (1, 3, 9)]
    assert rungs([long.with_({"validation.every": 10}), Recipe().with_({"loss": "standard"})], 3) == [(10, 30), ()]
    with pytest.raises(InputError, match=r"is validated 2 times only \(allowed: 3 times or more\)"):
        rungs([long, long.with_({"epochs": 2})], 3)
    with pytest.raises(InputError, match=r"--halving 1 \(allowed: 2 or more"):
        Adaptive(1)


@pytest.mark.usefixtures("forks")
def test_a_study_in_which_runs_are_ended_early(uneven: dict[str, Any], tmp_path: Path, robudget_command: Run) -> None:
    """On digits: one recipe forgets its robustness to many steps and is ended, two that learn nothing are halved away;
    no law takes them for finished, and the command without the options finishes them."""
    study, store = tmp_path / "study.yaml", tmp_path / "runs"
    alternatives = uneven["axes"]["recipe"]
    alternatives["weaker"] = alternatives["weak"] | {"seed": 1}
    study.write_text(json.dumps(uneven))
    words = ["sweep", str(study), "device=cpu", "threads=1", "--store", str(store), "--workers", "1"]
    options = ["--halving", "2", "--end-collapsed"]
    code, said, error = robudget_command(*words, *options)
    assert code == 0, error
    assert "3 ended early by a sweep, in no law" in said
    assert "3 runs were ended early: saved " in error
    assert " FLOP, " in error
    reasons = [folder.ended_early for folder in Store(store).folders() if not folder.done]
    assert sum("catastrophic overfitting at epoch" in str(why) for why in reasons) == 1
    assert sum("of 3 there, and 1 go on" in str(why) for why in reasons) == 2
    table = load_runs(store)
    assert sorted(table.status) == ["done", *["ended early"] * 3]
    early = table[table.status == "ended early"]
    assert early.aa_acc.isna().all()
    assert (early.train_flops_exact > 0).all()
    counts = points(table, "train_flops_exact", "aa_acc").counts
    assert (counts.used, counts.ended_early) == (1, 3)
    assert counts.sentence() == "1 of 4 runs used; left out: 3 ended early"
    code, said, _ = robudget_command("status", str(store))
    assert "1 done, 3 ended early" in said
    assert "catastrophic overfitting" in said
    code, _, error = robudget_command(*words, *options)
    assert (code, error.splitlines()[0]) == (0, "study: 0 of 4 runs to do")
    code, _, error = robudget_command(*words)
    assert (code, error.splitlines()[0]) == (0, "study: 3 of 4 runs to do")
    assert list(load_runs(store).status) == ["done"] * 4
    for folder in Store(store).folders():
        assert [event["epoch"] for event in folder.events("epoch")] == list(range(1, 13))
