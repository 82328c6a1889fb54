"""What a run has spent, kept on the disk while it is spent, so that a kill loses seconds of it and not the whole.

Closed windows go to the run's log. The one that is open is noted every few seconds in a small file beside it; whoever
resumes the run finds the file and enters it into the log. Each process of a run keeps its own log.
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
from robudget.store import RunFolder

NOTE_SECONDS = 5.0  # what a kill may lose


class Ledger:
    """Energy windows of one process (`rank`) of a run. A context manager, for the thread that keeps the notes."""

    def __init__(self, folder: RunFolder, meter: Meter, *, rank: int = 0, note_seconds: float = NOTE_SECONDS) -> None:
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
        with self._meter.window(name) as opened:
            outer = self._open is None
            if outer:
                about |= {"window": opened.name, "opened": round(time.time(), 6)}
                self._open = (opened, about)
            try:
                yield opened
            finally:
                if outer:
                    with self._lock:
                        self._open = None
                        self.folder.log("energy", rank=self._rank, **about, **opened.energy.to_dict())
                        self._file.unlink(missing_ok=True)
                else:
                    self.folder.log("energy", rank=self._rank, window=opened.name, **opened.energy.to_dict())
                    self._note()

    def total(self, stage: str, **about: Any) -> Energy:
        """What a stage took: all its windows with these `about`, those of killed attempts included, one after the
        other; of all processes, side by side."""
        whole = []
        for rank in self.folder.ranks():
            mine = [
                Energy.from_dict(event)
                for event in self.folder.events("energy", rank=rank)
                if event["window"] == stage and all(event.get(key) == value for key, value in about.items())
            ]
            if mine:
                whole.append(functools.reduce(operator.add, mine))
        return functools.reduce(Energy.beside, whole) if whole else Energy(math.nan, (), ("no energy was logged",))

    def _note(self) -> None:
        with self._lock:
            if self._open is None:
                return
            opened, about = self._open
            try:
                noted = json.dumps(to_plain(about | opened.energy.to_dict()), allow_nan=False)
                replace(self._file, lambda temporary: temporary.write_text(noted, "utf-8"), durable=False)
            except OSError:
                return  # a full disk is told by what the training itself can't write

    def _recover(self) -> None:
        """Enter what an attempt that was killed had noted, unless its window was closed and logged after all."""
        try:
            noted = json.loads(self._file.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return
        logged = {event.get("opened") for event in self.folder.events("energy", rank=self._rank)}
        if noted["opened"] not in logged:
            self.folder.log("energy", rank=self._rank, interrupted=True, **noted)
        self._file.unlink(missing_ok=True)
