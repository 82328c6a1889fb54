"""How the sweeps of a store stand, read from the store alone: from any shell, any node, while drivers live or not.

Imports neither torch nor pandas.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robudget import lease
from robudget.errors import InputError
from robudget.store import RunFolder, Store
from robudget.sweep.journal import Driver, clock_of
from robudget.sweep.journal import read as read_journals

STATES = ("running", "stale", "failed", "stopped", "paused", "ended early", "done")
_TAIL_BYTES = 8192  # of a log: enough for its last events


@dataclass(frozen=True)
class RunStatus:
    """`state`: running; stale (its owner is dead, or silent for `lease.STALE_SECONDS`); failed, as a driver says;
    stopped (begun, and nobody works on it); paused (it waits for others to be as far); ended early, by a sweep; done.
    `last`: what its log says last, `seconds_ago` when."""

    run: str
    state: str
    owner: str
    last: str
    seconds_ago: float | None


@dataclass(frozen=True)
class StoreStatus:
    """Every run that has a folder, and what the drivers last said. `waiting` runs of theirs have no folder yet."""

    store: str
    runs: tuple[RunStatus, ...]
    drivers: tuple[Driver, ...]

    def count(self, state: str) -> int:
        return sum(run.state == state for run in self.runs)

    @property
    def live(self) -> list[Driver]:
        return [driver for driver in self.drivers if not driver.over and driver.silent_seconds < lease.STALE_SECONDS]

    @property
    def waiting(self) -> int:
        """The most that one driver has left, less what is begun: several may drive the same runs."""
        left = max((driver.data.get("left", 0) for driver in self.live), default=0)
        return max(0, left - sum(self.count(state) for state in ("running", "stopped", "stale", "paused")))

    def to_dict(self) -> dict[str, Any]:
        return {
            "store": self.store,
            **{state.replace(" ", "_"): self.count(state) for state in STATES},
            "waiting": self.waiting,
            "runs": [asdict(run) for run in self.runs],
            "drivers": [
                {"live": driver in self.live, "silent_seconds": driver.silent_seconds, **driver.data}
                for driver in self.drivers
            ],
        }


def status(root: Path | str) -> StoreStatus:
    """Raises InputError where there is no such store."""
    store = Store(root)
    if not store.root.is_dir():
        raise InputError(f"no such store: {str(root)!r} is not a folder")
    drivers = read_journals(store.root)
    failed = {run: why for driver in drivers for run, why in driver.data.get("failed", {}).items()}
    now = clock_of(store.root)
    runs = [_of_run(folder, failed, now) for folder in store.folders()]
    runs.sort(key=lambda run: (STATES.index(run.state), run.run))
    return StoreStatus(str(root), tuple(runs), tuple(drivers))


def _of_run(folder: RunFolder, failed: dict[str, str], now: float) -> RunStatus:
    name = folder.path.name
    if folder.done:
        return RunStatus(name, "done", "", "", None)
    last, ago = _last_of(folder, now)
    try:
        entry = lease.read(folder.path)
        beaten = (folder.path / f"{lease.PREFIX}{entry.number}").stat().st_mtime if entry is not None else now
    except OSError:  # another process follows just now
        entry, beaten = None, now
    if entry is None or entry.released:
        if name in failed:
            return RunStatus(name, "failed", "", failed[name].splitlines()[0], ago)
        if (partial := folder.partial()) is not None:
            return RunStatus(name, partial["status"], "", partial["why"] if folder.ended_early else last, ago)
        return RunStatus(name, "stopped", "", last, ago)
    silent = entry.free or now - beaten > lease.STALE_SECONDS
    return RunStatus(name, "stale" if silent else "running", str(entry), last, ago)


def _last_of(folder: RunFolder, now: float) -> tuple[str, float | None]:
    """The last event of a run's log in words, and how long ago it was written."""
    try:
        with (folder.path / "log.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
            changed = os.fstat(file.fileno()).st_mtime
    except OSError:
        return "", None
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if words := _words(event):
            return words, max(0.0, now - changed)
    return "", max(0.0, now - changed)


def _words(event: dict[str, Any]) -> str:
    if event.get("event") == "epoch":
        robust = event.get("val_robust")
        return f"epoch {event['epoch']}" + ("" if robust is None else f", validation {100 * robust:.1f}% robust")
    if event.get("event") == "attack":
        return f"attack {str(event['attack']).rpartition(' ')[2]}"
    return str(event.get("text", "")) or ("started" if event.get("event") == "start" else "")


def until_over(root: Path, seconds: float) -> StoreStatus:
    """Wait until no driver of the store lives and no run is in work, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    while True:
        now = status(root)
        if (not now.live and not now.count("running")) or time.monotonic() > deadline:
            return now
        time.sleep(0.5)
