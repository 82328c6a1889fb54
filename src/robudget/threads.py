"""How many CPU threads this process computes with, and how they wait, so that processes of one machine share its cores.

The number comes from affinity, the container's quota, and what other robudget processes of this user hold. Imports no
torch before it is needed.

Two processes that each use every core slow each other far more than twofold: a thread that has finished its part spins
until the last one has, and takes the core that the last one needs. So (1) a process that begins beside others takes
what they leave, (2) its threads wait asleep where they share the cores, and spin only briefly where they are alone
(`bench/RESULTS.md` has what each costs), and (3) what was begun with some number of threads goes on with it: the number
is part of what fixes the bits of a result.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: `import robudget` need not wait for it
    from filelock import FileLock

# GNU's OpenMP spins through about a millisecond by default. So many turns lose nothing measurable on a quiet machine.
SPIN_TURNS = "3000"
_LOCK_SECONDS = 5.0
LEASE = "ROBUDGET_LEASE"  # of a worker: the lease of the process that started it, in which its threads are counted
_own = {os.environ[LEASE]} if LEASE in os.environ else set[str]()  # leases of this process


def cores(root: Path = Path("/")) -> int:
    """CPUs that this process may use at once, at least 1: its affinity, and the quota of its control groups (versions 1
    and 2), rounded down. `root`: where `proc` and `sys` are, for tests."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(allowed, quota(root))))


def quota(root: Path = Path("/")) -> float:
    """CPUs' worth of time that the control groups of this process grant it; infinite where they grant all."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return float("inf")
    least = float("inf")
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            mount = next((m for n in (controllers, "cpu") if (m := root / "sys/fs/cgroup" / n).is_dir()), root)
        else:
            continue
        place = mount / path.lstrip("/")
        for folder in (place, *place.parents):  # a group has no more than any group that it lies in
            least = min(least, _quota_of(folder))
            if folder == mount:
                break
    return least


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():
            granted, period = (group / "cpu.max").read_text().split()
        else:
            granted = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return float("inf") if granted in ("max", "-1") else float(granted) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return float("inf")


def share(held: Sequence[int], available: int) -> int:
    """Threads for one more process beside processes that hold `held`: what they leave of `available`, or an equal part
    of all where that is more, and at least 1."""
    return max(1, available - sum(held), available // (len(held) + 1))


def wait_considerately() -> None:
    """Tell the OpenMP runtime how threads wait; to be called before torch is imported, without effect after that.

    Asleep where this process has less than the machine or is not alone on it, else spinning briefly. What the user has
    set (OMP_WAIT_POLICY, GOMP_SPINCOUNT) stays.
    """
    if "torch" in sys.modules or os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        return
    if held_by_others() or cores() < (os.cpu_count() or 1):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = SPIN_TURNS


@contextlib.contextmanager
def claimed(asked: int, *, begun_with: int | None = None) -> Iterator[int]:
    """Set torch's threads for a piece of work on the CPU, and let other processes know of them meanwhile.

    `asked`: what the user wants, 0 = nothing said. Then it is `begun_with` where this goes on with earlier work and the
    machine has as many; else what OMP_NUM_THREADS says; else this process's share. Torch's number is put back after.
    """
    import torch

    before = torch.get_num_threads()
    with _census():
        if asked:
            count = asked
        elif begun_with is not None and begun_with <= max(cores(), before):
            count = begun_with
        elif "OMP_NUM_THREADS" in os.environ:
            count = before
        else:
            count = min(before, share(_held(), cores()))
        lease = None if LEASE in os.environ else _take(count)
    try:
        torch.set_num_threads(count)
        yield count
    finally:
        torch.set_num_threads(before)
        give_back(lease)


def taken_for(workers: int, asked: int) -> tuple[int, FileLock | None]:
    """Threads of each of so many worker processes, and a lease on all of them until `give_back`: `asked`, or 0 for this
    process's share of the cores. `LEASE` in a worker's environment is to be the name of the lease's file."""
    with _census():
        each = asked or max(1, share(_held(), cores()) // max(1, workers))
        return each, _take(each * workers)


# -- leases: a file for each claim, locked while its process lives -----------------------------------------------------


def held_by_others() -> list[int]:
    """Threads held by each other robudget process of this user on this machine."""
    if not any(_folder().glob("*.lease")):
        return []
    with _census():
        return _held()


def _folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("TMPDIR") or "/tmp") / f"robudget-{user}"


@contextlib.contextmanager
def _census() -> Iterator[None]:
    """One process at a time counts and takes; where no folder can be had, all go on as if they were alone."""
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, Timeout):
            _folder().mkdir(mode=0o700, exist_ok=True)
            stack.enter_context(FileLock(_folder() / "census.lock", timeout=_LOCK_SECONDS))
        yield


def _held() -> list[int]:
    from filelock import FileLock, Timeout

    held = []
    for path in _folder().glob("*.lease"):
        if path.name in _own:
            continue
        try:
            with FileLock(path, timeout=0):
                path.unlink(missing_ok=True)  # its process has ended, however it did
        except Timeout:
            held.append(int(path.stem.rpartition("-")[2]))
        except OSError:
            continue
    return held


def _take(count: int) -> FileLock | None:
    """A lease on `count` threads, or None where none can be written."""
    from filelock import FileLock, Timeout

    path = _folder() / f"{os.getpid()}-{uuid.uuid4().hex[:8]}-{count}.lease"
    try:
        lease = FileLock(path, timeout=0)
        lease.acquire()
    except (OSError, Timeout):
        return None
    _own.add(path.name)
    return lease


def give_back(lease: FileLock | None) -> None:
    """Let other processes have what a lease held; None: where none could be written."""
    if lease is None:
        return
    path = Path(lease.lock_file)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    lease.release()
    _own.discard(path.name)
