"""The loop that drives a sweep on any executor: what is missing, in what order, what is tried again, and when to end.

Nothing is remembered here that is not on the disk: what is done is skipped by looking, what was begun resumes, and a
run that another process has is waited for, so that a driver may be killed, and several may drive one store.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robudget import stop
from robudget.errors import unknown
from robudget.execution import Site
from robudget.files import local
from robudget.lease import Observer
from robudget.meter.prices import PAPER, Prices
from robudget.recipe import Recipe
from robudget.store import ENDED_EARLY, Busy, RunFolder, Store, writing
from robudget.sweep.executor import Event, Executor, Job
from robudget.sweep.halving import Adaptive, Halving
from robudget.sweep.journal import Journal
from robudget.sweep.ledger import Budget, Ledger
from robudget.sweep.queue import Status, SweepState

BUSY_SECONDS = 2.0  # before a run that another process has is looked at again
RETRY_SECONDS = 1.0  # before an attempt is made again
SAME_WAY = 3  # attempts without progress that end the same way: the run is set aside
ANY_WAY = 6  # the same, however they end
LOST = 10  # attempts without progress whose process was killed from outside, which is nobody's fault, usually
SAME_CAUSE_RUNS = 5  # runs set aside for the same cause, none done meanwhile: the others would fail too
STOP_SECONDS = 120.0  # for what is in work to save when a stop is requested
_WATCH_SECONDS = 0.5  # at most, between two calls of `watch`
MEMORY_BYTES = 8 * 2**30  # asked of the executor, times two, after an attempt that ran out of memory
ORDERS = {"longest-first": -1, "cheapest-first": 1}
_QUICK_SECONDS = 0.1  # at least, between two calls of `watch` in the middle


@dataclass(frozen=True)
class Terms:
    """How a sweep is driven. `order`: "longest-first", so that no worker waits long for the end of the others;
    "cheapest-first"; or by `ranks`, one a recipe, lowest first. `limit`: start so many of the missing runs at most.
    `budget`: start none that would pass it, what the study's runs in the store have taken before included.
    `max_failures`: end when so many runs have failed. `adaptive`: end runs early, and leave those alone that were
    ended early before (without it they are finished). `title` and `on` are for `robudget status`."""

    order: str = "longest-first"
    ranks: Sequence[float] | None = None
    limit: int | None = None
    budget: Budget | None = None
    max_failures: int | None = None
    adaptive: Adaptive = field(default_factory=Adaptive)
    title: str = "sweep"
    on: str = "local"

    def __post_init__(self) -> None:
        if self.ranks is None and self.order not in ORDERS:
            raise unknown("order", self.order, ORDERS)

    @property
    def prices(self) -> Prices:
        return self.budget.prices if self.budget is not None else PAPER

    def sorted(self, to_do: Sequence[int], weights: Sequence[float]) -> list[int]:
        if self.ranks is not None:
            ranks = self.ranks
            return sorted(to_do, key=lambda i: ranks[i])
        return sorted(to_do, key=lambda i: ORDERS[self.order] * weights[i])


def drive(
    recipes: Sequence[Recipe],
    open_executor: Callable[[int], Executor],
    *,
    store: str | Path,
    site: Site | None = None,
    terms: Terms | None = None,
    watch: Callable[[SweepState], None] = lambda state: None,
) -> SweepState:
    """Run what is not done yet on the executor that `open_executor(number of runs)` gives; it is closed at the end.

    A failed run is noted and the others go on, until `terms.max_failures` of them have failed or `SAME_CAUSE_RUNS` for
    the same cause: then what is in work is completed, and `state.ended` says why. `watch` gets the state after events
    and twice a second. Raises stop.Stopped where a stop is requested, after what is in work has saved. On any other
    exception (Ctrl-C among them) the executor is closed at once; every run keeps what it had saved.
    """
    home, terms = Store(store), terms or Terms()
    state = SweepState.begin(recipes, home, adaptive=bool(terms.adaptive))
    state.to_do = terms.sorted(state.to_do, state.weights)
    state.left_out = state.to_do[terms.limit :] if terms.limit is not None else []
    state.to_do = state.to_do[: terms.limit]
    watch(state)
    if not state.to_do:
        return state
    with writing(local(home.root)):
        home.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home.root):
            pass  # before workers start: the store may be there and read-only
    with stop.on_file(home.root) as token:
        executor = open_executor(len(state.to_do))
        try:
            _Drive(state, home, site or Site(), executor, terms, token, watch).run()
        finally:
            executor.close()
    return state


@dataclass
class _Tries:
    """What attempts at a run came to since it last made progress."""

    mark: object = None
    failures: list[str] = field(default_factory=list)
    lost: int = 0
    room: int = 0  # times that more memory was made


class _Drive:
    def __init__(
        self,
        state: SweepState,
        home: Store,
        site: Site,
        executor: Executor,
        terms: Terms,
        token: str,
        watch: Callable[[SweepState], None],
    ) -> None:
        self.state, self.home, self.site, self.executor = state, home, site, executor
        self.terms, self.token, self.watch = terms, token, watch
        self.waiting = deque(state.to_do)
        self.observer = Observer()
        self.later: list[tuple[float, int]] = []  # (when to try it again, run)
        self.too_dear: list[int] = []
        self.tries: dict[int, _Tries] = {}  # of runs that were begun and have not ended
        self.causes: dict[str, int] = {}  # runs set aside since one was last done, by cause
        self.watched = time.monotonic()
        self.ledger = Ledger(state.recipes, state.weights, home)
        self.halving: Halving | None = None
        if terms.adaptive:
            self.halving = halving = Halving(terms.adaptive, state.recipes, home, state.to_do)
            self.waiting = deque(index for index in state.to_do if not halving.waits(index))
        self.journal = Journal(home, terms.title, terms.on)

    def run(self) -> None:
        try:
            self.loop()
            if self.too_dear and self.state.ended is None:
                assert self.terms.budget is not None
                self.state.ended = f"{len(self.too_dear)} runs would pass the budget of {self.terms.budget.text}"
        except BaseException as error:
            self.note(last=str(error) or type(error).__name__)
            raise
        failed = (
            f"{len(self.state.failed)} runs have failed"
            if self.state.failed
            else "every run that was asked for is done"
        )
        self.note(last=self.state.ended or failed)
        self.watch(self.state)

    def loop(self) -> None:
        while self.state.running or (self.state.ended is None and self.some_left):
            stop.look()
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
                self.note()

    @property
    def some_left(self) -> bool:
        return bool(self.waiting or self.later or (self.halving is not None and self.halving.undecided))

    def note(self, last: str | None = None) -> None:
        """Tell the journal how it stands."""
        if last is None and not self.journal.due:
            return
        state = self.state
        ended = state.finished.keys() | state.failed.keys() | state.ended_early.keys()
        left = [index for index in state.to_do if index not in ended]
        spent, still = self.ledger.spent(), self.ledger.left(left)
        self.journal.write(
            {
                "runs": len(state.recipes),
                "done": state.done,
                "left": len(left),
                "left_out": len(state.left_out) + len(self.too_dear),
                "ended_early": state.early,
                "retries": state.retries,
                "running": {self.folder(index).path.name: asdict(run) for index, run in state.running.items()},
                "failed": {self.folder(index).path.name: error for index, error in state.failed.items()},
                "seconds_left": state.seconds_left,
                "spent": asdict(spent) | {"usd": spent.usd(self.terms.prices)},
                "forecast": None if still is None else asdict(still) | {"usd": still.usd(self.terms.prices)},
                "budget": self.terms.budget.text if self.terms.budget is not None else None,
                "last": last,
            },
            last=last is not None,
        )

    def submit(self) -> None:
        """Start as many attempts as the executor has slots for; none while the store is away."""
        if self.home.away:
            return
        now = time.monotonic()
        self.waiting.extend(index for at, index in self.later if at <= now)
        self.later = [(at, index) for at, index in self.later if at > now]
        while len(self.state.running) < self.executor.slots and (index := self.next()) is not None:
            try:
                job = self.job_of(index)
            except PermissionError:
                raise
            except OSError:  # the store went away just now
                self.try_again(index, RETRY_SECONDS)
                return
            if job is not None:
                self.state.running[index] = Status()
                self.executor.submit(index, job)

    def job_of(self, index: int) -> Job | None:
        """What to submit of a run; None where there is nothing to do, or not now."""
        recipe, folder = self.state.recipes[index], self.folder(index)
        self.state.elsewhere.pop(index, None)
        if folder.has(recipe):
            self.finish(index, "was done by another process")
            return None
        free, over = self.observer.look(folder.path)
        if not free:
            self.state.elsewhere[index] = self.observer.owner(folder.path)
            self.try_again(index, BUSY_SECONDS)
            return None
        budget, in_work = self.terms.budget, (*self.state.running, *self.state.elsewhere)
        if budget is not None and not self.ledger.fits(budget, index, in_work):
            self.too_dear.append(index)
            return None
        if index not in self.tries:
            self.tries[index] = _Tries(progress_mark(folder))
        return self.job(index, over)

    def next(self) -> int | None:
        """The run to start next: one that goes on from a rung before one that waits for its turn."""
        if self.halving is None:
            return self.waiting.popleft() if self.waiting else None
        while True:
            for index, why in self.halving.judge().items():
                self.end_early(index, why)
            if (up := self.halving.next_up()) is not None:
                return up
            if not self.waiting:
                return None
            index = self.waiting.popleft()
            if reason := self.halving.look(index):
                self.end_early(index, reason)
            elif by_another := self.folder(index).ended_early:
                self.state.end_early(index, by_another)
            elif not self.halving.waits(index):
                return index

    def end_early(self, index: int, why: str) -> None:
        """Make it known in the store, under the run's lease."""
        folder = self.folder(index)
        try:
            with folder.lock(over=self.observer.look(folder.path)[1]):
                record = folder.partial()
                if record is None or record["status"] != "paused":
                    self.try_again(index, 0.0)  # it has gone on, or another driver was first
                    return
                folder.leave(record | {"status": ENDED_EARLY, "why": why})
                folder.log("ended early", text=why)
        except Busy:
            self.try_again(index, BUSY_SECONDS)
            return
        self.state.end_early(index, why)
        assert self.halving is not None
        self.halving.look(index)

    def job(self, index: int, over: int) -> Job:
        room = self.tries[index].room
        site = more_room(self.site, self.state.recipes[index], room)
        known = self.ledger.forecast(index)
        return Job(
            self.state.recipes[index].to_dict(),
            str(self.home.root),
            site.model_dump(),
            gpus=0.0 if self.site.device == "cpu" else 1.0,
            cpus=max(1, self.site.threads),
            memory_bytes=MEMORY_BYTES * 2**room if room else 0,
            memory_forecast=self.ledger.memory(index),
            seconds=known.seconds if known is not None else 0.0,
            over=over,
            stop_token=self.token,
            pause_epoch=self.halving.until(index) if self.halving is not None else 0,
            pause_collapse=self.halving is not None and self.halving.collapse(index),
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
            self.finish(index, event.note)
            self.causes.clear()
            self.waiting.extend(self.too_dear)  # what is forecast has changed
            self.too_dear.clear()
        elif event.kind == "busy":
            self.try_again(index, BUSY_SECONDS)
        elif event.kind == "stopped":  # by a scheduler, for what is no fault of the run
            self.try_again(index, RETRY_SECONDS)
        elif event.kind != "paused":
            self.failed(index, event)
        elif self.halving is None:  # on a cluster, for an earlier driver that ended runs early
            self.try_again(index, 0.0)
        elif why := self.halving.look(index):
            self.end_early(index, why)
        elif not self.halving.waits(index):
            self.waiting.appendleft(index)

    def finish(self, index: int, summary: str) -> None:
        self.state.finish(index, summary)
        self.ledger.look(index)
        self.tries.pop(index, None)
        if self.halving is not None:
            self.halving.look(index)

    def failed(self, index: int, event: Event) -> None:
        """Try it again or set it aside: attempts count only until the next one that makes progress."""
        if self.home.away:  # whatever fails now is not the run's fault
            self.try_again(index, RETRY_SECONDS)
            return
        tries = self.tries[index]
        self.ledger.look(index)
        if (mark := progress_mark(self.folder(index))) != tries.mark:
            self.tries[index] = tries = _Tries(mark, room=tries.room)
        how = re.sub(r"\d+", "0", event.note)
        if event.kind == "lost":
            tries.lost += 1
            again = tries.lost < LOST
        else:
            tries.failures.append(how)
            again = event.cause not in ("input", "failed") and len(tries.failures) < ANY_WAY
            again = again and tries.failures.count(how) < SAME_WAY
            tries.room += event.cause == "memory"
        if again:
            self.state.retries += 1
            self.try_again(index, RETRY_SECONDS)
            return
        count = max(tries.failures.count(how), tries.lost)
        times = f" ({count} attempts without progress)" if count > 1 else ""
        self.state.fail(index, f"{event.note}{times}" + (f"\n{event.tail}" if event.tail else ""))
        del self.tries[index]
        if self.halving is not None:
            self.halving.failed(index)
        self.causes[how] = self.causes.get(how, 0) + 1
        most = self.terms.max_failures
        if most is not None and len(self.state.failed) >= most:
            self.state.ended = f"{len(self.state.failed)} runs have failed (--max-failures {most})"
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


def more_room(site: Site, recipe: Recipe, times: int) -> Site:
    """The site for an attempt after so many that ran out of memory: activations computed again, then physical batches
    of half the size each time, where the site has such a setting. Neither changes what is trained."""
    if not times:
        return site
    changes: dict[str, Any] = {"checkpointing": True}
    if "physical_batch" in Site.model_fields and times > 1:
        changes["physical_batch"] = max(1, recipe.batch_size // 2 ** (times - 1))
    return site.model_copy(update=changes)


def progress_mark(folder: RunFolder) -> object:
    """Something that differs once a run has made progress: a new epoch, a saved step, or a new attack."""
    reached = [entry.get("epoch") or entry.get("attack") for entry in folder.events() if entry["event"] in _REACHED]
    try:
        saved = (folder.path / "last.pt").stat().st_mtime_ns
    except OSError:
        saved = 0
    return saved, len(set(reached))


_REACHED = ("epoch", "attack")
