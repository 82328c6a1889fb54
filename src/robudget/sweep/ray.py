"""An executor on a Ray cluster: a Ray task an attempt, over a store that every node sees.

This process's robudget goes to the nodes with the tasks (Ray's runtime environment), so that they run the driver's
code. A task reports every two seconds to one actor, the mailbox, which keeps the last report of each attempt and passes
on the wish to stop: what is kept and sent does not grow with the study. Ray ends the tasks of a driver that ends; the
same command then goes on. Ray is an optional dependency, imported only where it is used; no torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robudget import stop
from robudget.errors import InputError, RunFailed, unknown
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.sweep.drive import drive
from robudget.sweep.executor import Event, Executor, Job, attempt
from robudget.sweep.queue import SweepState
from robudget.sweep.ray_cluster import CONNECT_SECONDS, connect, in_one_line

OPTIONS = ("processes", "gpus", "cpus", "memory")
SPARE_SLOTS = 2  # attempts submitted beyond what the cluster can run at once, so that no worker waits for the driver
REPORT_SECONDS = 2.0  # between two reports of an attempt
_LOOK_SECONDS = 5.0  # between two looks at the size of the cluster
_MEET_SECONDS = 300.0  # for the first process of several to be on its node

Work = Callable[[int, Mapping[str, Any], Callable[[Event], None]], Event]


def sweep_on_ray(
    recipes: Sequence[Recipe],
    *,
    store: str | Path,
    site: Site | None = None,
    address: str | None = None,
    gpus_per_run: float | None = None,
    cpus_per_run: float | None = None,
    watch: Callable[[SweepState], None] = lambda state: None,
) -> SweepState:
    """Run what is not done yet on the Ray cluster at `address` (None: the running one, else this machine).

    `store` must be a folder on a file system that all nodes share. Raises InputError where Ray is not installed.
    """
    place = site or Site()
    asked = {"gpus": gpus_per_run, "cpus": cpus_per_run}
    options = {name: str(value) for name, value in asked.items() if value is not None}

    def executor(runs: int) -> Executor:
        return open_executor(address or "", site=place, workers=0, runs=runs, options=options)

    return drive(recipes, executor, store=Path(store).absolute(), site=place, watch=watch)


def open_executor(address: str, *, site: Site, workers: int, runs: int, options: Mapping[str, str]) -> Executor:
    """Connect to the cluster at `address` (empty: RAY_ADDRESS, else the one running on this machine, else one that is
    started for this process). Options: `processes` of a run, each with a GPU where the site has not said cpu; `gpus`,
    `cpus` and `memory` (bytes) of a process."""
    for name in options:
        if name not in OPTIONS:
            raise unknown("option of --on ray", name, OPTIONS)
    return RayExecutor(address, workers=workers, options={name: _number(name, text) for name, text in options.items()})


def _number(name: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise InputError(f"--{name} {text} (allowed: a number, 0 or more)")


@dataclass
class _Flight:
    """An attempt that was submitted: its tasks by rank, each with its event once it has ended."""

    number: int
    group: Any = None
    events: dict[int, Event] = field(default_factory=dict)
    references: list[Any] = field(default_factory=list)
    stopping: bool = False


class RayExecutor:
    def __init__(
        self, address: str, *, workers: int = 0, options: Mapping[str, float] | None = None, work: Work = attempt
    ) -> None:
        """`work` makes one attempt on a node; another than `attempt` is for measuring Ray itself."""
        self._ray = connect(address)
        self._workers, self._options, self._work = workers, dict(options or {}), work
        self._where = address or "this machine"
        self._flights: dict[str, _Flight] = {}
        self._pending: dict[Any, tuple[str, int]] = {}  # task → (flight, rank)
        self._serial = 0
        self._need: dict[str, float] = {"CPU": 1.0}  # of one process of the last attempt
        self._processes = int(self._options.get("processes", 1)) or 1
        self._looked = self._asked = -_LOOK_SECONDS
        self._nodes: list[dict[str, float]] = []
        here = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            self._ray.get_runtime_context().get_node_id(), soft=True
        )
        box = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Mailbox)
        self._mailbox = box.options(scheduling_strategy=here).remote()
        self._alone = self._ray.remote(max_retries=0)(_task)
        # A process group is never left behind in a process that does other work afterwards.
        self._together = self._ray.remote(max_retries=0, max_calls=1)(_task)

    @property
    def slots(self) -> int:
        if self._workers:
            return self._workers
        each = [min(int(node.get(name, 0) / need) for name, need in self._need.items()) for node in self._look()]
        return max(1, sum(each) // self._processes) + SPARE_SLOTS

    def submit(self, number: int, job: Job) -> None:
        need, data = self._resources(job), job.elsewhere().to_dict()
        self._serial += 1
        name = f"{number}.{self._serial}"
        flight = self._flights[name] = _Flight(number)
        options: dict[str, Any] = {"num_cpus": need["CPU"], "num_gpus": need.get("GPU", 0)}
        if "memory" in need:
            options["memory"] = need["memory"]
        if self._processes > 1:
            flight.group = self._ray.util.placement_group([dict(need)] * self._processes, strategy="PACK")
        for rank in range(self._processes):
            if flight.group is not None:
                options["scheduling_strategy"] = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                    flight.group, placement_group_bundle_index=rank
                )
            task = self._alone if flight.group is None else self._together
            task = task.options(name=f"robudget {number}", **options)
            reference = task.remote(self._work, number, data, name, self._mailbox, rank, self._processes)
            flight.references.append(reference)
            self._pending[reference] = (name, rank)

    def events(self, timeout: float) -> list[Event]:
        if not self._pending:
            time.sleep(timeout)
            return []
        try:
            ready, _ = self._ray.wait(list(self._pending), timeout=timeout)
            if ready:  # and what else has ended by now
                ready, _ = self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        except self._ray.exceptions.RayError as error:
            raise RunFailed(f"the Ray cluster cannot be reached any more: {in_one_line(error)}") from None
        events = [event for reference in ready if (event := self._ended(reference)) is not None]
        return events + self._reports()

    def cancel(self, number: int) -> None:
        for flight in self._flights.values():
            flight.stopping |= flight.number == number
        self._asked = float("-inf")  # so that the next call of `events` says it

    def close(self) -> None:
        # Checkpoints are atomic and every event is on the disk, so that a task may be killed at any moment: Ray ends
        # those of a driver that leaves.
        self._ray.shutdown()

    def _ended(self, reference: Any) -> Event | None:
        """The event of the attempt whose last task this was."""
        name, rank = self._pending.pop(reference)
        flight = self._flights[name]
        flight.events[rank] = event = self._outcome(flight.number, reference)
        left = [r for r in flight.references if r in self._pending]
        if left and event.kind not in ("done", "busy", "stopped", "paused"):
            for other in left:  # they would wait for it for ever
                del self._pending[other]
                self._ray.cancel(other, force=True)
        elif left:
            return None
        del self._flights[name]
        if flight.group is not None:
            self._ray.util.remove_placement_group(flight.group)
        worst = [e for e in flight.events.values() if e.kind != "done"]
        return worst[0] if worst else flight.events[0]

    def _outcome(self, number: int, reference: Any) -> Event:
        errors = self._ray.exceptions
        try:
            event: Event = self._ray.get(reference)
        except errors.TaskCancelledError:
            return Event(number, "stopped")
        except errors.OutOfMemoryError as error:
            return Event(number, "failed", f"Ray's memory monitor: {in_one_line(error)}", cause="memory")
        except errors.RuntimeEnvSetupError as error:
            return Event(number, "failed", in_one_line(error), cause="crash")
        except errors.RayTaskError as error:  # not in the attempt, which gives an event in any case
            return Event(number, "failed", in_one_line(error.cause), cause="crash", tail=str(error)[-2000:])
        except errors.RayError as error:
            return Event(number, "lost", in_one_line(error))
        return event

    def _reports(self) -> list[Event]:
        """The progress that came since the last call; asked for as often as attempts report. All that are to stop are
        named every time, since a mailbox whose node was lost begins anew elsewhere and knows of none."""
        if time.monotonic() - self._asked < REPORT_SECONDS:
            return []
        self._asked = time.monotonic()
        stopping = [name for name, flight in self._flights.items() if flight.stopping]
        try:
            reports = self._ray.get(self._mailbox.take.remote(stopping), timeout=CONNECT_SECONDS)
        except (self._ray.exceptions.RayError, TimeoutError):  # its node was lost: Ray starts it again elsewhere
            return []
        return [event for name, event in reports.items() if name in self._flights]

    def _resources(self, job: Job) -> dict[str, float]:
        """What one process of this job asks of its node. Raises InputError where no node has it."""
        nodes, options = self._look(), self._options
        device = str(job.site["device"])
        processes = int(options.get("processes", 0)) or max(1, int(job.gpus))
        gpus = options.get("gpus", min(job.gpus, 1.0))
        if device == "auto" and "gpus" not in options and not any(node.get("GPU") for node in nodes):
            gpus = 0.0  # as on one machine: the GPU where there is one
        need = {"CPU": options.get("cpus", job.cpus), "GPU": gpus, "memory": options.get("memory", job.memory_bytes)}
        need = {name: value for name, value in need.items() if value or name == "CPU"}
        for name, value in need.items():
            most = max((node.get(name, 0.0) for node in nodes), default=0.0)
            if most < value:
                unit = {"CPU": "CPUs", "GPU": "GPUs", "memory": "bytes of memory"}[name]
                hint = "device=cpu" if name == "GPU" and not most else f"at most {most:g}"
                raise InputError(
                    f"a run asks for {value:g} {unit}, and no node of the Ray cluster ({self._where}) has more than "
                    f"{most:g} (allowed: {hint})"
                )
        if (fit := _room(nodes, need)) < processes:
            raise InputError(
                f"a run asks for {processes} processes, and the Ray cluster ({self._where}) has room for {fit}"
            )
        # What like runs took is for Ray to place this one well, and no reason to refuse it.
        like = need | {"memory": max(need.get("memory", 0), job.memory_forecast)}
        if job.memory_forecast and "memory" not in options and _room(nodes, like) >= processes:
            need = like
        self._need, self._processes = {name: value for name, value in need.items() if value}, processes
        return need

    def _look(self) -> list[dict[str, float]]:
        """The resources of each node that is alive."""
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return self._nodes


def _room(nodes: Sequence[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """Processes that fit on the nodes."""
    return sum(min(int(node.get(name, 0) / value) for name, value in need.items() if value) for node in nodes)


# -- on the nodes ------------------------------------------------------------------------------------------------------


class _Mailbox:
    """What attempts report, and what they are asked. An actor; an attempt is named by the driver."""

    def __init__(self) -> None:
        self._reports: dict[str, Event] = {}
        self._stop: set[str] = set()
        self._places: dict[str, tuple[str, int]] = {}

    def put(self, name: str, report: Event | None) -> bool:
        """Keep the last report of an attempt; is it to stop?"""
        if report is not None:
            self._reports[name] = report
        return name in self._stop

    def take(self, stopping: Sequence[str]) -> dict[str, Event]:
        """The reports that came since the last call; these attempts are to stop."""
        self._stop.update(stopping)
        reports, self._reports = self._reports, {}
        return reports

    def meet(self, name: str, place: tuple[str, int] | None = None) -> tuple[str, int] | None:
        """Where the first of an attempt's processes listens, once it has said so."""
        if place is not None:
            self._places[name] = place
        return self._places.get(name)


