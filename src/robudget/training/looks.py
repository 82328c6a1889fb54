"""When a training looks at its loss, its clock and requests to stop: seldom, since each look waits for the device."""

from __future__ import annotations

import time

import torch

from robudget import stop
from robudget.training.distributed import World

LOOK_STEPS = 50  # at most, between two looks at the loss and the clock
LOOK_SECONDS = 5.0  # about, between two looks where steps are long


class Looks:
    """The steps after which a training looks up, the same ones in all processes of `world`."""

    def __init__(self, world: World, device: torch.device) -> None:
        self._world, self._device = world, device
        self._at, self._step, self._next = time.monotonic(), -1, LOOK_STEPS

    def begin(self, step: int) -> None:
        """An epoch begins at `step`."""
        self._at, self._step = time.monotonic(), step
        self._next = min(self._next, step + LOOK_STEPS)

    def due(self, step: int) -> bool:
        """Alone, a request to stop is seen after every step; many processes agree on it at their looks."""
        return step >= self._next or (self._world.size == 1 and stop.requested())

    def agree(self, step: int, *, late: bool) -> tuple[bool, bool]:
        """What all do after `step`: save, where one of them is `late` with that, and stop, where one was asked to."""
        now = time.monotonic()
        per_step = (now - self._at) / max(step - self._step, 1)
        steps = min(max(int(LOOK_SECONDS / max(per_step, 1e-9)), 1), LOOK_STEPS)
        save, asked, ahead = self._world.largest((late, stop.requested(), steps), self._device)
        self._at, self._step, self._next = now, step, step + int(ahead)
        return bool(save), bool(asked)
