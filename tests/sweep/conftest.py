"""Clusters for tests, on this machine alone: a Ray cluster and a Slurm of two nodes each, all of them processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from robudget.recipe import Recipe
from robudget.store import Store

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


@contextmanager
def ray_of_two_nodes() -> Iterator[Any]:
    """A Ray cluster of a head without CPUs and two nodes of one CPU; `address`, `add_node`, `remove_node`."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a socket's path has 107 characters at most
    settings = {
        "RAY_TMPDIR": folder,  # nothing that another Ray on this machine would find
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's workers wait behind everything else by default
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[Any]:
    pytest.importorskip("ray")
    with ray_of_two_nodes() as cluster:
        yield cluster


# -- Slurm -------------------------------------------------------------------------------------------------------------

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port0}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MaxArraySize=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=300
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=1 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=1 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


class Slurm:
    """munged, slurmctld and two slurmd under one folder. No accounting, arrays of two tasks at most; a partition whose
    jobs preempt the others'."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        for name in ("state", "spool-n1", "spool-n2", "munge"):
            (folder / name).mkdir()
        folder.chmod(0o755)
        (folder / "munge").chmod(0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o600)
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = {f"port{i}": each.getsockname()[1] for i, each in enumerate(sockets)}
        host = socket.gethostname().partition(".")[0]
        self.conf.write_text(SLURM_CONF.format(folder=folder, host=host, **ports))

    def start(self) -> None:
        munge = self.folder / "munge"
        files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--force", f"--socket={self.folder}/munge.sock",
                     *(f"--{name}={munge / file}" for name, file in files.items()))  # fmt: skip
        self._daemon("slurmctld", "-f", str(self.conf))
        for node in ("n1", "n2"):
            self.start_node(node)
        deadline = time.monotonic() + 60
        while self.nodes() != "0/2":  # allocated/idle
            assert time.monotonic() < deadline, (self.folder / "ctld.log").read_text()[-2000:]
            time.sleep(0.2)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-f", str(self.conf), "-N", node)

    def nodes(self) -> str:
        return subprocess.run(["sinfo", "-h", "-o", "%A"], capture_output=True, text=True, check=False).stdout.strip()

    def kill_node(self, node: str) -> None:
        """kill -9 of its slurmd and of all that it has started, as when a machine is lost."""
        listed = subprocess.run(
            ["squeue", "-h", "-r", "-w", node, "-o", "%A"], capture_output=True, text=True, check=True
        )
        steps = {f"[{job}.batch]" for job in listed.stdout.split()}
        processes = [psutil.Process(int((self.folder / f"slurmd-{node}.pid").read_text()))]
        processes += [p for p in psutil.process_iter(["cmdline"]) if steps & set(p.info["cmdline"] or ())]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                for each in (process, *process.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()

    def stop(self) -> None:
        subprocess.run(["scancel", "--me", "--signal=KILL"], capture_output=True, check=False)
        for name in ("slurmd-n1.pid", "slurmd-n2.pid", "ctld.pid", "munge/pid"):
            with suppress(OSError, ValueError):
                os.kill(int((self.folder / name).read_text()), signal.SIGTERM)

    def _daemon(self, *words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, env=os.environ | {"SLURM_CONF": str(self.conf)})


@contextmanager
def slurm_in(folder: Path) -> Iterator[Slurm]:
    """A Slurm that SLURM_CONF names while it runs; skips where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm of our own needs root")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is not None:
        with suppress(subprocess.TimeoutExpired):
            words = ["apt-get", "install", "-y", "-qq", "slurm-wlm", "munge"]
            subprocess.run(words, capture_output=True, timeout=180, check=False)
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"no {missing[0]} here (Debian: apt-get install slurm-wlm munge)")
    slurm = Slurm(folder)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(slurm.conf)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        os.environ.pop("SLURM_CONF") if before is None else os.environ.__setitem__("SLURM_CONF", before)


@pytest.fixture(scope="package")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    try:
        with slurm_in(folder) as slurm:
            yield slurm
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- runs that are ended early -----------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tiny: Recipe) -> dict[str, Any]:
    """A study on digits: one recipe learns, one does not, and one forgets its robustness to many steps."""
    base = tiny.with_(
        {
            "model.base": 4, "threat.eps": 0.3, "epochs": 12, "epoch_images": 1024, "validation.every": 6,
            "validation.images": 60, "craft.start": "none", "optim.weight_decay": 0.0, "optim.schedule": "constant",
            "optim.lr": 0.1, "optim.warmup_epochs": 0, "collapse.action": "off",
        }
    )  # fmt: skip
    alternatives = {
        "good": {"optim.lr": 0.3, "craft.steps": 3},
        "weak": {"optim.lr": 1e-7},
        "collapsing": {"craft.step_size": 0.3, "collapse.action": "warn", "collapse.gap": 0.05, "collapse.images": 60,
                       "collapse.steps": 5},
    }  # fmt: skip
    return {"base": base.to_dict(), "axes": {"recipe": alternatives}}


@pytest.fixture
def ends_early(
    uneven: dict[str, Any], tmp_path: Path, robudget_command: Callable[..., tuple[int, str, str]]
) -> Callable[..., None]:
    """Sweeps that study with --halving and --end-collapsed where the words say: the first recipe is done, the second
    is ended at its rung, the third as it collapses."""

    def check(*on: str) -> None:
        study, store = tmp_path / "study.yaml", tmp_path / "runs"
        study.write_text(json.dumps(uneven))
        words = ["sweep", str(study), "device=cpu", "threads=1", "--store", str(store), *on]
        code, _, error = robudget_command(*words, "--halving", "2", "--end-collapsed")
        assert code == 0, error
        assert "2 runs were ended early: saved " in error
        reasons = {folder.recipe.optim.lr: folder.ended_early for folder in Store(store).folders()}
        assert reasons.pop(0.3) is None
        assert "% robust is rank 2 of 2 there, and 1 go on" in str(reasons.pop(1e-7))
        assert "catastrophic overfitting at epoch" in str(reasons.pop(0.1))
        for folder in Store(store).folders():
            epochs = [event["epoch"] for event in folder.events("epoch")]
            assert epochs == list(range(1, len(epochs) + 1))
            assert (len(epochs) == 12) == folder.done

    return check
