"""Energy of the memory, by a model: nothing measures it on most machines."""

from __future__ import annotations

import time
from functools import lru_cache

from robudget.meter.counters import Clock
from robudget.meter.cpu import ProcessShare
from robudget.meter.energy import How, Reading


@lru_cache(maxsize=1)
def machine_watts() -> float:
    """What the machine's memory draws by CodeCarbon's model: 5 W a module (1.5 W on Arm), modules by total size."""
    from codecarbon.external.ram import RAM

    return float(RAM(tracking_mode="machine").total_power().W)


class ModelSource:
    """Watts of the machine's memory × seconds × this process's share of the busy CPU time."""

    name = "memory"
    how: How = "estimated"
    uncertainty = 0.5

    def __init__(self, watts: float, share: ProcessShare, clock: Clock = time.monotonic) -> None:
        self.method = f"{watts:.3g} W of memory (CodeCarbon's model) × share of the machine's busy CPU time"
        self._watts, self._share, self._clock = watts, share, clock
        self._start = clock()

    def read(self) -> Reading:
        return Reading(self._share.of(self._watts * (self._clock() - self._start)))

    def close(self) -> None:
        pass