def _task(work: Work, number: int, job: Mapping[str, Any], name: str, mailbox: Any, rank: int, processes: int) -> Event:
    """One process of an attempt."""
    import ray

    if _answer(mailbox.put.remote(name, None)):
        return Event(number, "stopped")
    last: list[Event] = []
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(REPORT_SECONDS):
            latest = last.pop() if last else None
            last.clear()
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                if _answer(mailbox.put.remote(name, latest)):
                    stop.request("the sweep was stopped")

    threading.Thread(target=report, daemon=True).start()
    try:
        with _process(rank, processes, name, mailbox):
            return work(number, job, last.append)
    finally:
        ended.set()
        stop.withdraw()


def _answer(reference: Any) -> Any:
    """What an actor answers a task. Not by `ray.get`, in which a task gives up its CPUs, so that another one starts."""
    return reference.future().result(timeout=_MEET_SECONDS)


@contextlib.contextmanager
def _process(rank: int, processes: int, name: str, mailbox: Any) -> Iterator[None]:
    """The environment that torchrun would give this one of several processes; each sees a GPU of its own."""
    if processes == 1:
        yield
        return
    import ray

    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        here: Any = ray.util.get_node_ip_address  # untyped
        _answer(mailbox.meet.remote(name, (str(here()), port)))
    deadline = time.monotonic() + _MEET_SECONDS
    while (place := _answer(mailbox.meet.remote(name))) is None:
        if time.monotonic() > deadline:
            raise RunFailed(f"the first of {processes} processes did not start within {_MEET_SECONDS:.0f} s")
        time.sleep(0.1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": place[0],
        "MASTER_PORT": str(place[1]),
    }
    yield
