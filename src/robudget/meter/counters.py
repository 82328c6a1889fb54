"""Totals that only grow, from hardware counters that wrap around, are reset or fail, and from samples of power.

Reading functions return None for a sample that could not be taken. A total is NaN while the hardware cannot be read, so
a window that begins or ends then has no figure, while one around it does. What can never be known (a reset, an outage
of a power meter) counts as `lost`: windows across it have no figure.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

Read = Callable[[], float | None]
Clock = Callable[[], float]


class Counter:
    """A cumulative counter in joules as a total since the object was made.

    `wraps_at`: where it starts again from 0, None if it does not. `max_watts`: more than the hardware can draw; it
    tells a wrap-around from a reset, and how long the counter may go unread (`patience_seconds`) before one
    wrap-around can no longer be told from two.
    """

    def __init__(self, name: str, read: Read, clock: Clock, *, wraps_at: float | None = None, max_watts: float) -> None:
        self.name = name
        self.notes: list[str] = []
        self.lost = 0
        self.patience_seconds = math.inf if wraps_at is None else wraps_at / max_watts
        self._read, self._clock = read, clock
        self._wraps_at, self._max_watts = wraps_at, max_watts
        self._sum = 0.0
        self._last: float | None = None
        self._last_time = clock()
        self._unreadable = False
        self.total()

    def total(self) -> float:
        """Joules so far; NaN while the counter can't be read."""
        value, now = self._read(), self._clock()
        if value is None:
            if not self._unreadable:
                self.notes.append(f"{self.name}: the counter could not be read")
            self._unreadable = True
            return math.nan
        self._unreadable = False
        if self._last is not None:
            self._sum += self._advance(value - self._last, value, now - self._last_time)
        self._last, self._last_time = value, now
        return self._sum

    def _advance(self, growth: float, value: float, seconds: float) -> float:
        if self._wraps_at is not None and seconds > self.patience_seconds:
            return self._lose(f"was not read for {seconds:.0f} s and may have wrapped more than once", 0.0)
        if growth >= 0:
            return growth
        if self._wraps_at is not None and growth + self._wraps_at <= self._max_watts * max(seconds, 1.0):
            return growth + self._wraps_at
        return self._lose(f"was reset; up to {seconds:.0f} s of energy are missing", value)

    def _lose(self, reason: str, remainder: float) -> float:
        self.lost += 1
        self.notes.append(f"{self.name}: the counter {reason}")
        return remainder


class Integral:
    """Joules since the object was made by the trapezoidal rule over power samples (W), taken by `sample`.

    Two samples more than `gap_seconds` apart are not joined: what was drawn between them is lost.
    """

    def __init__(self, name: str, read: Read, clock: Clock, *, gap_seconds: float = 5.0) -> None:
        self.name = name
        self.notes: list[str] = []
        self.lost = 0
        self.samples = 0
        self._read, self._clock, self._gap_seconds = read, clock, gap_seconds
        self._sum = 0.0
        self._last: tuple[float, float] | None = None
        self._unreadable = False
        self.sample()

    def sample(self) -> float:
        """Take a sample; joules so far, NaN while the power can't be read."""
        watts, now = self._read(), self._clock()
        if watts is None:
            if not self._unreadable:
                self.notes.append(f"{self.name}: the power could not be read")
            self._unreadable = True
            return math.nan
        self._unreadable = False
        self.samples += 1
        if self._last is not None:
            before, seconds = self._last[0], now - self._last[1]
            if not 0 <= seconds <= self._gap_seconds:
                self.lost += 1
                self.notes.append(f"{self.name}: no power samples for {seconds:.1f} s")
            else:
                self._sum += (before + watts) / 2 * seconds
        self._last = (watts, now)
        return self._sum


def without_mirrors(values: Sequence[float], *, tolerance: float = 1.0) -> list[int]:
    """Which of several counters (J) to keep: dies of one package may each show the package's own counter.

    Two that stand within a joule of each other after running since boot are the same one.
    """
    keep: list[int] = []
    for index, value in enumerate(values):
        if value <= 0 or all(abs(value - values[other]) > tolerance for other in keep):
            keep.append(index)
    return keep


class Poller:
    """A thread that calls `poll` every `seconds` until `close`; it ends with the process."""

    def __init__(self, poll: Callable[[], object], seconds: float) -> None:
        self._poll, self._seconds = poll, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="robudget-meter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._poll()
