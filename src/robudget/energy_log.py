"""The energy of a run or an evaluation, kept on the disk while it is used, so that a kill loses seconds of it.

Windows that are closed go to the folder's log. The one that is open is noted every few seconds in a small file beside
it; whoever resumes the work finds the note and enters it into the log. Each process of a run keeps its own log.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from robudget.files import replace, to_plain
from robudget.meter.counters import Poller
from robudget.meter.energy import Energy, Meter, Window
from robudget.store import Busy, WorkFolder

NOTE_SECONDS = 5.0  # a kill loses at most this much


class EnergyLog:
    """Energy windows of one process (`rank`) in a folder. A context manager, for the thread that takes the notes."""

    def __init__(self, folder: WorkFolder, meter: Meter, *, rank: int = 0, note_seconds: float = NOTE_SECONDS) -> None:
        self.folder, self._meter, self._rank = folder, meter, rank
        self._file = folder.path / ("energy.json" if rank == 0 else f"energy-{rank}.json")
        self._open: tuple[Window, dict[str, Any]] | None = None
        self._lock = threading.Lock()
        self._recover()
        self._poller = Poller(self._note, note_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._poller.close()

    @contextmanager
    def window(self, name: str, **about: Any) -> Iterator[Window]:
        """Meter what happens inside, also if it raises, and log it. Windows may nest; `about` goes with the outer."""
        with self._meter.window(name) as window:
            outer = self._open is None
            if outer:
                about |= {"window": window.name, "opened": round(time.time(), 6)}
                self._open = (window, about)
            try:
                yield window
            finally:
                if outer:
                    with self._lock:
                        self._open = None
                        self.folder.log("energy", rank=self._rank, **about, **window.energy.to_dict())
                        self._file.unlink(missing_ok=True)
                else:
                    self.folder.log("energy", rank=self._rank, window=window.name, **window.energy.to_dict())
                    self._note()

    def total(self, name: str, **about: Any) -> Energy:
        """What a stage took: all its windows with these `about`, those of killed attempts included, one after the
        other; of all processes, at the same time."""
        ranks = []
        for rank in self.folder.ranks():
            windows = [
                Energy.from_dict(event)
                for event in self.folder.events("energy", rank=rank)
                if event["window"] == name and all(event.get(key) == value for key, value in about.items())
            ]
            if windows:
                ranks.append(functools.reduce(operator.add, windows))
        return functools.reduce(Energy.beside, ranks) if ranks else Energy(math.nan, (), ("no energy was logged",))

    def _note(self) -> None:
        with self._lock:
            if self._open is None:
                return
            window, about = self._open
            try:
                note = json.dumps(to_plain(about | window.energy.to_dict()), allow_nan=False)
                replace(self._file, lambda temporary: temporary.write_text(note, "utf-8"), durable=False)
            except (OSError, Busy):
                return  # the work itself will say so, when it cannot write

    def _recover(self) -> None:
        """Enter the note of an attempt that was killed, unless its window was closed and logged after all."""
        try:
            note = json.loads(self._file.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return
        logged = {event.get("opened") for event in self.folder.events("energy", rank=self._rank)}
        if note["opened"] not in logged:
            self.folder.log("energy", rank=self._rank, interrupted=True, **note)
        self._file.unlink(missing_ok=True)
