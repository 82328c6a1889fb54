"""This process's share of what the whole machine used, by CPU time.

Counters of a package and models of memory speak of the machine. Splitting them by CPU time makes the bills of runs
side by side add up to one machine's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import psutil

# Below this the kernel's ticks of 10 ms are too coarse to divide by.
_SETTLE_SECONDS = 0.5


def process_seconds() -> float:
    """CPU time of this process: all threads, and children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def machine_seconds() -> float:
    """CPU time that the machine was busy with anything, since boot."""
    t = psutil.cpu_times()
    parts = (getattr(t, name, 0.0) for name in ("nice", "irq", "softirq", "interrupt", "dpc"))
    return float(t.user + t.system + sum(parts))


class ProcessShare:
    """Splits a machine-wide quantity that only grows: feed it the machine's total, get this process's total."""

    def __init__(
        self,
        *,
        process: Callable[[], float] = process_seconds,
        machine: Callable[[], float] = machine_seconds,
    ) -> None:
        self._process, self._machine = process, machine
        self._settled = 0.0
        self._from = (0.0, process(), machine())

    def of(self, total: float) -> float:
        """This process's part of everything since the beginning, given the machine's `total` now (NaN: unknown)."""
        if math.isnan(total):
            return math.nan
        now = (total, self._process(), self._machine())
        grown, mine, busy = (b - a for a, b in zip(self._from, now, strict=True))
        share = mine / max(busy, mine) if mine > 0 else 0.0
        part = self._settled + grown * share
        if busy >= _SETTLE_SECONDS:
            self._settled, self._from = part, now
        return part
