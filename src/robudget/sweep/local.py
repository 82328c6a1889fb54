"""Many runs on one machine: worker processes side by side, each with its share of the cores or one GPU.

A worker is a separate interpreter (`python -m robudget.sweep.local PID`, the process that starts it) rather than a
forked process: it sets its thread count before torch starts, and needs no guard in the user's script. It says that it
is ready, reads one JSON job a line from stdin, does it, writes one JSON event a line to stdout, and ends when the
process that started it ends. Imports no torch.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robudget import stop
from robudget.errors import InputError, RunFailed
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.sweep.drive import Terms, drive
from robudget.sweep.executor import TAIL_LINES, Event, Executor, Job, attempt
from robudget.sweep.queue import SweepState
from robudget.threads import LEASE, cores, give_back, taken_for

_LOOK_SECONDS = 1.0  # of a worker after the process that started it
_OWN_FAULTS = {"SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE"}  # signals by which code ends its own process

_Lines = queue.Queue["tuple[_Worker, dict[str, Any] | None]"]  # (worker, line); None: the worker has ended


def sweep(
    recipes: Sequence[Recipe],
    *,
    store: str | Path = "runs",
    site: Site | None = None,
    workers: int = 0,
    order: str = "longest-first",
    watch: Callable[[SweepState], None] = lambda state: None,
) -> SweepState:
    """Run what is not done yet, `workers` at a time (0 = one per GPU where there is one, else one per core), on this
    machine. What `order` allows: `drive.Terms`; what `watch` gets, and what is raised: `drive`."""
    place, terms = site or Site(), Terms(order)

    def pool(runs: int) -> Executor:
        return open_executor("", site=place, workers=workers, runs=runs, options={})

    return drive(recipes, pool, store=store, site=site, terms=terms, watch=watch)


def open_executor(address: str, *, site: Site, workers: int, runs: int, options: Mapping[str, str]) -> Executor:
    if address or options:
        raise InputError(f"the local executor has no address and no options ({address or ' '.join(options)!r} given)")
    _check_device(site.device)
    return LocalPool(site, workers, runs)


def _check_device(name: str) -> None:
    """Raises InputError, before any run does, where there is no such GPU."""
    asked = re.fullmatch(r"cuda(?::(\d+))?", name)
    if name in ("auto", "cpu") or (asked is not None and int(asked[1] or 0) < _gpus()):
        return
    from robudget.environment import resolve_device  # torch, which knows GPUs that NVML does not

    resolve_device(name)


class LocalPool:
    """Worker processes of this machine. Of a job, `gpus`, `cpus` and `memory_bytes` are not looked at: every worker has
    its part of the machine, `Site.device` and threads, from the start."""

    def __init__(self, site: Site, workers: int, runs: int) -> None:
        self._devices = _places(site, workers, runs)
        threads, self._lease = taken_for(len(self._devices), site.threads)
        # The runtime's number, not the site's: a run that began with another number goes on with that.
        self._environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        if self._lease is not None:
            self._environment[LEASE] = Path(self._lease.lock_file).name
        self._workers: list[_Worker | None] = [None] * len(self._devices)
        self._waiting: deque[tuple[int, Job]] = deque()
        self._lines: _Lines = queue.Queue()
        self._cancelled: list[Event] = []
        self._start_more()

    @property
    def slots(self) -> int:
        return len(self._devices)

    def submit(self, number: int, job: Job) -> None:
        self._waiting.append((number, job))
        self._assign()

    def events(self, timeout: float) -> list[Event]:
        events, self._cancelled = self._cancelled, []
        try:
            while True:
                # Waits for the first one only.
                event = self._event_of(*self._lines.get(timeout=0 if events else timeout))
                events += [event] if event is not None else []
        except queue.Empty:
            return events

    def cancel(self, number: int) -> None:
        for worker in self._workers:
            if worker is not None and worker.run == number:
                worker.process.terminate()
        if any(waiting == number for waiting, _ in self._waiting):
            self._waiting = deque(item for item in self._waiting if item[0] != number)
            self._cancelled.append(Event(number, "stopped"))

    def close(self) -> None:
        # Checkpoints are atomic and every event is on the disk, so that a worker may be killed at any moment.
        for worker in self._workers:
            if worker is not None:
                worker.process.kill()
        for worker in self._workers:
            if worker is not None:
                worker.process.wait()
        give_back(self._lease)

    def _event_of(self, worker: _Worker, line: dict[str, Any] | None) -> Event | None:
        if line is None:
            return self._end_of(worker)
        if "ready" in line:
            worker.ready = True
            self._assign()
            return None
        event = Event(**line)
        if event.kind != "progress":
            worker.run = None
            worker.ready = event.kind != "stopped"  # after that it ends
            self._assign()
        return event

    def _end_of(self, worker: _Worker) -> Event | None:
        """The event of a worker that has ended: killed, out of memory, a crash below Python, or stopped."""
        self._workers[worker.place] = None
        code, tail = worker.process.wait(), worker.tail()
        number, started = worker.run, worker.ready
        if number is None and not started and code > 0:
            raise RunFailed(f"a worker could not start (exit code {code}):\n{tail}")
        self._assign()
        if number is None:
            return None
        name = signal.Signals(-code).name if code < 0 else ""
        cause = f"signal {-code} ({name})" if code < 0 else f"exit code {code}"
        if name in _OWN_FAULTS or code > 0:
            return Event(number, "failed", f"the worker died: {cause}", cause="crash", tail=tail)
        return Event(number, "lost", f"the worker died: {cause}")

    def _assign(self) -> None:
        """Give waiting jobs to workers that are ready, and start workers for the others."""
        for worker in self._workers:
            if self._waiting and worker is not None and worker.ready and worker.run is None:
                worker.start(*self._waiting.popleft())
        self._start_more()

    def _start_more(self) -> None:
        """A start takes seconds of CPU, and slows down what works already: a few at a time, as jobs need them."""
        starting = sum(worker is not None and not worker.ready and worker.run is None for worker in self._workers)
        wanted = max(1, len(self._waiting)) if not any(self._workers) else len(self._waiting)
        for place, device in enumerate(self._devices):
            if starting >= min(wanted, max(1, cores() // 2)):
                return
            if self._workers[place] is None:
                self._workers[place] = _Worker(place, device, self._environment, self._lines)
                starting += 1


class _Worker:
    """A worker process and the number of the attempt that it makes (None = it waits for one)."""

    def __init__(self, place: int, device: str, environment: Mapping[str, str], lines: _Lines) -> None:
        self.place, self.device = place, device
        self.run: int | None = None
        self.ready = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "robudget.sweep.local", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | environment,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this process, which stops its workers itself
        )
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._errors = threading.Thread(target=self._keep_tail, daemon=True)
        self._errors.start()
        threading.Thread(target=self._listen, args=(lines,), daemon=True).start()

    def _listen(self, lines: _Lines) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.put((self, json.loads(line)))
        lines.put((self, None))

    def _keep_tail(self) -> None:
        assert self.process.stderr is not None
        self._tail.extend(line.rstrip("\n") for line in self.process.stderr)

    def tail(self) -> str:
        """The last lines that an ended worker printed as errors."""
        self._errors.join(timeout=1)
        return "\n".join(self._tail)

    def start(self, number: int, job: Job) -> None:
        assert self.process.stdin is not None
        self.run = number
        data = job.to_dict()
        data["site"] |= {"device": self.device}
        try:
            self.process.stdin.write(json.dumps({"number": number, "job": data}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended just now: that line is in the queue already


def _places(site: Site, workers: int, runs: int) -> list[str]:
    """The device of each worker, the GPUs in turn where there are any."""
    gpus = _gpus() if site.device in ("auto", "cuda") else 0
    if gpus:
        return [f"cuda:{i % gpus}" for i in range(min(workers or gpus, runs))]
    return [site.device] * min(workers or cores(), runs)


def _gpus() -> int:
    """GPUs that may be used, without importing torch (which would cost this process seconds)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
    try:
        import pynvml
    except ImportError:
        return 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or no GPU
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


# -- in the worker's process -------------------------------------------------------------------------------------------


def _work() -> None:
    """Do the jobs of stdin until it ends, or until a stop is requested."""
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    # Whatever a library prints must not end up between the events: they get the real stdout, and print gets stderr.
    lines = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable()  # a crash below Python leaves its stack in the tail

    def send(line: dict[str, Any]) -> None:
        try:
            print(json.dumps(line), file=lines, flush=True)
        except BrokenPipeError:
            os._exit(1)  # nobody reads the events any more; everything worth keeping is on the disk

    stop.end_of_job()
    with stop.on_signals():
        import robudget.runner  # noqa: F401  (torch, which takes seconds)

        send({"ready": True})
        for line in sys.stdin:
            order = json.loads(line)
            send(asdict(attempt(order["number"], order["job"], lambda event: send(asdict(event)))))
            if stop.requested():
                return


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended; what is worth keeping is on the disk at any moment."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    _work()
