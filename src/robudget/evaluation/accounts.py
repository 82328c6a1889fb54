"""What a stage of an evaluation takes: seconds, passes and energy, earlier attempts included."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from robudget.attacks.ensemble import Passes
from robudget.evaluation.verdicts import Spent


class Energy(Protocol):
    """What a meter says of a stretch of work: kWh (NaN: unknown), and `how` it was obtained."""

    @property
    def kwh(self) -> float: ...
    @property
    def how(self) -> str: ...


@runtime_checkable
class Metered(Protocol):
    """An open window of a meter: what it took so far."""

    @property
    def energy(self) -> Energy: ...


Window = Callable[[str], AbstractContextManager[Any]]
"""A context for a stretch of work by its name. What it gives is asked for its energy if it has one (`Metered`)."""


class Book:
    """What a stage took in earlier attempts, and in this one so far."""

    def __init__(self, spent: Spent) -> None:
        self.spent, self.before = spent, replace(spent)
        # Energy that an earlier attempt did not meter stays unknown.
        self.unmetered = spent.seconds > 0 and spent.energy_how is None
        self.began = time.perf_counter()
        self.meter: Metered | None = None

    def close(self) -> None:
        """Bring the stage's account up to now; may be called again later."""
        self.spent.seconds = self.before.seconds + time.perf_counter() - self.began
        self.spent.energy_kwh, self.spent.energy_how = self.before.energy_kwh, self.before.energy_how
        if self.meter is not None and not self.unmetered:
            self.spent.add_energy(self.meter.energy.kwh, self.meter.energy.how)
        elif self.before.energy_how is not None:
            self.spent.add_energy(math.nan, "unknown")


def charge(spent: Spent, then: Passes, now: Passes) -> None:
    """Book the passes made between two counts."""
    spent.forward += now.forward - then.forward
    spent.backward += now.backward - then.backward
