"""The driver on an executor that does nothing: what is tried again, what is set aside, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from robudget import stop
from robudget.errors import InputError
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Store
from robudget.sweep import drive as driver
from robudget.sweep.drive import drive
from robudget.sweep.executor import Event, Job, attempt, open_executor, run_job, split_options
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


def sweep(recipes: Sequence[Recipe], executor: Scripted, store: Path, **options: int) -> SweepState:
    state = drive(recipes, lambda runs: executor, store=store, site=Site(device="cpu"), **options)
    assert executor.closed
    return state


def test_busy_stopped_and_lost_attempts_are_made_again(recipes: list[Recipe], tmp_path: Path) -> None:
    kinds = ("busy", "stopped", "lost", "lost", "done")
    executor = Scripted(lambda number, i: Event(number, kinds[i], "well"))  # type: ignore[arg-type]
    state = sweep(recipes[:2], executor, tmp_path)
    assert state.finished == {0: "well", 1: "well"}
    assert executor.attempts.count(0) == 5


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
