"""Who works in a folder: a lease by files alone, which holds between processes, nodes and network file systems.

    <folder>/.lease-7      the newest is the one that counts: its number only grows
        000000000012       beats so far, or "released"; the owner counts on, every few seconds
        {"host": …}        the owner

A lease is taken by creating the file with the next number, which the file system lets one process do (`O_EXCL`). One
that was released, or whose process is dead on this host, may be followed at once; any other one only by an observer in
whose own time the beats have stood still for `STALE_SECONDS`, so that clocks need not agree. Whoever takes over removes
the lease before; an owner that comes back too late finds that its own is no longer the newest, and its writes raise
LeaseLost: `files.py` asks before each of them. Between that question and the write itself lie microseconds in which a
process could be paused; what it then still writes is one file of the same run, whose bits depend on its recipe alone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robudget import files, stop
from robudget.errors import RobudgetError

# Longer than a file server is usually away or an attribute is cached; a pause longer than that costs an owner its run.
STALE_SECONDS = float(os.environ.get("ROBUDGET_STALE_SECONDS", "60"))
BEAT_SECONDS = STALE_SECONDS / 12
PREFIX = ".lease-"
_WIDTH = 12  # bytes of the first line
_RELEASED = "released"


class Busy(RobudgetError):
    """Another process is working on this run or evaluation."""


class LeaseLost(Busy):
    """This process was paused, or cut off from the store, for so long that another one has taken its run over."""


@dataclass(frozen=True)
class Entry:
    """A lease as it lies on the disk. `owner` is empty in the instant in which it is written."""

    number: int
    beat: str
    owner: dict[str, Any]

    @property
    def released(self) -> bool:
        return self.beat == _RELEASED

    @property
    def free(self) -> bool:
        """May another process follow at once?"""
        return self.released or (bool(self.owner) and dead(self.owner))

    def __str__(self) -> str:
        return f"process {self.owner.get('pid', '?')} on {self.owner.get('host', 'an unknown host')}"


def read(folder: Path) -> Entry | None:
    """The newest lease of a folder; None where there is none, or no folder."""
    while number := _newest(folder):
        try:
            # Opening the file makes a network file system ask its server, where a look at the folder may be cached.
            beat, _, owner = (folder / f"{PREFIX}{number}").read_text("utf-8").partition("\n")
        except FileNotFoundError:
            continue  # somebody has followed just now
        try:
            return Entry(number, beat.strip(), json.loads(owner))
        except ValueError:
            return Entry(number, beat.strip(), {})
    return None


def _newest(folder: Path) -> int:
    """The number of the newest lease of a folder, 0 where there is none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    return max((int(name[len(PREFIX) :]) for name in names if name.startswith(PREFIX)), default=0)


