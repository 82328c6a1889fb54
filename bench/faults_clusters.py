"""Sweeps on Ray and Slurm under faults; is the table that of an undisturbed one? python bench/faults_clusters.py WHERE

As `faults.py`, on the clusters of the tests: two nodes of one CPU, all processes of this machine. Faults, study and
what must hold are those of `faults.py`, and one more fault: kill -9 of a node with all that runs on it, twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

import faults
from faults import Disturbed

NODE = "node killed"


def clusters() -> ModuleType:
    """The clusters of the tests."""
    path = Path(__file__).resolve().parents[1] / "tests" / "sweep" / "conftest.py"
    spec = importlib.util.spec_from_file_location("clusters", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class OnRay(Disturbed):
    cluster: Any = None
    node: Any = None

    def __post_init__(self) -> None:
        self.where = ("--on", f"ray:{self.cluster.address}")

    def workers(self) -> list[psutil.Process]:
        mine = [p for node in self.cluster.worker_nodes for p in _family(node)]
        return [p for p in mine if _said(p).startswith("ray::") and "robudget" in _said(p)]

    def strike_node(self, chance: random.Random) -> None:
        node = chance.choice(sorted(self.cluster.worker_nodes, key=id))
        self.cluster.remove_node(node, allow_graceful=False)
        time.sleep(chance.uniform(0, 3))
        self.cluster.add_node(**self.node)


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


@dataclass
class OnSlurm(Disturbed):
    where = ("--on", "slurm", "--time=20", "--runs-per-job=2")
    settings = {"ROBUDGET_SLURM_POLL_SECONDS": "1"}  # noqa: RUF012
    slurm: Any = None

    def workers(self) -> list[psutil.Process]:
        ours = [p for p in psutil.process_iter() if f"SLURM_CONF={self.slurm.conf}" in _environment(p)]
        return [p for p in ours if "robudget.sweep.local" in _said(p) or "robudget.sweep.slurm_task" in _said(p)]

    def strike_node(self, chance: random.Random) -> None:
        node = chance.choice(["n1", "n2"])
        self.slurm.kill_node(node)
        time.sleep(chance.uniform(0, 15))  # shorter or longer than Slurm waits for it
        self.slurm.start_node(node)

    def end(self) -> None:
        super().end()
        subprocess.run(["scancel", "--me"], check=False)


def _environment(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return [f"{name}={value}" for name, value in process.environ().items() if name == "SLURM_CONF"]
    return []


def node_killed(now: Disturbed, chance: random.Random) -> None:
    assert isinstance(now, OnRay | OnSlurm)
    now.start()
    for _ in range(2):
        now.some_work(chance)
        now.strike_node(chance)
        now.count["kills"] += 1


# A paused owner on Ray keeps its CPU, so that no other driver's task could follow it.
FAULTS = {NODE: node_killed} | {
    name: fault for name, fault in faults.FAULTS.items() if name not in ("paused owner", "liveness")
}


def main() -> int:
    parser = faults.parser(__doc__, list(FAULTS))
    parser.add_argument("where", choices=["ray", "slurm"])
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        study, inside = faults.tiny_study(home, asked.recipes), faults.folder_inside(home)
        # What a node starts imports it too.
        os.environ["PYTHONPATH"] = f"{inside}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        own = clusters()
        if asked.where == "ray":
            cluster = stack.enter_context(own.ray_of_two_nodes())

            def begin(fault: str, store: str) -> Disturbed:
                return OnRay(fault, home / store, study, inside, cluster=cluster, node=own.NODE)
        else:
            (home / "slurm").mkdir()
            home.chmod(0o755)  # munge refuses a folder that others may not enter
            slurm = stack.enter_context(own.slurm_in(home / "slurm"))

            def begin(fault: str, store: str) -> Disturbed:
                return OnSlurm(fault, home / store, study, inside, slurm=slurm)

        return faults.play(FAULTS, asked, home, begin)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
