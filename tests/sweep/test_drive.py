"""The driver on an executor that does nothing: what is tried again, what is set aside, and when it ends."""

from __future__ import annotations

import errno
import math
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from robudget import stop
from robudget.errors import InputError
from robudget.execution import Site
from robudget.lease import take
from robudget.recipe import Recipe
from robudget.store import Store
from robudget.sweep import drive as driver
from robudget.sweep.drive import Terms, drive
from robudget.sweep.executor import Event, Job, attempt, open_executor, run_job, split_options
from robudget.sweep.ledger import Budget, Ledger
from robudget.sweep.queue import SweepState


class Scripted:
    """Each attempt ends at once, as `script(number, attempt of this run from 0)` says."""

    def __init__(self, script: Callable[[int, int], Event], slots: int = 2) -> None:
        self.script, self.slots = script, slots
        self.attempts: list[int] = []
        self.waiting: list[Event] = []
        self.closed = False

    def submit(self, number: int, job: Job) -> None:
        assert Job(**job.to_dict()) == job
        self.waiting.append(self.script(number, self.attempts.count(number)))
        self.attempts.append(number)

    def events(self, timeout: float) -> list[Event]:
        events, self.waiting = self.waiting, []
        return events

    def cancel(self, number: int) -> None:
        self.waiting.append(Event(number, "stopped"))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BUSY_SECONDS", "RETRY_SECONDS"):
        monkeypatch.setattr(driver, name, 0.0)


@pytest.fixture
def recipes() -> list[Recipe]:
    return [Recipe().with_({"seed": seed}) for seed in range(8)]


def sweep(recipes: Sequence[Recipe], executor: Scripted, store: Path, **terms: Any) -> SweepState:
    state = drive(recipes, lambda runs: executor, store=store, site=Site(device="cpu"), terms=Terms(**terms))
    assert executor.closed
    return state


def test_an_extended_study_runs_only_what_is_new(recipes: list[Recipe], tmp_path: Path) -> None:
    def script(number: int, i: int) -> Event:
        finish(tmp_path, recipes[number], 1.0)
        return Event(number, "done")

    sweep(recipes[:2], Scripted(script), tmp_path)
    state = sweep(recipes[:4], executor := Scripted(script), tmp_path)
    assert sorted(executor.attempts) == [2, 3]
    assert state.done == 4


def test_busy_stopped_and_lost_attempts_are_made_again(recipes: list[Recipe], tmp_path: Path) -> None:
    kinds = ("busy", "stopped", "lost", "lost", "done")
    executor = Scripted(lambda number, i: Event(number, kinds[i], "well"))  # type: ignore[arg-type]
    state = sweep(recipes[:2], executor, tmp_path)
    assert state.finished == {0: "well", 1: "well"}
    assert executor.attempts.count(0) == 5


def test_a_run_that_another_process_has_is_waited_for(recipes: list[Recipe], tmp_path: Path) -> None:
    folder = Store(tmp_path).folder(recipes[0])
    folder.open(recipes[0])
    lease = take(folder.path)
    seen: list[dict[int, str]] = []

    def watch(state: SweepState) -> None:
        if state.elsewhere and not seen:
            seen.append(dict(state.elsewhere))
            lease.release()

    executor = Scripted(lambda number, i: Event(number, "done", "well"))
    state = drive(recipes[:2], lambda runs: executor, store=tmp_path, site=Site(device="cpu"), watch=watch)
    assert seen == [{0: f"process {os.getpid()} on {socket.gethostname()}"}]
    assert (state.finished.keys(), state.elsewhere) == ({0, 1}, {})


def test_a_crash_without_progress_is_tried_three_times_and_shows_its_tail(
    recipes: list[Recipe], tmp_path: Path
) -> None:
    executor = Scripted(
        lambda number, i: Event(number, "failed", f"KeyError: {i}", cause="crash", tail="line 1\nline 2")
    )
    state = sweep(recipes[:1], executor, tmp_path)
    assert len(executor.attempts) == 3
    assert state.failed[0] == "KeyError: 2 (3 attempts without progress)\nline 1\nline 2"


def test_progress_makes_attempts_free(recipes: list[Recipe], tmp_path: Path) -> None:
    folder = Store(tmp_path).folder(recipes[0])
    folder.path.mkdir()

    def script(number: int, i: int) -> Event:
        if i < 10:
            folder.log("epoch", epoch=i + 1)
            return Event(number, "failed", "KeyError", cause="crash")
        return Event(number, "done")

    state = sweep(recipes[:1], executor := Scripted(script), tmp_path)
    assert list(state.finished) == [0]
    assert len(executor.attempts) == 11
    assert state.retries == 10


def test_a_process_killed_from_outside_again_and_again_is_not_tried_for_ever(
    recipes: list[Recipe], tmp_path: Path
) -> None:
    executor = Scripted(lambda number, i: Event(number, "lost", "the worker died: signal 9 (SIGKILL)"))
    state = sweep(recipes[:1], executor, tmp_path)
    assert len(executor.attempts) == driver.LOST
    assert "SIGKILL) (10 attempts without progress)" in state.failed[0]


