"""What an epoch adds up on the device, step by step: its losses, and how many images were classified correctly."""

from __future__ import annotations

import torch

from robudget.training.checkpoint import State
from robudget.training.distributed import World
from robudget.training.step import Outcome

_COUNTS = ("clean", "craft")


class EpochSums:
    """This process's part of an epoch of `steps` steps; nothing waits for the device before a total is asked for."""

    def __init__(self, steps: int, world: World, device: torch.device) -> None:
        self._steps, self._world, self._device = steps, world, device
        self.clear()

    def clear(self) -> None:
        self._losses = torch.zeros(self._steps, device=self._device)
        self._correct = {name: torch.zeros((), dtype=torch.int64, device=self._device) for name in _COUNTS}

    def add(self, step: int, outcome: Outcome) -> None:
        """`step` of the epoch, from 0."""
        self._losses[step] = outcome.loss
        if outcome.clean is not None:
            self._correct["clean"] += outcome.clean
        if outcome.crafted is not None:
            self._correct["craft"] += outcome.crafted

    def losses(self) -> list[float]:
        """By step, averaged over the processes; 0 for steps still to come."""
        return [loss / self._world.size for loss in self._world.total(self._losses.clone()).tolist()]

    def correct(self) -> tuple[int, int]:
        """Clean images, and crafted ones, over all processes."""
        clean, crafted = (int(self._world.total(self._correct[name].clone())) for name in _COUNTS)
        return clean, crafted

    def state(self) -> State:
        """Of all processes together."""
        return {
            "losses": self._world.total(self._losses.clone()) / self._world.size,
            "correct": {name: self._world.total(count.clone()) for name, count in self._correct.items()},
        }

    def restore(self, state: State) -> None:
        """Go on from such a `state`, whose counts the first process takes, since totals are sums."""
        share = 1.0 if self._world.leads else 0.0
        self._losses = state["losses"].to(self._device) * self._world.size * share
        self._correct = {name: (count * share).long().to(self._device) for name, count in state["correct"].items()}
