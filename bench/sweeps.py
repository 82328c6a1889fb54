"""What a sweep costs beside its runs, in time and in memory of the driver: python bench/sweeps.py WHAT [N ...]

WHAT: local, ray, driver or dry. A run here is one that is done already, while the driver is made to believe that it
is not: it submits the run, a worker opens the recipe, finds run.json, reads it and answers. So all of the sweep is in
it, and nothing of training. Workers are warm: two of them, after as many runs have been made. Each N has a process of
its own. `ray`: a cluster of this machine, a head and two nodes of one CPU. `driver`: no workers, an executor that ends
each run at once. `dry`: the whole command `robudget sweep paper-320 --dry-run`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

WORKERS = 2
RECORD = {
    "format": 1,
    "environment": {"device": "cpu", "processes": 1},
    "training": {"seconds": 1.0, "energy": {"kwh": None}},
    "evaluation": {
        "robust": 0.5, "low": 0.4, "high": 0.6, "clean": 0.9, "n": 12, "seconds": 1.0, "energy": {"kwh": None},
    },
}  # fmt: skip


class Instant:
    """Ends each run as soon as it is asked."""

    slots = WORKERS + 2

    def __init__(self) -> None:
        self._waiting: list[Any] = []

    def submit(self, number: int, job: Any) -> None:
        from robudget.sweep.executor import Event

        self._waiting.append(Event(number, "done", "robust 50.0% [40.0, 60.0], clean 90.0% of 12 images"))

    def events(self, timeout: float) -> list[Any]:
        events, self._waiting = self._waiting, []
        return events

    def cancel(self, number: int) -> None:
        raise AssertionError

    def close(self) -> None:
        pass


def measure(on: str, n: int, address: str) -> dict[str, float]:
    """In a process of its own: seconds a run and the driver's memory in MiB, before and at its highest."""
    import resource

    from robudget.execution import Site
    from robudget.recipe import Recipe
    from robudget.store import RunFolder, Store
    from robudget.sweep.drive import drive
    from robudget.sweep.executor import Executor, Job, open_executor

    base = Recipe.load("digits")
    recipes = [base.with_({"seed": seed}) for seed in range(n)]
    site = Site(device="cpu", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        record = RECORD | {"evaluation": {**RECORD["evaluation"], "id": base.evaluation_id}}
        for recipe in recipes:
            path = store.folder(recipe).path
            path.mkdir(parents=True)
            (path / "run.json").write_text(json.dumps(record))
        RunFolder.has = lambda self, recipe: False  # type: ignore[method-assign]
        where = f"ray:{address}" if on == "ray" else on
        workers = WORKERS if on == "local" else 0
        executor = Instant() if on == "driver" else open_executor(where, site=site, workers=workers, runs=n)
        for number in range(2 * WORKERS):  # the workers start, and import what they need
            executor.submit(number, Job(recipes[number % n].to_dict(), folder, site.model_dump()))
        ended = 0
        while ended < 2 * WORKERS:
            ended += sum(event.kind == "done" for event in executor.events(1.0))
        kept: Executor = executor
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started, cpu = time.perf_counter(), time.process_time()
        state = drive(recipes, lambda runs: kept, store=folder, site=site)
        seconds = time.perf_counter() - started
        assert state.done == n, state.failed
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    spent = time.process_time() - cpu
    return {"n": n, "ms": 1000 * seconds / n, "driver_cpu_ms": 1000 * spent / n, "before": before, "after": after}


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of this machine: a head without CPUs and two nodes of one CPU."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    os.environ |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    own = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for _ in range(WORKERS):
            own.add_node(num_cpus=1, **small)
        yield own.address
    finally:
        own.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["local", "ray", "driver", "dry"])
    parser.add_argument("n", nargs="*", type=int, default=[10, 100, 1000])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.what, args.n[0], args.one)))
        return
    if args.what == "dry":
        command = [sys.executable, "-m", "robudget", "sweep", "paper-320", "--dry-run"]
        with tempfile.TemporaryDirectory() as empty:
            times = []
            for _ in range(5):
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, cwd=empty)
                times.append(time.perf_counter() - started)
        print(f"dry-run of 320: median {statistics.median(times):.2f} s, {min(times):.2f} to {max(times):.2f} (n = 5)")
        return
    with cluster() if args.what == "ray" else contextlib.nullcontext("") as address:
        for n in args.n:
            command = [sys.executable, __file__, args.what, str(n), "--one", address]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(said.splitlines()[-1])
            print(
                f"{args.what}: {n:6d} runs, {row['ms']:6.1f} ms a run ({row['driver_cpu_ms']:.1f} ms of the driver's "
                f"CPU), driver {row['before']:.0f} MiB before, {row['after']:.0f} MiB at most",
                flush=True,
            )


if __name__ == "__main__":
    main()
