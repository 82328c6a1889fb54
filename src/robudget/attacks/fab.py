"""FAB and FAB-T: steps along the decision boundary to the nearest adversarial point (Croce & Hein 2020b).

A minimum-norm attack: it counts where the nearest point found lies within the threat's ε. Inside an ensemble a row may
stop at its first point within ε (`first=True`); alone it runs all its steps and keeps the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robudget.attacks.driver import Rows, State, initial
from robudget.attacks.geometry import GEOMETRY, per_row
from robudget.attacks.noise import Stream
from robudget.attacks.victim import Victim, difference, margin
from robudget.threat import Norm, Threat


@dataclass
class FabState(State):
    nearest: Tensor  # distance of `adv`, ∞ while there is none

    def refute(self, rows: Tensor) -> None:
        # Points farther than the one that did not hold are wanted again.
        super().refute(rows)
        self.nearest[rows] = torch.inf


@dataclass
class Fab:
    """The state machine. With `targeted` a row moves to its own target class, else to the class that seems nearest.

    A step is a gradient, a move and a look at the class there: two forward passes and a backward one. (Where the class
    is still the label, the next step could reuse that forward pass; but 97 of 100 moves cross the boundary.)
    """

    victim: Victim
    threat: Threat
    name: str = "fab-t"
    targeted: bool = True
    steps: int = 100
    alpha_max: float = 0.1
    overshoot: float = 1.05
    back: float = 0.9
    first: bool = True
    stride: int = 1

    def __post_init__(self) -> None:
        self._geometry = GEOMETRY[self.threat.norm]

    @property
    def calls(self) -> int:
        return self.steps

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> FabState:
        base = initial(rows, x, y, stream.index)
        x0, shape = base["x0"], tuple(x.shape[1:])
        again = rows.restart > 0
        if bool(again.any()):
            # Later restarts begin half-way out, in a random direction.
            noise = stream.uniform(0, shape) if self._geometry.noise == "uniform" else stream.gaussian(0, shape)
            noise = noise / per_row(self._geometry.size(noise), noise)
            start = (x0 + 0.5 * self.threat.eps * noise).clamp_(0, 1)
            base["x"] = torch.where(per_row(again, x0), start, x0)
        return FabState(**base, nearest=torch.full_like(base["worst"], torch.inf))

    def step(self, s: FabState) -> None:
        gap, w = self._linearise(s.x, s.y, s.target)
        x = self._move(s.x, s.x0, gap, w)
        s.it += 1
        logits = self.victim.logits(x)
        wrong = (logits.argmax(1) != s.y) & ~s.done
        distance = self._geometry.distance(x, s.x0)
        nearer = wrong & (distance < s.nearest)
        s.nearest = torch.where(nearer, distance, s.nearest)
        torch.where(per_row(nearer, x), x, s.adv, out=s.adv)
        inside = distance <= self.threat.eps
        s.worst = torch.where(inside, torch.minimum(s.worst, margin(logits, s.y)), s.worst)
        hit = nearer & inside if self.first else nearer
        s.when = torch.where(hit & ~s.fooled, s.it, s.when)
        s.done |= s.it >= self.steps
        s.fooled = s.fooled | hit if self.first else s.done & (s.nearest <= self.threat.eps)
        s.x = torch.where(per_row(wrong, x), s.x0 + (x - s.x0) * self.back, x)

    def _linearise(self, x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(z_t − z_y, its gradient) towards each row's target, or the class whose boundary seems nearest."""
        if self.targeted:
            return self.victim.gradient(x, difference, y, target)[1:]
        logits, grads = self.victim.jacobian(x)
        n = torch.arange(len(x), device=x.device)
        gap = logits - logits[n, y].unsqueeze(1)
        grads = grads - grads[n, y].unsqueeze(1)
        reach = self._geometry.dual(grads.flatten(0, 1)).view_as(gap)
        distance = (gap.abs() / (reach + 1e-12)).scatter(1, y.unsqueeze(1), torch.inf)
        best = distance.argmin(1)
        return gap[n, best], grads[n, best]

    def _move(self, x: Tensor, x0: Tensor, gap: Tensor, w: Tensor) -> Tensor:
        """The next iterate: overshoot both projections onto w·(z − x) = −gap, and mix them."""
        n = len(x)
        gap0 = gap + (w * (x0 - x)).flatten(1).sum(1)
        d = to_plane(torch.cat((x, x0)), torch.cat((w, w)), torch.cat((gap, gap0)), self.threat.norm)
        length = self._geometry.size(d).clamp(min=1e-8)
        alpha = per_row((length[:n] / (length[:n] + length[n:])).clamp(max=self.alpha_max), x)
        here, there = x + self.overshoot * d[:n], x0 + self.overshoot * d[n:]
        return (here * (1 - alpha) + there * alpha).clamp_(0, 1)


def to_plane(t: Tensor, w: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The smallest d with w·d = −gap and t + d in [0, 1]; where the box forbids it, the d that comes nearest.

    t, w (N, …), gap (N,). The signs of d are known; its lengths along the axes are functions of one multiplier λ, and
    w·d is concave and piecewise linear in λ. Newton's method from λ = 0 rises to the solution and stops there, in a few
    passes instead of a sort (in L1, where w·d has steps instead of kinks, the axes are sorted).
    """
    shape, t, w = t.shape, t.flatten(1), w.flatten(1)
    sign = -gap.sign().unsqueeze(1) * w.sign()
    weight = w.abs()
    room = torch.where(sign > 0, 1 - t, t) * (weight > 0)
    need = gap.abs()
    if norm == "l1":
        length = _heaviest_first(weight, room, need)
    else:
        length = _all_together(weight, weight if norm == "l2" else None, room, need)
    return (sign * length).view(shape)


def _all_together(weight: Tensor, rate: Tensor | None, room: Tensor, need: Tensor) -> Tensor:
    """min(λ·rate, room) with the λ for which weight·min(λ·rate, room) = need (rate None: 1 everywhere)."""
    multiplier = torch.zeros_like(need)
    gain = weight if rate is None else weight * rate
    for _ in range(24):
        free = multiplier.unsqueeze(1) if rate is None else multiplier.unsqueeze(1) * rate
        length = torch.minimum(free, room)
        lack = need - (weight * length).sum(1)
        slope = (gain * (free < room)).sum(1)
        rise = torch.where((slope > 0) & (lack > 0), lack / slope, torch.zeros_like(lack))
        higher = multiplier + rise
        if multiplier.device.type == "cpu" and not bool((higher > multiplier * (1 + 1e-6)).any()):
            break
        multiplier = higher
    free = multiplier.unsqueeze(1) if rate is None else multiplier.unsqueeze(1) * rate
    # Where even the whole room is not enough, take it.
    short = ((weight * room).sum(1) <= need).unsqueeze(1)
    return torch.where(short, room, torch.minimum(free, room))


def _heaviest_first(weight: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Along the axes of the largest weights, each up to the bound of [0, 1], the last one in part."""
    heavy, order = weight.sort(dim=1, descending=True)
    space = room.gather(1, order)
    achieved = heavy * space
    before = achieved.cumsum(1) - achieved
    left = (need.unsqueeze(1) - before).clamp_(min=0)
    length = torch.where(heavy > 0, torch.minimum(space, left / heavy.clamp(min=1e-38)), 0.0)
    return torch.zeros_like(weight).scatter_(1, order, length)
