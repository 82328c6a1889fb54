"""PGD (Madry et al. 2018): projected steps of fixed size in the steepest direction; restarts and a choice of loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robudget.attacks.alone import alone
from robudget.attacks.driver import Rows, State, fresh
from robudget.attacks.geometry import GEOMETRY
from robudget.attacks.objective import margin, objective
from robudget.attacks.rng import Noise, Stream
from robudget.attacks.victim import Model, Victim
from robudget.errors import unknown
from robudget.threat import Threat

Start = Literal["uniform", "surface", "none"]
STARTS: tuple[Start, ...] = ("uniform", "surface", "none")


@dataclass
class Pgd:
    """The state machine; a row spends steps + 1 evaluations and counts as fooled at any misclassified iterate.

    `start`: uniform in the ball (in L2 and L1: a Gaussian direction at a uniform radius), on its surface as APGD, or
    the image itself; restarts after the first always draw.
    """

    victim: Victim
    threat: Threat
    steps: int
    step_size: float
    name: str = "pgd"
    loss: str = "ce"
    start: Start = "uniform"
    eot: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        self._objective = objective(self.loss)
        self._geometry = GEOMETRY[self.threat.norm]

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> State:
        base = fresh(rows, x, y, stream.index)
        x0, eps, shape = base["x0"], self.threat.eps, tuple(x.shape[1:])
        if self._geometry.noise == "uniform" and self.start == "uniform":
            start = self._geometry.project(x0 + eps * stream.uniform(0, shape), x0, eps)
        else:
            noise = stream.uniform(0, shape) if self._geometry.noise == "uniform" else stream.gaussian(0, shape)
            radius = torch.full_like(base["worst"], eps)
            if self.start == "uniform":
                radius = radius * (0.5 + 0.5 * stream.uniform(1, (1,)).squeeze(1))
            start = self._geometry.surface(x0, noise, radius)
        if self.start == "none":
            again = (rows.restart > 0).view(-1, 1, 1, 1)
            start = torch.where(again, start, x0)
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


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    restarts: int = 1,
    loss: str = "ce",
    start: Start = "uniform",
    eot: int = 1,
    noise: Noise | None = None,
    batch_size: int = 500,
) -> Tensor:
    """PGD-k alone: x_adv as `robudget.attacks.alone` describes. `loss`: ce, cw (margin) or dlr."""
    if start not in STARTS:
        raise unknown("start", start, STARTS)

    def machine(victim: Victim) -> Pgd:
        return Pgd(victim, threat, steps, step_size, loss=loss, start=start, eot=eot)

    noise = noise or Noise()
    return alone(machine, model, x, y, threat, restarts=restarts, noise=noise, batch_size=batch_size)
