"""What is seen of long work: bars on a terminal, one line for each step elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from robudget.cli.view.console import EvaluationDisplay, RunDisplay, SweepDisplay
from robudget.evaluation.state import Progress as EvaluationProgress
from robudget.recipe import Recipe
from robudget.runner import Progress
from robudget.sweep.queue import Status, SweepState


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)


def text(where: Console) -> str:
    assert isinstance(where.file, io.StringIO)
    return where.file.getvalue()


def sweep(n: int = 3) -> SweepState:
    recipes = [Recipe.load("digits", {"seed": seed}) for seed in range(n)]
    return SweepState(recipes, [1.0] * n, list(range(n)))


def test_a_log_holds_one_line_for_each_epoch_and_attack() -> None:
    where = console(terminal=False)
    with RunDisplay("digits", where) as display:
        for fraction, key in ((0.1, "epoch 1"), (0.15, "epoch 1"), (0.3, "epoch 2")):
            display.update(Progress("train", fraction, key, key))
    assert text(where).splitlines() == ["digits: train, epoch 1", "digits: train, epoch 2"]
    where = console(terminal=False)
    with EvaluationDisplay("model", where) as display:
        for done in (1, 2):
            display.update(EvaluationProgress("apgd-ce", done, 10, 0.5, done / 10, None))
    assert text(where).splitlines() == ["model: apgd-ce, 50.0% robust so far"]


def test_a_terminal_shows_what_is_done_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    where = console(terminal=True)
    with RunDisplay("digits", where) as display:
        clock = iter(range(0, 1000, 10))
        monkeypatch.setattr(display._bars, "get_time", lambda: float(next(clock)))
        for fraction in (0.25, 0.5, 0.75):  # resumed in the middle: only the speed since then counts
            display.update(Progress("train", fraction, "epoch 3", "epoch 3"))
        (task,) = display._bars.tasks
        assert task.completed == 0.75
        assert task.speed == pytest.approx(0.025)
        display._bars.refresh()
    shown = text(where)
    assert "digits" in shown
    assert "train  epoch 3" in shown
    assert "about 10 s left" in shown


def test_a_sweep_keeps_a_line_for_each_finished_run_and_a_bar_for_each_running_one() -> None:
    where, state = console(terminal=True), sweep()
    with SweepDisplay("seeds", where) as display:
        state.running = {0: Status("train", 0.5, "epoch 2"), 1: Status()}
        display.update(state)
        assert len(display._bars.tasks) == 3
        state.finish(0, "50.0% robust")
        state.fail(1, "no memory")
        display.update(state)
        assert len(display._bars.tasks) == 1
        display.update(state)
    shown = text(where)
    assert shown.count("50.0% robust") == 1
    assert "[  1/3]" in shown
    assert "[  2/3]" in shown
    assert "1 of 3 runs done, 1 failed" in shown


def test_a_log_of_a_sweep_begins_with_what_is_to_do() -> None:
    where, state = console(terminal=False), sweep()
    with SweepDisplay("seeds", where) as display:
        display.update(state)
        assert text(where).splitlines() == ["seeds: 3 of 3 runs to do"]
        state.finish(0, "50.0% robust")
        display.update(state)
    assert text(where).splitlines()[1].startswith("[  1/3]")
    assert len(text(where).splitlines()) == 2
