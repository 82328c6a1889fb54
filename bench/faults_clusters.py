"""Sweeps on Ray and Slurm under kills, and still the table of an undisturbed one: python bench/faults_clusters.py WHERE

As `faults.py`, on the clusters of the tests: two nodes of one CPU, all processes of this machine. In each round one
fault in turn strikes twice at random times (by a seed): kill -9 of a worker, of a node with all that runs on it, of the
driver. What ended is started again until the study is done. What must hold, and the study, are those of `faults.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from faults import STALE_SECONDS, TINY, Disturbed, differences, repeated_epochs
from robudget.recipe import Recipe
from robudget.sweep.study import Study

FAULTS = ("worker", "node", "driver")
STRIKES = 2


def clusters() -> ModuleType:
    """The clusters of the tests."""
    path = Path(__file__).resolve().parents[1] / "tests" / "sweep" / "conftest.py"
    spec = importlib.util.spec_from_file_location("clusters", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OnRay:
    options = ("device=cpu", "threads=1")

    def __init__(self, cluster: Any, node: dict[str, Any]) -> None:
        self.cluster, self.node, self.on = cluster, node, f"ray:{cluster.address}"

    def workers(self) -> list[psutil.Process]:
        mine = [p for node in self.cluster.worker_nodes for p in _family(node)]
        return [p for p in mine if _said(p).startswith("ray::") and "robudget" in _said(p)]

    def strike_node(self, chance: random.Random) -> None:
        node = chance.choice(sorted(self.cluster.worker_nodes, key=id))
        self.cluster.remove_node(node, allow_graceful=False)
        time.sleep(chance.uniform(0, 3))
        self.cluster.add_node(**self.node)

    def end(self) -> None:
        """Ray ends what a driver has left."""


def _family(node: Any) -> list[psutil.Process]:
    found = []
    for process in node.all_processes.get("raylet", []):
        with contextlib.suppress(psutil.Error):
            found += psutil.Process(process.process.pid).children(recursive=True)
    return found


def _said(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class OnSlurm:
    on = "slurm"
    options = ("device=cpu", "threads=1", "--time=20", "--runs-per-job=2")

    def __init__(self, slurm: Any) -> None:
        self.slurm = slurm

    def workers(self) -> list[psutil.Process]:
        ours = [p for p in psutil.process_iter() if f"SLURM_CONF={self.slurm.conf}" in _environment(p)]
        return [p for p in ours if "robudget.sweep.local" in _said(p) or "robudget.sweep.slurm_task" in _said(p)]

    def strike_node(self, chance: random.Random) -> None:
        node = chance.choice(["n1", "n2"])
        self.slurm.kill_node(node)
        time.sleep(chance.uniform(0, 15))  # shorter or longer than Slurm waits for it
        self.slurm.start_node(node)

    def end(self) -> None:
        subprocess.run(["scancel", "--me"], check=False)


def _environment(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return [f"{name}={value}" for name, value in process.environ().items() if name == "SLURM_CONF"]
    return []


@dataclass
class Round(Disturbed):
    """On a cluster, with one driver at a time."""

    place: OnRay | OnSlurm | None = None

    def start(self) -> None:
        if not self.ended():
            return
        assert self.place is not None
        command = [sys.executable, "-m", "robudget", "sweep", str(self.study), *self.place.options]
        where = {"ROBUDGET_STALE_SECONDS": str(STALE_SECONDS), "ROBUDGET_SLURM_POLL_SECONDS": "1"}
        with self.store.with_suffix(".log").open("ab") as log:
            driver = subprocess.Popen(
                [*command, "--on", self.place.on, "--store", str(self.store)],
                env=os.environ | where,
                stdout=log,
                stderr=log,
            )
        self.drivers.append(driver)
        self.count["starts"] += 1

    def strike(self, chance: random.Random) -> None:
        assert self.place is not None
        self.some_work(chance)
        if self.fault == "node":
            self.count["kills"] += 1
            self.place.strike_node(chance)
        elif self.fault == "driver":
            self.kill(self.drivers[-1])
            self.drivers[-1].wait()
        else:
            for worker in self.place.workers()[:1]:
                self.kill(worker)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("where", choices=["ray", "slurm"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--faults", nargs="*", default=FAULTS, choices=FAULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", type=int, default=3)
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = stack.enter_context(_place(asked.where, home))
        study = home / "study.yaml"
        seeds = ", ".join(f"s{seed}: {{seed: {seed}}}" for seed in range(asked.recipes))
        study.write_text(
            f"base: {json.dumps(Recipe.load('digits', TINY).to_dict())}\naxes:\n  seed: {{{seeds}}}\n", "utf-8"
        )
        recipes = list(Study.load(study).recipes)
        plain = Round("", home / "undisturbed", study, place=place)
        began = time.monotonic()
        plain.complete()
        print(f"undisturbed on {asked.where}: {time.monotonic() - began:.0f} s", flush=True)
        failed = 0
        for number in range(asked.rounds):
            fault, chance = asked.faults[number % len(asked.faults)], random.Random(asked.seed + number)
            now = Round(fault, home / f"round-{number}", study, place=place)
            began, wrong = time.monotonic(), []
            try:
                for _ in range(STRIKES):
                    now.start()
                    now.strike(chance)
                now.complete()
                wrong = differences(now.store, plain.store, recipes)
                now.count["repeated epochs"] = repeated_epochs(now.store)
            except (TimeoutError, RuntimeError) as error:
                wrong = [str(error)]
            finally:
                for driver in now.drivers:
                    driver.kill()
                place.end()
            failed += bool(wrong)
            what = ", ".join(f"{value} {name}" for name, value in now.count.items())
            seconds = time.monotonic() - began
            print(f"{number:>3} {fault} {seconds:4.0f} s  {what}  {wrong or 'as undisturbed'}", flush=True)
        print(f"{asked.rounds} rounds on {asked.where}, {failed} not as undisturbed")
    sys.exit(bool(failed))


@contextlib.contextmanager
def _place(where: str, home: Path) -> Iterator[OnRay | OnSlurm]:
    own = clusters()
    if where == "ray":
        with own.ray_of_two_nodes() as cluster:
            yield OnRay(cluster, own.NODE)
    else:
        folder = home / "slurm"
        folder.mkdir()
        home.chmod(0o755)  # munge refuses a folder that others may not enter
        with own.slurm_in(folder) as slurm:
            yield OnSlurm(slurm)


if __name__ == "__main__":
    main()
