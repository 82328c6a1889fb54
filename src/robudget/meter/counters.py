"""From what hardware gives (counters that wrap, are reset or fail; power now and then) to totals that only grow.

Reading functions return None for a sample that could not be taken. A total is NaN while the hardware is silent, so a
window that begins or ends then has no figure, while one around it does. What can never be known (a reset, an outage of
a power meter) counts as `lost`: windows across it have no figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Read = Callable[[], float | None]
Clock = Callable[[], float]


class Counter:
    """A cumulative counter in joules as a total since the object was made.

    `wraps_at`: where it starts again from 0, None if it does not. `max_watts`: more than the hardware can draw; it
    tells a wrap-around from a reset, and how long the counter may go unread (`patience`, seconds) before one wrap can
    no longer be told from two.
    """

    def __init__(self, name: str, read: Read, clock: Clock, *, wraps_at: float | None = None, max_watts: float) -> None:
        self.name = name
        self.notes: list[str] = []
        self.lost = 0
        self.patience = math.inf if wraps_at is None else wraps_at / max_watts
        self._read, self._clock = read, clock
        self._wraps_at, self._max_watts = wraps_at, max_watts
        self._sum = 0.0
        self._last: float | None = None
        self._last_time = clock()
        self._silent = False
        self.total()

    def total(self) -> float:
        """Joules so far; NaN while the counter can't be read."""
        value, now = self._read(), self._clock()
        if value is None:
            if not self._silent:
                self.notes.append(f"{self.name}: the counter could not be read")
            self._silent = True
            return math.nan
        self._silent = False
        if self._last is not None:
            self._sum += self._advance(value - self._last, value, now - self._last_time)
        self._last, self._last_time = value, now
        return self._sum

    def _advance(self, grown: float, value: float, seconds: float) -> float:
        if self._wraps_at is not None and seconds > self.patience:
            return self._lose(f"was not read for {seconds:.0f} s and may have wrapped more than once", 0.0)
        if grown >= 0:
            return grown
        if self._wraps_at is not None and grown + self._wraps_at <= self._max_watts * max(seconds, 1.0):
            return grown + self._wraps_at
        return self._lose(f"was reset; up to {seconds:.0f} s of energy are missing", value)

    def _lose(self, what: str, known: float) -> float:
        self.lost += 1
        self.notes.append(f"{self.name}: the counter {what}")
        return known


class Integral:
    """Joules since the object was made by the trapezoidal rule over power samples (W), taken by `sample`.

    Two samples more than `gap` seconds apart are not bridged: what was drawn between them is lost.
    """

    def __init__(self, name: str, read: Read, clock: Clock, *, gap: float = 5.0) -> None:
        self.name = name
        self.notes: list[str] = []
        self.lost = 0
        self.samples = 0
        self._read, self._clock, self._gap = read, clock, gap
        self._sum = 0.0
        self._last: tuple[float, float] | None = None
        self._silent = False
        self.sample()

    def sample(self) -> float:
        """Take a sample; joules so far, NaN while the power can't be read."""
        watts, now = self._read(), self._clock()
        if watts is None:
            if not self._silent:
                self.notes.append(f"{self.name}: the power could not be read")
            self._silent = True
            return math.nan
        self._silent = False
        self.samples += 1
        if self._last is not None:
            before, seconds = self._last[0], now - self._last[1]
            if not 0 <= seconds <= self._gap:
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
    kept: list[int] = []
    for index, value in enumerate(values):
        if value <= 0 or all(abs(value - values[other]) > tolerance for other in kept):
            kept.append(index)
    return kept