class Lease:
    """This process's right to write in a folder (and in `guarding`, if that is another one), until it is released.

    Made by `take`, or, in the other processes of a run that its first process has a lease for, by `share`.
    """

    def __init__(self, folder: Path, guarding: Path, entry: Entry, *, beating: bool) -> None:
        self.folder, self.entry = folder, entry
        self._path = folder / f"{PREFIX}{entry.number}"
        self._ended = threading.Event()
        self._guarding = guarding
        files.guard(guarding, self.check)
        self._thread = threading.Thread(target=self._beat, name="robudget-lease", daemon=True) if beating else None
        if self._thread is not None:
            self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost where this is no longer the newest lease, FileNotFoundError where the folder is gone."""
        if not self._path.exists():
            self.folder.stat()
        entry = read(self.folder)
        if entry is None or (entry.number, entry.owner) != (self.entry.number, self.entry.owner) or entry.released:
            now = f"{entry} has taken it over" if entry is not None else "its lease is gone"
            raise LeaseLost(f"{str(self.folder)!r} is no longer this process's: {now}; nothing more is written")

    def release(self) -> None:
        """Let others follow at once."""
        self._ended.set()
        files.unguard(self._guarding)
        if self._thread is not None:
            self._thread.join(timeout=5)
            with suppress(OSError, LeaseLost):
                self.check()
                self._write(_RELEASED)

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT_SECONDS):
            beats += 1
            stop.look()
            with suppress(OSError):  # the store is away, or another process has followed: `check` will say so
                self._write(f"{beats:0{_WIDTH}}")

    def _write(self, beat: str) -> None:
        with self._path.open("r+b") as file:  # never creates it
            file.write(beat.ljust(_WIDTH).encode())


def take(folder: Path, *, guarding: Path | None = None, over: int = 0) -> Lease:
    """A lease on `folder`, which exists. `over`: the number of a lease that an `Observer` has found stale. Raises Busy
    where another process has it."""
    last = read(folder)
    if last is not None and not last.free and last.number != over:
        raise Busy(f"{str(folder)!r} is being worked on by another process ({last})")
    entry = Entry((last.number if last is not None else 0) + 1, f"{0:0{_WIDTH}}", this_process())
    path = folder / f"{PREFIX}{entry.number}"
    try:
        with path.open("xb") as file:
            file.write(f"{entry.beat}\n{json.dumps(entry.owner)}\n".encode())
    except FileExistsError:
        raise Busy(f"{str(folder)!r} is being worked on by another process") from None
    if _newest(folder) != entry.number:  # others were taken, released and removed since we looked
        path.unlink(missing_ok=True)
        raise Busy(f"{str(folder)!r} is being worked on by another process")
    for name in os.listdir(folder):
        if name.startswith(PREFIX) and int(name[len(PREFIX) :]) < entry.number:
            (folder / name).unlink(missing_ok=True)
    return Lease(folder, guarding or folder, entry, beating=True)


def share(folder: Path) -> Lease:
    """The lease that another process of the same run has taken, for the writes of this one."""
    entry = read(folder)
    if entry is None:
        raise LeaseLost(f"{str(folder)!r} has no lease")
    return Lease(folder, folder, entry, beating=False)


class Observer:
    """Finds leases whose owner has stopped counting, by looking at them again and again, in its own time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[Path, tuple[Entry, float, float]] = {}  # entry, when last looked, seconds that it stood still

    def look(self, folder: Path) -> tuple[bool, int]:
        """(may the folder be taken, over which stale lease: 0 for none). To be called every few seconds."""
        try:
            entry = read(folder)
        except OSError:
            self._seen.pop(folder, None)  # what cannot be read is not known to stand still
            return False, 0
        if entry is None or entry.free:
            self._seen.pop(folder, None)
            return True, 0
        now = self._clock()
        before, looked, still = self._seen.get(folder, (None, now, 0.0))
        # Time in which this process was itself paused says nothing about the other one.
        still = still + min(now - looked, 2 * BEAT_SECONDS) if entry == before else 0.0
        self._seen[folder] = (entry, now, still)
        return (True, entry.number) if still >= STALE_SECONDS else (False, 0)

    def owner(self, folder: Path) -> str:
        """Who had the folder at the last look."""
        return str(self._seen[folder][0]) if folder in self._seen else "another process"

    def wait(self, folder: Path) -> int:
        """Watch a lease until it may be taken; which stale one to take over. Raises Busy as soon as its owner moves."""
        first = read(folder)
        while True:
            free, over = self.look(folder)
            if free:
                return over
            if first is not None and (here(first.owner) or read(folder) != first):
                raise Busy(f"{str(folder)!r} is being worked on by another process ({first})")
            time.sleep(min(BEAT_SECONDS, 1.0))


# -- which process an owner is -----------------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    pid = os.getpid()
    token = uuid.uuid4().hex
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "where": _where(), "token": token}


def here(owner: dict[str, Any]) -> bool:
    """Does the owner's process number mean a process of this host (and of this container)?"""
    return bool(owner) and owner.get("where") == _where()


def _where() -> str:
    """This boot of this host, and the process numbers of this container; the host's name where nothing says so."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the host did: a number is used again, both together are not. None where it
    is not known; "" of a process that has ended and is not yet collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in ("Z", "X") else fields[19]


def dead(owner: dict[str, Any]) -> bool:
    """Is it known that the owner's process has ended? Of another host nothing is known."""
    if not here(owner):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    now, then = _started(owner["pid"]), owner["started"]
    return now is not None and then is not None and now != then
