"""PGD (Madry et al. 2018): projected steps of fixed size in the steepest direction; restarts and a choice of loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robudget.attacks.driver import Rows, State, initial
from robudget.attacks.geometry import GEOMETRY
from robudget.attacks.noise import Stream
from robudget.attacks.victim import Victim, margin, objective
from robudget.threat import Threat


@dataclass
class Pgd:
    """The state machine; a row spends steps + 1 evaluations and counts as fooled at any misclassified iterate.

    It starts at a uniform point of the L∞ ball; in L2 and L1 in a Gaussian direction, at a uniform radius.
    """

    victim: Victim
    threat: Threat
    steps: int
    step_size: float
    name: str = "pgd"
    loss: str = "ce"
    eot: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        self._objective = objective(self.loss)
        self._geometry = GEOMETRY[self.threat.norm]

    @property
    def calls(self) -> int:
        return self.steps + 1

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> State:
        base = initial(rows, x, y, stream.index)
        x0, eps, shape = base["x0"], self.threat.eps, tuple(x.shape[1:])
        if self._geometry.noise == "uniform":
            start = self._geometry.project(x0 + eps * stream.uniform(0, shape), x0, eps)
        else:
            radius = torch.full_like(base["worst"], eps) * (0.5 + 0.5 * stream.uniform(1, (1,)).squeeze(1))
            start = self._geometry.surface(x0, stream.gaussian(0, shape), radius)
        base["x"] = start
        return State(**base)

    def step(self, s: State) -> None:
        logits, _, grad = self.victim.gradient(s.x, self._objective, s.y, s.target)
        for _ in range(self.eot - 1):
            logits, _, more = self.victim.gradient(s.x, self._objective, s.y, s.target)
            grad = grad + more
        s.claim(logits.argmax(1) != s.y, s.x, margin(logits, s.y))
        s.it += 1
        s.done |= s.it > self.steps
        s.x = self._geometry.project(s.x + self.step_size * self._geometry.steepest(grad), s.x0, self.threat.eps)
