"""Many runs on one machine: worker processes side by side, each with its share of the cores or one GPU.

Nothing is remembered here that is not on the disk: what is done is skipped by looking, what was begun resumes, and a
run that another process holds is waited for. Imports no torch.

A worker is a separate interpreter (`python -m robudget.sweep.local PID`, the process that starts it) rather than a
forked process: it sets its thread count before torch starts, and needs no guard in the user's script. It reads one JSON
job a line from stdin, does it, writes one JSON event a line to stdout, and ends when the process that started it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robudget import stop
from robudget.errors import RobudgetError, RunFailed
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Busy, Store
from robudget.sweep.queue import Status, SweepState, job, run_job
from robudget.threads import cores, held_by_others, share

if TYPE_CHECKING:
    from robudget.runner import Progress

BUSY_SECONDS = 2.0  # before a run that another process holds is tried again
_WATCH_SECONDS = 0.5  # at most, between two calls of `watch`
_LOOK_SECONDS = 1.0  # of a worker after the process that started it

_Events = queue.Queue[tuple[int, dict[str, Any] | None]]  # (worker, event); None: the worker has ended


def sweep(
    recipes: Sequence[Recipe],
    *,
    store: str | Path = "runs",
    site: Site | None = None,
    workers: int = 0,
    watch: Callable[[SweepState], None] = lambda state: None,
) -> SweepState:
    """Run what is not done yet, `workers` at a time (0 = one per GPU where there is one, else one per core).

    `watch` gets the state after every event and twice a second. A failed run is noted and the others go on. On an
    exception (Ctrl-C among them) the workers are stopped; every run keeps what it had saved.
    """
    home = Store(store)
    state = SweepState.begin(recipes, home)
    watch(state)
    if not state.to_do:
        return state
    waiting = deque(state.to_do)
    busy: list[tuple[float, int]] = []  # held by another process: when to try again
    sites, threads = _places(site or Site(), workers, len(waiting))
    events: _Events = queue.Queue()
    processes = [_Worker(number, each, threads, events) for number, each in enumerate(sites)]
    try:
        while waiting or busy or state.running:
            stop.check()
            now = time.monotonic()
            waiting.extend(index for at, index in busy if at <= now)
            busy = [(at, index) for at, index in busy if at > now]
            for worker in processes:
                if worker.run is None and waiting:
                    index = waiting.popleft()
                    worker.start(index, job(recipes[index], home, worker.site))
                    state.running[index] = Status()
            try:
                number, event = events.get(timeout=_WATCH_SECONDS)
            except queue.Empty:
                watch(state)
                continue
            worker = processes[number]
            if event is None:
                event = _failure_of(worker)
                processes[number] = _Worker(number, sites[number], threads, events)
            assert worker.run is not None
            index = worker.run
            if event["kind"] == "progress":
                state.running[index] = Status(event["phase"], event["fraction"], event["note"])
            else:
                worker.run = None
                if event["kind"] == "done":
                    state.finish(index, event["note"])
                elif event["kind"] == "failed":
                    state.fail(index, event["note"])
                else:
                    del state.running[index]
                    busy.append((time.monotonic() + BUSY_SECONDS, index))
            watch(state)
    finally:
        for worker in processes:
            worker.stop()
    return state


def _failure_of(worker: _Worker) -> dict[str, Any]:
    """The event of a worker that ended in the middle of a run: killed, out of memory, or a crash below Python."""
    code = worker.process.wait()
    if worker.run is None:
        raise RunFailed(f"a worker ended by itself with exit code {code}")
    cause = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    return {"kind": "failed", "note": f"the worker died: {cause}; run again to go on"}


class _Worker:
    """A worker process and the index of the run that it does (None = it waits for one)."""

    def __init__(self, number: int, site: Site, threads: int, events: _Events):
        self.run: int | None = None
        self.site = site
        # The runtime's number, not the site's: a run that began with another number goes on with that.
        share = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) if threads else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "robudget.sweep.local", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | share,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for this process, which stops its workers itself
        )
        threading.Thread(target=self._listen, args=(number, events), daemon=True).start()

    def _listen(self, number: int, events: _Events) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((number, json.loads(line)))
        events.put((number, None))

    def start(self, index: int, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.run = index
        with contextlib.suppress(BrokenPipeError):  # it ended just now: that event is in the queue already
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        # Checkpoints are atomic and every event is on the disk, so that the process may be killed at any moment.
        self.process.kill()
        self.process.wait()


def _places(site: Site, workers: int, runs: int) -> tuple[list[Site], int]:
    """One site a worker, and the threads of each (0: not limited): the GPUs in turn, or this process's share of the
    cores, shared evenly."""
    gpus = _gpus() if site.device in ("auto", "cuda") else 0
    if gpus:
        count = min(workers or gpus, runs)
        return [site.model_copy(update={"device": f"cuda:{i % gpus}"}) for i in range(count)], site.threads
    count = min(workers or cores(), runs)
    return [site] * count, site.threads or max(1, share(held_by_others(), cores()) // count)


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
    """Do the jobs of stdin until it ends."""
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    # Whatever a library prints must not end up between the events: they get the real stdout, and print gets stderr.
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def send(kind: str, note: str = "", **fields: Any) -> None:
        try:
            print(json.dumps({"kind": kind, "note": note, **fields}), file=events, flush=True)
        except BrokenPipeError:
            os._exit(1)  # nobody reads the events any more; everything worth keeping is on the disk

    def report(progress: Progress) -> None:
        send("progress", progress.note, phase=progress.phase, fraction=progress.fraction)

    for line in sys.stdin:
        try:
            summary = run_job(json.loads(line), report)
        except Busy:
            send("busy")
        except RobudgetError as error:
            send("failed", str(error))
        except Exception as error:  # a defect of ours or of a library: the other runs go on, and it is reported as such
            traceback.print_exc()
            send("failed", f"{type(error).__name__}: {error}")
        else:
            send("done", summary)


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended; what is worth keeping is on the disk at any moment."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    _work()
