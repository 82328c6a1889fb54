"""FMN: gradient steps inside a ball that shrinks while the point is adversarial, and grows else (Pintor et al. 2021).

A minimum-norm attack, as FAB is: it counts where the nearest point found lies within the threat's ε (arXiv 2102.12827,
algorithm 1). A step is one gradient. The step size falls from 1 to 0.01 (in L2, whatever the norm) and the change of
the radius from 5% to 0.1%, both as a cosine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robudget.attacks.driver import Rows, State, initial
from robudget.attacks.geometry import GEOMETRY, per_row
from robudget.attacks.noise import Stream
from robudget.attacks.victim import Victim, cw, margin
from robudget.threat import Threat

STEP_SIZE, LAST_STEP_SIZE = 1.0, 0.01
CHANGE, LAST_CHANGE = 0.05, 0.001  # of the radius, as a fraction


@dataclass
class FmnState(State):
    radius: Tensor  # of the ball that the next point is to lie in
    nearest: Tensor  # distance of `adv`, ∞ while there is none
    confirmed: Tensor  # what `nearest` was before the claim that has not been verified yet
    found: Tensor  # has any point of the row been adversarial?

    def refute(self, rows: Tensor) -> None:
        # Points farther than the one that did not hold are wanted again.
        super().refute(rows)
        self.nearest[rows] = self.confirmed[rows]


@dataclass
class Fmn:
    """The state machine. Every point nearer than the last one is claimed, so that each of them is verified."""

    victim: Victim
    threat: Threat
    steps: int = 100
    name: str = "fmn"
    stride: int = 1

    def __post_init__(self) -> None:
        self._geometry = GEOMETRY[self.threat.norm]

    @property
    def calls(self) -> int:
        return self.steps

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> FmnState:
        base = initial(rows, x, y, stream.index)
        x0, number = base["x0"], base["worst"]
        again = rows.restart > 0
        if bool(again.any()):
            # Later restarts (ours) begin a step away, in a random direction.
            start = GEOMETRY["l2"].surface(x0, stream.gaussian(0, tuple(x.shape[1:])), STEP_SIZE)
            base["x"] = torch.where(per_row(again, x0), start, x0)
        return FmnState(
            **base,
            radius=number.clone(),
            nearest=number.clone(),
            confirmed=number.clone(),
            found=torch.zeros_like(base["done"]),
        )

    def step(self, s: FmnState) -> None:
        """Look at the point, set the radius by what is there, and move on."""
        size = self._geometry.distance(s.x, s.x0)
        logits, lead, grad = self.victim.gradient(s.x, cw, s.y, s.target)
        wrong = logits.argmax(1) != s.y
        inside = size <= self.threat.eps
        hit = wrong & inside & (size < s.nearest) & ~s.done
        s.confirmed = torch.where(hit & ~s.fooled, s.nearest, s.confirmed)
        s.nearest = torch.where(hit, size, s.nearest)
        torch.where(per_row(hit, s.x), s.x, s.adv, out=s.adv)
        s.worst = torch.where(inside, torch.minimum(s.worst, margin(logits, s.y)), s.worst)

        left = (1 + torch.cos(math.pi * s.it / max(self.steps, 1))) / 2
        change = LAST_CHANGE + (CHANGE - LAST_CHANGE) * left
        step_size = LAST_STEP_SIZE + (STEP_SIZE - LAST_STEP_SIZE) * left
        s.it += 1
        s.when = torch.where(hit & ~s.fooled, s.it, s.when)
        s.fooled |= hit
        s.found |= wrong
        # Until a point is adversarial, the radius is where a linear model would have its boundary, and a little more
        # (ours): on a model that is linear there, rounding would else leave every point just before it.
        boundary = (size + lead.abs() / self._geometry.dual(grad).clamp(min=1e-12)) * (1 + LAST_CHANGE)
        smaller = torch.minimum(s.radius * (1 - change), torch.minimum(s.nearest, size))
        larger = torch.where(s.found, s.radius * (1 + change), boundary)
        farthest = self._geometry.size(torch.maximum(s.x0, 1 - s.x0))
        s.radius = torch.where(wrong, smaller, larger).minimum(farthest)
        s.done |= s.it >= self.steps
        s.x = self._geometry.project(s.x + per_row(step_size, s.x) * GEOMETRY["l2"].steepest(grad), s.x0, s.radius)
