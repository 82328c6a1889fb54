"""Many runs on one machine: worker processes side by side, each with its share of the cores or one GPU.

Nothing is remembered here that is not on the disk: what is done is skipped by looking, what was begun resumes, and a
run that another process holds is waited for. Imports no torch.
"""

from __future__ import annotations

import collections
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from robudget.errors import RunFailed
from robudget.recipe import Recipe
from robudget.site import Site
from robudget.store import Store

BUSY_PAUSE = 2.0  # seconds before a run that another process holds is asked for again


@dataclass
class SweepState:
    """What a progress display needs; handed to `watch` after every event.

    `fractions` and `notes` are by index into `recipes`; `done`, `skipped` (were done before) and `failed` count runs.
    """

    recipes: Sequence[Recipe]
    weights: Sequence[float]
    started: float = field(default_factory=time.monotonic)
    fractions: dict[int, float] = field(default_factory=dict)
    phases: dict[int, str] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    running: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    skipped: int = 0

    @property
    def done(self) -> int:
        return self.skipped + len(self.finished)

    @property
    def seconds_left(self) -> float | None:
        """By the weight done since the start; None until 2% of it is."""
        total = sum(self.weights[i] for i in self._asked)
        done = sum(self.weights[i] * self.fractions.get(i, 0.0) for i in self._asked)
        if total == 0 or done < 0.02 * total:
            return None
        return (time.monotonic() - self.started) * (total - done) / done

    @property
    def _asked(self) -> list[int]:
        return [i for i in range(len(self.recipes)) if i in self.fractions]


def sweep(
    recipes: Sequence[Recipe],
    *,
    store: str = "runs",
    site: Site | None = None,
    workers: int = 0,
    weight: Callable[[Recipe], float] = lambda recipe: 1.0,
    watch: Callable[[SweepState], None] = lambda state: None,
) -> SweepState:
    """Run what is not done yet, `workers` at a time (0 = one per GPU asked for, else one per core), longest first.

    `weight` is a recipe's share of the work, for the order and the time left. A failed run is noted in
    `SweepState.failed` and the others go on. On an exception (Ctrl-C among them) the workers are stopped; every run
    keeps what it had saved.
    """
    site = site or Site()
    home = Store(store)
    state = SweepState(recipes, [weight(r) for r in recipes])
    open_runs = [i for i, recipe in enumerate(recipes) if not home.folder(recipe).done]
    state.skipped = len(recipes) - len(open_runs)
    state.fractions = dict.fromkeys(open_runs, 0.0)
    # Longest first: the last ones to finish are then short, and no worker idles long beside the other.
    waiting = collections.deque(sorted(open_runs, key=lambda i: -state.weights[i]))
    if not waiting:
        watch(state)
        return state
    sites = _sites(site, workers, len(waiting))
    events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    crew = [_Worker(number, each, events) for number, each in enumerate(sites)]
    paused: list[tuple[float, int]] = []
    try:
        watch(state)
        while waiting or paused or state.running:
            now = time.monotonic()
            waiting.extend(i for at, i in paused if at <= now)
            paused = [(at, i) for at, i in paused if at > now]
            for worker in crew:
                if worker.job is None and waiting:
                    worker.give(waiting.popleft(), recipes, store)
                    state.running.append(worker.job)  # type: ignore[arg-type]
            try:
                number, event = events.get(timeout=0.5)
            except queue.Empty:
                watch(state)
                continue
            worker = crew[number]
            if event is None:  # the worker died: killed, or out of memory
                code = worker.process.wait()
                if worker.job is None:
                    raise RunFailed(f"a worker ended by itself with exit code {code}")
                event = {"index": worker.job, "kind": "failed", "note": f"the worker died with exit code {code}"}
                crew[number] = _Worker(number, sites[number], events)
            index = event["index"]
            if event["kind"] == "progress":
                state.fractions[index] = event["fraction"]
                state.phases[index], state.notes[index] = event["phase"], event["note"]
            else:
                state.running.remove(index)
                worker.job = None
                state.fractions[index] = 1.0
                if event["kind"] == "done":
                    state.finished.append(index)
                    state.notes[index] = event["note"]
                elif event["kind"] == "failed":
                    state.failed[index] = event["note"]
                else:
                    state.fractions[index] = 0.0
                    paused.append((time.monotonic() + BUSY_PAUSE, index))
            watch(state)
    finally:
        for worker in crew:
            worker.stop()
    return state


class _Worker:
    """A worker process and the index of the run it holds (None = idle)."""

    def __init__(self, number: int, site: Site, events: queue.Queue[tuple[int, dict[str, Any] | None]]):
        self.job: int | None = None
        self.site = site
        threads = (
            {} if site.threads == 0 else {"OMP_NUM_THREADS": str(site.threads), "MKL_NUM_THREADS": str(site.threads)}
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "robudget.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent, which stops its workers itself
        )
        threading.Thread(target=self._listen, args=(number, events), daemon=True).start()

    def _listen(self, number: int, events: queue.Queue[tuple[int, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            events.put((number, json.loads(line)))
        events.put((number, None))

    def give(self, index: int, recipes: Sequence[Recipe], store: str) -> None:
        assert self.process.stdin is not None
        self.job = index
        job = {"index": index, "recipe": recipes[index].to_dict(), "store": store, "site": asdict(self.site)}
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
