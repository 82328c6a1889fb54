"""The loop that drives a sweep on any executor: what is missing, in what order, what is tried again, and when to end.

Nothing is remembered here that is not on the disk: what is done is skipped by looking, what was begun resumes, and a
run that another process has is waited for, so that a driver may be killed, and several may drive one store.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from robudget import stop
from robudget.execution import Site
from robudget.files import local
from robudget.lease import Observer
from robudget.recipe import Recipe
from robudget.store import RunFolder, Store, writing
from robudget.sweep.executor import Event, Executor, Job
from robudget.sweep.queue import Status, SweepState

BUSY_SECONDS = 2.0  # before a run that another process has is looked at again
RETRY_SECONDS = 1.0  # before an attempt is made again
SAME_WAY = 3  # attempts without progress that end the same way: the run is set aside
ANY_WAY = 6  # the same, however they end
LOST = 10  # attempts without progress whose process was killed from outside, which is nobody's fault, usually
SAME_CAUSE_RUNS = 5  # runs set aside for the same cause, none done meanwhile: the others would fail too
STOP_SECONDS = 120.0  # for what is in work to save when a stop is requested
_WATCH_SECONDS = 0.5  # at most, between two calls of `watch`
_QUICK_SECONDS = 0.1  # at least, between two calls of `watch` in the middle


def drive(
    recipes: Sequence[Recipe],
    open_executor: Callable[[int], Executor],
    *,
    store: str | Path,
    site: Site | None = None,
    max_failures: int | None = None,
    watch: Callable[[SweepState], None] = lambda state: None,
) -> SweepState:
    """Run what is not done yet on the executor that `open_executor(number of runs)` gives; it is closed at the end.

    A failed run is noted and the others go on, until `max_failures` of them have failed or `SAME_CAUSE_RUNS` for the
    same cause: then what is in work is completed, and `state.ended` says why. `watch` gets the state after events and
    twice a second. Raises stop.Stopped where a stop is requested, after what is in work has saved. On any other
    exception (Ctrl-C among them) the executor is closed at once; every run keeps what it had saved.
    """
    home = Store(store)
    state = SweepState.begin(recipes, home)
    watch(state)
    if not state.to_do:
        return state
    with writing(local(home.root)):
        home.root.mkdir(parents=True, exist_ok=True)
    executor = open_executor(len(state.to_do))
    try:
        _Drive(state, home, site or Site(), executor, max_failures, watch).run()
    finally:
        executor.close()
    return state


@dataclass
class _Tries:
    """What attempts at a run came to since it last made progress."""

    mark: object = None
    failures: list[str] = field(default_factory=list)
    lost: int = 0


class _Drive:
    def __init__(
        self,
        state: SweepState,
        home: Store,
        site: Site,
        executor: Executor,
        max_failures: int | None,
        watch: Callable[[SweepState], None],
    ) -> None:
        self.state, self.home, self.site, self.executor = state, home, site, executor
        self.max_failures, self.watch = max_failures, watch
        self.waiting = deque(state.to_do)
        self.observer = Observer()
        self.later: list[tuple[float, int]] = []  # (when to try it again, run)
        self.tries: dict[int, _Tries] = {}
        self.causes: dict[str, int] = {}  # runs set aside since one was last done, by cause
        self.watched = time.monotonic()

    def run(self) -> None:
        while self.state.running or (self.state.ended is None and (self.waiting or self.later)):
            if stop.requested():
                self.stop()
            if self.state.ended is None:
                self.submit()
            events = self.executor.events(_WATCH_SECONDS)
            for event in events:
                self.handle(event)
            if not events or time.monotonic() - self.watched > _QUICK_SECONDS:
                self.watched = time.monotonic()
                self.watch(self.state)
        self.watch(self.state)

    def submit(self) -> None:
        """Start as many attempts as the executor has slots for; none while the store is away."""
        if not self.home.root.is_dir():
            return
        now = time.monotonic()
        self.waiting.extend(index for at, index in self.later if at <= now)
        self.later = [(at, index) for at, index in self.later if at > now]
        while self.waiting and len(self.state.running) < self.executor.slots:
            index = self.waiting.popleft()
            recipe, folder = self.state.recipes[index], self.folder(index)
            if folder.has(recipe):
                self.state.finish(index, "was done by another process")
                continue
            free, over = self.observer.look(folder.path)
            if not free:
                self.try_again(index, BUSY_SECONDS)
                continue
            if index not in self.tries:
                self.tries[index] = _Tries(progress_mark(folder))
            self.state.running[index] = Status()
            self.executor.submit(index, self.job(recipe, over))

    def job(self, recipe: Recipe, over: int) -> Job:
        return Job(
            recipe.to_dict(),
            str(self.home.root),
            self.site.model_dump(),
            gpus=0.0 if self.site.device == "cpu" else 1.0,
            cpus=max(1, self.site.threads),
            over=over,
        )

    def folder(self, index: int) -> RunFolder:
        return self.home.folder(self.state.recipes[index])

    def handle(self, event: Event) -> None:
        state, index = self.state, event.number
        if event.kind == "progress":
            state.running[index] = Status(event.phase, event.fraction, event.note)
            return
        state.running.pop(index, None)
        if event.kind == "done":
            state.finish(index, event.note)
            self.causes.clear()
        elif event.kind == "busy":
            self.try_again(index, BUSY_SECONDS)
        elif event.kind == "stopped":  # by a scheduler, for what is no fault of the run
            self.try_again(index, RETRY_SECONDS)
        else:
            self.failed(index, event)

    def failed(self, index: int, event: Event) -> None:
        """Try it again or set it aside: attempts count only until the next one that makes progress."""
        if not self.home.root.is_dir():  # the store is away: whatever fails now is not the run's fault
            self.try_again(index, RETRY_SECONDS)
            return
        tries = self.tries[index]
        if (mark := progress_mark(self.folder(index))) != tries.mark:
            self.tries[index] = tries = _Tries(mark)
        how = re.sub(r"\d+", "0", event.note)
        if event.kind == "lost":
            tries.lost += 1
            again = tries.lost < LOST
        else:
            tries.failures.append(how)
            again = event.cause not in ("input", "failed") and len(tries.failures) < ANY_WAY
            again = again and tries.failures.count(how) < SAME_WAY
        if again:
            self.state.retries += 1
            self.try_again(index, RETRY_SECONDS)
            return
        count = max(tries.failures.count(how), tries.lost)
        times = f" ({count} attempts without progress)" if count > 1 else ""
        self.state.fail(index, f"{event.note}{times}" + (f"\n{event.tail}" if event.tail else ""))
        self.causes[how] = self.causes.get(how, 0) + 1
        if self.max_failures is not None and len(self.state.failed) >= self.max_failures:
            self.state.ended = f"{len(self.state.failed)} runs have failed (--max-failures {self.max_failures})"
        elif self.causes[how] >= SAME_CAUSE_RUNS:
            self.state.ended = f"{SAME_CAUSE_RUNS} runs have failed for the same cause: {event.note}"

    def try_again(self, index: int, seconds: float) -> None:
        self.later.append((time.monotonic() + seconds, index))

    def stop(self) -> None:
        """Let what is in work save, then raise Stopped."""
        for index in self.state.running:
            self.executor.cancel(index)
        deadline = time.monotonic() + STOP_SECONDS
        while self.state.running and time.monotonic() < deadline:
            for event in self.executor.events(_WATCH_SECONDS):
                if event.kind == "done":
                    self.state.finish(event.number, event.note)
                elif event.kind != "progress":
                    self.state.running.pop(event.number, None)
            self.watch(self.state)
        stop.check()


def progress_mark(folder: RunFolder) -> object:
    """Something that differs once a run has made progress: a new epoch, a saved step, or a new attack."""
    reached = [entry.get("epoch") or entry.get("attack") for entry in folder.events() if entry["event"] in _REACHED]
    try:
        saved = (folder.path / "last.pt").stat().st_mtime_ns
    except OSError:
        saved = 0
    return saved, len(set(reached))


_REACHED = ("epoch", "attack")