def test_what_another_attempt_would_meet_again_is_not_tried_again(recipes: list[Recipe], tmp_path: Path) -> None:
    executor = Scripted(lambda number, i: Event(number, "failed", f"bad {number}", cause="input"), slots=1)
    state = sweep(recipes, executor, tmp_path)
    assert executor.attempts == [0, 1, 2, 3, 4]
    assert state.ended == "5 runs have failed for the same cause: bad 4"


def test_the_same_cause_counts_only_while_nothing_is_done(recipes: list[Recipe], tmp_path: Path) -> None:
    def script(number: int, i: int) -> Event:
        return Event(number, "done") if number == 3 else Event(number, "failed", "bad", cause="input")

    state = sweep(recipes, Scripted(script, slots=1), tmp_path)
    assert state.ended is None
    assert len(state.failed) == 7


def test_max_failures_ends_the_sweep_after_what_is_in_work(recipes: list[Recipe], tmp_path: Path) -> None:
    executor = Scripted(lambda number, i: Event(number, "failed", "abc"[i % 3] * (number + 1), cause="input"))
    state = sweep(recipes, executor, tmp_path, max_failures=2)
    assert state.ended == "2 runs have failed (--max-failures 2)"
    assert len(state.failed) == 2


def test_a_stop_lets_what_is_in_work_save(recipes: list[Recipe], tmp_path: Path) -> None:
    def script(number: int, i: int) -> Event:
        stop.request("test")
        return Event(number, "progress")

    try:
        with pytest.raises(stop.Stopped):
            sweep(recipes, executor := Scripted(script), tmp_path)
        assert len(executor.attempts) == 2
        assert executor.closed
    finally:
        stop.withdraw()


def test_an_attempt_ends_with_one_event(tmp_path: Path) -> None:
    job = Job(
        Recipe.load("digits", {"model.name": "wrn-11-1"}).to_dict(), str(tmp_path), Site(device="cpu").model_dump()
    )
    event = attempt(4, job.to_dict())
    assert (event.number, event.kind, event.cause) == (4, "failed", "input")
    assert "depth must be 6n + 4" in event.note
    other = attempt(4, job.to_dict() | {"site": {"no": "site"}})
    assert (other.kind, other.cause) == ("failed", "input")


def test_a_worker_of_another_version_refuses(tmp_path: Path) -> None:
    job = Job(Recipe().to_dict(), str(tmp_path), {}, version="99.1")
    with pytest.raises(InputError, match=r"the sweep is of robudget 99\.1, this worker of"):
        run_job(job.to_dict())


def test_an_executor_that_is_not_there_is_one_line() -> None:
    with pytest.raises(InputError, match="did you mean 'local'"):
        open_executor("locl", site=Site())
    with pytest.raises(InputError, match="no address"):
        open_executor("local:1", site=Site())


@pytest.mark.parametrize(
    ("words", "overrides", "options"),
    [
        ("seed=1 --time 2:00:00 loss=at", ["seed=1", "loss=at"], {"time": "2:00:00"}),
        ("--exclusive seed=1 -p gpu", ["seed=1"], {"exclusive": "", "p": "gpu"}),
        ("--export=ALL,A=1 --requeue", [], {"export": "ALL,A=1", "requeue": ""}),
    ],
)
def test_the_words_of_a_command_are_overrides_or_an_executors_options(
    words: str, overrides: list[str], options: dict[str, str]
) -> None:
    assert split_options(words.split()) == (overrides, options)


# -- order, limits and money -------------------------------------------------------------------------------------------


def sized(n: int = 4) -> list[Recipe]:
    """Recipes whose work grows with their index."""
    return [Recipe().with_({"seed": i, "epochs": 10 * (i + 1), "evaluation.images": 1}) for i in range(n)]


def finish(store: Path, recipe: Recipe, kwh: float | None, device: str = "cpu", memory: int = 0) -> None:
    folder = Store(store).folder(recipe)
    folder.open(recipe)
    stage = {"seconds": 50.0, "energy": {"kwh": kwh}}
    folder.finish({"environment": {"device": device, "processes": 2, "memory_bytes": memory}, "training": stage,
                   "evaluation": stage | {"id": recipe.evaluation_id}})  # fmt: skip


def well(number: int, i: int) -> Event:
    return Event(number, "done")


def test_the_order_is_as_asked(tmp_path: Path) -> None:
    for terms, order in (
        ({}, [3, 2, 1, 0]),
        ({"order": "cheapest-first"}, [0, 1, 2, 3]),
        ({"ranks": [2.0, 1.0, 3.0, 0.0]}, [3, 1, 0, 2]),
        ({"order": "cheapest-first", "limit": 2}, [0, 1]),
    ):
        executor = Scripted(well, slots=1)
        state = sweep(sized(), executor, tmp_path, **terms)
        assert executor.attempts == order
        assert state.done == len(order)
    with pytest.raises(InputError, match="did you mean 'cheapest-first'"):
        Terms("cheapest")


