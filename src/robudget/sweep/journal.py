"""What the drivers of a store say of themselves, for `robudget status`: a small file each, in <store>/.sweeps.

Nothing is decided by these files: what is done is what has its run.json. The file `stop` holds the last request of
`robudget stop`. Imports no torch.
"""

from __future__ import annotations

import json
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robudget import files, lease, stop
from robudget.store import Store, writing

WRITE_SECONDS = 2.0  # between two versions of a driver's file
_FOLDER = ".sweeps"


class Journal:
    """The file of this driver. Those of earlier drivers of the same study that have ended are removed."""

    def __init__(self, store: Store, title: str, on: str) -> None:
        self._owner = lease.this_process()
        self._path = store.root / _FOLDER / f"{self._owner['host']}-{self._owner['pid']}-{uuid.uuid4().hex[:6]}.json"
        self._about = {"title": title, "on": on, "owner": self._owner}
        self._written, self._version = -float("inf"), 0
        with writing(store.root):
            self._path.parent.mkdir(exist_ok=True)
        for other in read(store.root):
            if other.title == title and other.over:
                other.path.unlink(missing_ok=True)

    @property
    def due(self) -> bool:
        return time.monotonic() - self._written > WRITE_SECONDS

    def write(self, now: dict[str, Any], *, last: bool = False) -> None:
        """Say how it stands; `last`: and that the driver ends."""
        self._written, self._version = time.monotonic(), self._version + 1
        data = json.dumps(files.to_plain(self._about | {"version": self._version, "over": last} | now))
        with suppress(OSError):  # a store that is away or full stops no driver
            files.replace(self._path, lambda temporary: temporary.write_text(data, "utf-8"), durable=False)


@dataclass(frozen=True)
class Driver:
    """What a driver last said. `over`: it has ended, as it said itself or as its dead process shows."""

    path: Path
    title: str
    on: str
    owner: dict[str, Any]
    over: bool
    silent_seconds: float
    data: dict[str, Any]


def read(root: Path) -> list[Driver]:
    """Every driver's file, the latest last."""
    drivers = []
    now = clock_of(root)
    for path in sorted((root / _FOLDER).glob("*.json"), key=lambda path: path.name):
        try:
            data, changed = json.loads(path.read_text("utf-8")), path.stat().st_mtime
            over = data["over"] or lease.dead(data["owner"])
            drivers.append((changed, Driver(path, data["title"], data["on"], data["owner"], over, now - changed, data)))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being replaced, or of another version
    return [driver for _, driver in sorted(drivers, key=lambda pair: pair[0])]


def clock_of(root: Path) -> float:
    """The time of the file system, by which its files' times are comparable; this machine's where nothing can be
    written."""
    probe = root / _FOLDER / f".clock-{uuid.uuid4().hex[:6]}"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def request_stop(store: Store) -> None:
    """Ask every driver and run of the store to save and stop; each looks every few seconds."""
    folder = store.root / _FOLDER
    with writing(files.local(store.root)):
        folder.mkdir(exist_ok=True)
        files.replace(folder / stop.FILE, lambda temporary: temporary.write_text(uuid.uuid4().hex, "utf-8"))
