"""Many runs on one machine: worker processes side by side, each with its share of the cores or one GPU.

Nothing is remembered here that is not on the disk: what is done is skipped by looking, what was begun resumes, and a
run that another process holds is waited for. Imports no torch.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from robudget.errors import RunFailed
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Store
from robudget.sweep.state import Status, SweepState

BUSY_PAUSE = 2.0  # seconds before a run that another process holds is asked for again

_Events = queue.Queue[tuple[int, dict[str, Any] | None]]  # (worker, event); None: the worker has ended


def sweep(
    recipes: Sequence[Recipe],
    *,
    store: str | Path = "runs",
    site: Site | None = None,
    workers: int = 0,
    weight: Callable[[Recipe], float] = lambda recipe: 1.0,
    watch: Callable[[SweepState], None] = lambda state: None,
) -> SweepState:
    """Run what is not done yet, `workers` at a time (0 = one per GPU where there is one, else one per core).

    `weight` is a recipe's share of the work, for the order and the time left. A failed run is noted and the others go
    on. On an exception (Ctrl-C among them) the workers are stopped; every run keeps what it had saved.
    """
    state = SweepState.begin(recipes, Store(store), weight)
    watch(state)
    if not state.to_do:
        return state
    waiting = collections.deque(state.to_do)
    paused: list[tuple[float, int]] = []  # held by another process: when to ask again
    sites = _sites(site or Site(), workers, len(waiting))
    events: _Events = queue.Queue()
    crew = [_Worker(number, each, events) for number, each in enumerate(sites)]
    try:
        while waiting or paused or state.running:
            now = time.monotonic()
            waiting.extend(index for at, index in paused if at <= now)
            paused = [(at, index) for at, index in paused if at > now]
            for worker in crew:
                if worker.job is None and waiting:
                    index = waiting.popleft()
                    worker.give(index, recipes[index], str(store))
                    state.running[index] = Status()
            try:
                number, event = events.get(timeout=0.5)
            except queue.Empty:
                watch(state)
                continue
            worker = crew[number]
            if event is None:
                event = _obituary(worker)
                crew[number] = _Worker(number, sites[number], events)
            index = event["index"]
            if event["kind"] == "progress":
                state.running[index] = Status(event["phase"], event["fraction"], event["note"])
            else:
                worker.job = None
                if event["kind"] == "done":
                    state.finish(index, event["note"])
                elif event["kind"] == "failed":
                    state.fail(index, event["note"])
                else:
                    del state.running[index]
                    paused.append((time.monotonic() + BUSY_PAUSE, index))
            watch(state)
    finally:
        for worker in crew:
            worker.stop()
    return state


def _obituary(worker: _Worker) -> dict[str, Any]:
    """The event of a worker that died: killed, out of memory, or a crash below Python."""
    code = worker.process.wait()
    if worker.job is None:
        raise RunFailed(f"a worker ended by itself with exit code {code}")
    cause = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    return {"index": worker.job, "kind": "failed", "note": f"the worker died: {cause}; run again to go on"}


class _Worker:
    """A worker process and the index of the run it holds (None = idle)."""

    def __init__(self, number: int, site: Site, events: _Events):
        self.job: int | None = None
        self.site = site
        threads = (
            {} if site.threads == 0 else {"OMP_NUM_THREADS": str(site.threads), "MKL_NUM_THREADS": str(site.threads)}
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "robudget.sweep.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent, which stops its workers itself
        )
        threading.Thread(target=self._listen, args=(number, events), daemon=True).start()

    def _listen(self, number: int, events: _Events) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((number, json.loads(line)))
        events.put((number, None))

    def give(self, index: int, recipe: Recipe, store: str) -> None:
        assert self.process.stdin is not None
        self.job = index
        job = {"index": index, "recipe": recipe.to_dict(), "store": store, "site": asdict(self.site)}
        with contextlib.suppress(BrokenPipeError):  # it died just now: its end is in the queue already
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        # Checkpoints are atomic and every event is on the disk, so that there is nothing to say goodbye to.
        self.process.kill()
        self.process.wait()


def _sites(site: Site, workers: int, runs: int) -> list[Site]:
    """One site a worker: GPUs dealt out, or the cores shared evenly."""
    gpus = _gpus() if site.device in ("auto", "cuda") else 0
    if gpus:
        count = min(workers or gpus, runs)
        return [replace(site, device=f"cuda:{i % gpus}") for i in range(count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, runs)
    return [replace(site, threads=site.threads or max(1, cores // count))] * count


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
