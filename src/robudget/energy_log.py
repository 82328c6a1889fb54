"""The energy and the passes of a run or an evaluation, kept on the disk while they are made: a kill loses seconds.

Windows that are closed go to the folder's log. The one that is open is noted every few seconds in a small file beside
it; whoever resumes the work finds the note and enters it into the log. Each process of a run keeps its own log.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

from robudget.files import replace, to_plain
from robudget.meter.counters import Poller
from robudget.meter.energy import Energy, Meter, Window
from robudget.store import Busy, WorkFolder

NOTE_SECONDS = float(os.environ.get("ROBUDGET_NOTE_SECONDS", "5"))  # a kill loses at most this much


@dataclass(frozen=True)
class Lost:
    """Image-passes that were made and lost, by phase as in `EpochRecord.calls` or by an attack's; `how`: "counted", or
    "estimated": in proportion to the seconds of killed attempts, an upper bound."""

    calls: Mapping[str, float]
    how: Literal["counted", "estimated"]


def _made_since(calls: Callable[[], Mapping[str, int]] | None) -> Callable[[], dict[str, Any]]:
    """What a window's entry says of the passes made from now on; nothing where nobody counts."""
    if calls is None:
        return dict
    before = Counter(calls())
    return lambda: {"calls": dict(Counter(calls()) - before)}


class EnergyLog:
    """Energy windows of one process (`rank`) in a folder. A context manager, for the thread that takes the notes."""

    def __init__(self, folder: WorkFolder, meter: Meter, *, rank: int = 0, note_seconds: float = NOTE_SECONDS) -> None:
        self.folder, self._meter, self._rank = folder, meter, rank
        self._file = folder.path / ("energy.json" if rank == 0 else f"energy-{rank}.json")
        self._open: tuple[Window, dict[str, Any]] | None = None
        self._calls = _made_since(None)  # inside the open window
        self._lock = threading.Lock()
        self._recover()
        self._poller = Poller(self._note, note_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._poller.close()

    @contextmanager
    def window(
        self, name: str, *, calls: Callable[[], Mapping[str, int]] | None = None, **about: Any
    ) -> Iterator[Window]:
        """Meter what happens inside, also if it raises, and log it. Windows may nest; `about` goes with the outer, and
        so do `calls`: the image-passes of this process up to now, of which those made inside are logged."""
        with self._meter.window(name) as window:
            outer = self._open is None
            if outer:
                about |= {"window": window.name, "opened": round(time.time(), 6)}
                self._open, self._calls = (window, about), _made_since(calls)
            try:
                yield window
            finally:
                if outer:
                    with self._lock:
                        self._open = None
                        self.folder.log("energy", rank=self._rank, **about, **self._calls(), **window.energy.to_dict())
                        self._file.unlink(missing_ok=True)
                else:
                    self.folder.log("energy", rank=self._rank, window=window.name, **window.energy.to_dict())
                    self._note()

    def total(self, name: str, **about: Any) -> Energy:
        """What a stage took: all its windows with these `about`, those of killed attempts included, one after the
        other; of all processes, at the same time."""
        ranks = []
        for windows in self._windows(name, about):
            if windows:
                ranks.append(functools.reduce(operator.add, map(Energy.from_dict, windows)))
        return functools.reduce(Energy.beside, ranks) if ranks else Energy(math.nan, (), ("no energy was logged",))

    def lost(self, name: str, kept: Mapping[str, int], **about: Any) -> Lost:
        """What attempts at a stage computed and a kill or a crash lost: all that its windows made, less what was
        `kept`. A killed attempt's last seconds (`NOTE_SECONDS` at most) are not in it."""
        windows = [window for rank in self._windows(name, about) for window in rank]
        if all("calls" in window for window in windows):
            made = sum((Counter(window["calls"]) for window in windows), Counter())
            return Lost({key: n for key in made if (n := made[key] - kept.get(key, 0)) > 0}, "counted")
        # Attempts of an earlier version, which logged no passes.
        killed, whole = (
            sum(window["seconds"] or 0.0 for window in windows if bool(window.get("interrupted")) is interrupted)
            for interrupted in (True, False)
        )
        share = killed / whole if whole else 0.0
        return Lost({key: share * n for key, n in kept.items()} if share else {}, "estimated")

    def _windows(self, name: str, about: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        """The logged windows of a stage, by process."""
        return [
            [
                event
                for event in self.folder.events("energy", rank=rank)
                if event["window"] == name and all(event.get(key) == value for key, value in about.items())
            ]
            for rank in self.folder.ranks()
        ]

    def _note(self) -> None:
        with self._lock:
            if self._open is None:
                return
            window, about = self._open
            try:
                note = json.dumps(to_plain(about | self._calls() | window.energy.to_dict()), allow_nan=False)
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