def test_a_budget_is_what_was_measured_and_what_is_forecast(tmp_path: Path) -> None:
    recipes = sized()
    finish(tmp_path, recipes[0], 1.0)  # so that forecasts are about 2, 3 and 4 kWh, twice each: two stages

    def script(number: int, i: int) -> Event:
        finish(tmp_path, recipes[number], (number + 1.0))
        return Event(number, "done")

    def run(text: str) -> list[int]:
        executor = Scripted(script)
        state = sweep(recipes, executor, tmp_path, order="cheapest-first", budget=Budget.parse(text))
        if len(state.finished) < len(state.to_do):
            assert f"would pass the budget of {text}" in str(state.ended)
        return sorted(executor.attempts)

    assert run("5kWh") == []
    assert run("7kWh") == [1]  # 2 + 4 spent
    assert run("13kWh") == [2]
    assert run("1000usd") == [3]


def test_a_budget_counts_what_another_driver_has_spent(tmp_path: Path) -> None:
    recipes = sized()
    finish(tmp_path, recipes[0], 1.0)

    def script(number: int, i: int) -> Event:
        finish(tmp_path, recipes[1], 2.0)
        finish(tmp_path, recipes[2], 10.0)  # by the other one
        return Event(number, "done")

    executor = Scripted(script, slots=1)
    budget = Budget.parse("21kWh")  # the forecasts are 2, 4, 6 and 8: all would fit
    state = sweep(recipes, executor, tmp_path, order="cheapest-first", budget=budget)
    assert executor.attempts == [1]
    assert state.finished[2] == "was done by another process"
    assert state.ended == "1 runs would pass the budget of 21kWh"


def test_memory_is_forecast_from_like_runs(tmp_path: Path) -> None:
    recipes = sized(6)
    jobs: dict[int, Job] = {}
    for number, memory in enumerate((7, 9, 8)):
        finish(tmp_path, recipes[number], 1.0, memory=memory)

    class Seen(Scripted):
        def submit(self, number: int, job: Job) -> None:
            jobs[number] = job
            super().submit(number, job)

    sweep(recipes, Seen(well), tmp_path)
    assert [jobs[number].memory_forecast for number in (3, 4, 5)] == [9, 9, 9]


def test_where_nothing_is_known_one_runs_at_a_time(tmp_path: Path) -> None:
    recipes = sized()
    ledger = Ledger(recipes, [1.0, 2.0, 3.0, 4.0], Store(tmp_path))
    assert ledger.forecast(0) is None
    assert ledger.fits(Budget.parse("1usd"), 0, [])
    assert not ledger.fits(Budget.parse("1usd"), 1, [0])


def test_hours_of_gpus_and_unknown_energy(tmp_path: Path) -> None:
    recipes = sized()
    finish(tmp_path, recipes[0], None, device="cuda")
    ledger = Ledger(recipes, [1.0, 2.0, 3.0, 4.0], Store(tmp_path))
    assert ledger.spent().gpu_hours == pytest.approx(2 * 100 / 3600)
    assert math.isnan(ledger.spent().kwh)
    forecast = ledger.forecast(3)
    assert forecast is not None
    assert forecast.seconds == pytest.approx(400)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10", "a number above 0 and a unit"),
        ("10eur", "unknown unit of a sweep's budget 'eur'"),
        ("-3kWh", "above 0"),
        ("0usd", "above 0"),
    ],
)
def test_a_bad_budget_is_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Budget.parse(text)


def test_out_of_memory_is_tried_again_with_more_room(recipes: list[Recipe], tmp_path: Path) -> None:
    jobs: list[Job] = []

    class Small(Scripted):
        def submit(self, number: int, job: Job) -> None:
            jobs.append(job)
            super().submit(number, job)

    def script(number: int, i: int) -> Event:
        return Event(number, "done") if i == 2 else Event(number, "failed", "CUDA out of memory", cause="memory")

    state = sweep(recipes[:1], Small(script), tmp_path)
    assert list(state.finished) == [0]
    assert [job.site["checkpointing"] for job in jobs] == [False, True, True]
    assert [job.memory_bytes // 2**30 for job in jobs] == [0, 16, 32]


def test_a_store_that_is_away_is_waited_for(recipes: list[Recipe], tmp_path: Path) -> None:
    store = tmp_path / "store"

    def script(number: int, i: int) -> Event:
        if i == 0:
            store.rename(tmp_path / "away")
            threading.Timer(0.3, lambda: (tmp_path / "away").rename(store)).start()
        return Event(number, "done") if i == 1 else Event(number, "failed", "no such file", cause="crash")

    state = sweep(recipes[:1], Scripted(script), store)
    assert state.finished == {0: ""}
    assert state.retries == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_a_file_server_that_does_not_answer_is_waited_for(
    recipes: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, is_dir = [0], Path.is_dir

    def look(path: Path) -> bool:
        if path == tmp_path and silent[0]:
            silent[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return is_dir(path)

    def script(number: int, i: int) -> Event:
        silent[0] = 5 if i == 0 else 0
        return Event(number, "done") if i == 1 else Event(number, "failed", "Stale file handle", cause="crash")

    monkeypatch.setattr(Path, "is_dir", look)
    state = sweep(recipes[:1], Scripted(script), tmp_path)
    assert state.finished == {0: ""}
    assert state.retries == 0
