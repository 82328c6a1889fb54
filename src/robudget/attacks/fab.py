"""FAB and FAB-T: walk along the decision boundary towards the nearest adversarial point (Croce & Hein 2020b).

A minimum-norm attack: it counts where the nearest point found lies within the threat's ε. Inside an ensemble a row may
stop at its first point within ε (`first=True`); alone it runs all its steps and keeps the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robudget.attacks.alone import alone
from robudget.attacks.geometry import GEOMETRY, per_row
from robudget.attacks.objective import difference, margin
from robudget.attacks.rng import Noise, Stream
from robudget.attacks.rows import Rows, State, fresh
from robudget.attacks.victim import Model, Victim
from robudget.threat import Norm, Threat


@dataclass
class FabState(State):
    nearest: Tensor  # distance of `adv`, ∞ while there is none
    checked: Tensor  # the model's answer at x is known, only its gradient is wanted
    expects: Tensor  # the last answer was a wrong class, so the next is likely one too


@dataclass
class Fab:
    """The state machine. With `targeted` a row walks to its own target class, else to the class that seems nearest.

    An iterate is asked two things: is it misclassified, and (after a step back to 0.9 of the way if so) what is the
    gradient. A row whose last iterate was misclassified asks first by a forward pass alone; any other asks both at once
    and so saves a forward pass when the answer is no.
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

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> FabState:
        base = fresh(rows, x, y, stream.index)
        x0, shape = base["x0"], tuple(x.shape[1:])
        again = rows.restart > 0
        if bool(again.any()):
            # Later restarts begin half-way out, in a random direction.
            noise = stream.uniform(0, shape) if self._geometry.noise == "uniform" else stream.gaussian(0, shape)
            noise = noise / per_row(self._geometry.size(noise), noise)
            start = (x0 + 0.5 * self.threat.eps * noise).clamp_(0, 1)
            base["x"] = torch.where(per_row(again, x0), start, x0)
        return FabState(
            **base,
            nearest=torch.full_like(base["worst"], torch.inf),
            checked=torch.ones_like(base["done"]),
            expects=torch.zeros_like(base["done"]),
        )

    def step(self, s: FabState) -> None:
        # Which rows ask for what. (Not on the host's time on an accelerator: there `stride` steps go without a look.)
        over = s.it >= self.steps
        ask = (~s.checked & (s.expects | over) & ~s.done).nonzero().squeeze(1)
        both = ((s.checked | ~s.expects) & ~over & ~s.done).nonzero().squeeze(1)
        if len(ask):
            wrong = self._note(s, ask, self.victim.logits(s.x[ask]))
            s.checked[ask] = True
            s.expects[ask] = wrong
        if len(both):
            x, x0 = s.x[both], s.x0[both]
            logits, gap, w = self._linearise(x, s.y[both], s.target[both])
            known = s.checked[both]
            wrong = self._note(s, both[~known], logits[~known])
            s.checked[both] = True
            s.expects[both[~known]] = wrong
            stay = known.clone()
            stay[~known] = ~wrong
            go = both[stay]
            s.x[go] = self._walk(x[stay], x0[stay], gap[stay], w[stay])
            s.checked[go] = False
            s.it[go] += 1
        # A row is done when its last iterate has been asked about.
        s.done |= s.checked & (s.it >= self.steps)
        if not self.first:
            s.fooled = s.done & (s.nearest <= self.threat.eps)

    def _note(self, s: FabState, at: Tensor, logits: Tensor) -> Tensor:
        """Record the answers at rows `at`; misclassified ones step back towards their image. Returns which were."""
        y, x, x0 = s.y[at], s.x[at], s.x0[at]
        wrong = logits.argmax(1) != y
        distance = self._geometry.distance(x, x0)
        nearer = wrong & (distance < s.nearest[at])
        s.nearest[at] = torch.where(nearer, distance, s.nearest[at])
        s.adv[at] = torch.where(per_row(nearer, x), x, s.adv[at])
        inside = distance <= self.threat.eps
        s.worst[at] = torch.where(inside, torch.minimum(s.worst[at], margin(logits, y)), s.worst[at])
        if self.first:
            hit = nearer & inside
            s.when[at] = torch.where(hit & ~s.fooled[at], s.it[at], s.when[at])
            s.fooled[at] |= hit
        else:
            s.when[at] = torch.where(nearer, s.it[at], s.when[at])
        s.x[at] = torch.where(per_row(wrong, x), x0 + (x - x0) * self.back, x)
        return wrong

    def _linearise(self, x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, z_t − z_y, its gradient) towards each row's target, or the class whose boundary seems nearest."""
        if self.targeted:
            return self.victim.gradient(x, difference, y, target)
        logits, grads = self.victim.jacobian(x)
        n = torch.arange(len(x), device=x.device)
        gap = logits - logits[n, y].unsqueeze(1)
        grads = grads - grads[n, y].unsqueeze(1)
        reach = self._geometry.dual(grads.flatten(0, 1)).view_as(gap)
        distance = (gap.abs() / (reach + 1e-12)).scatter(1, y.unsqueeze(1), torch.inf)
        best = distance.argmin(1)
        return logits, gap[n, best], grads[n, best]

    def _walk(self, x: Tensor, x0: Tensor, gap: Tensor, w: Tensor) -> Tensor:
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

    t, w (N, …), gap (N,). With the direction fixed by the signs, the length taken along each axis is a function of one
    multiplier λ, and what it achieves is concave and piecewise linear in λ: Newton from 0 climbs to the solution and
    stops there, in a handful of passes instead of a sort (L1 has steps instead of kinks, and is sorted).
    """
    shape, t, w = t.shape, t.flatten(1), w.flatten(1)
    way = -gap.sign().unsqueeze(1) * w.sign()
    weight = w.abs()
    room = torch.where(way > 0, 1 - t, t) * (weight > 0)
    need = gap.abs()
    if norm == "l1":
        take = _fill_by_weight(weight, room, need)
    else:
        take = _fill_together(weight, weight if norm == "l2" else None, room, need)
    return (way * take).view(shape)


def _fill_together(weight: Tensor, speed: Tensor | None, room: Tensor, need: Tensor) -> Tensor:
    """min(λ·speed, room) with the λ for which weight·min(λ·speed, room) = need (speed None: 1 everywhere)."""
    level = torch.zeros_like(need)
    pull = weight if speed is None else weight * speed
    for _ in range(24):
        raised = level.unsqueeze(1) if speed is None else level.unsqueeze(1) * speed
        take = torch.minimum(raised, room)
        lack = need - (weight * take).sum(1)
        slope = (pull * (raised < room)).sum(1)
        rise = torch.where((slope > 0) & (lack > 0), lack / slope, torch.zeros_like(lack))
        higher = level + rise
        if level.device.type == "cpu" and not bool((higher > level * (1 + 1e-6)).any()):
            break
        level = higher
    raised = level.unsqueeze(1) if speed is None else level.unsqueeze(1) * speed
    # Where even the whole room is not enough, take it.
    short = ((weight * room).sum(1) <= need).unsqueeze(1)
    return torch.where(short, room, torch.minimum(raised, room))


def _fill_by_weight(weight: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Greedy: the heaviest axes first, each to its wall, the last one in part."""
    heavy, order = weight.sort(dim=1, descending=True)
    space = room.gather(1, order)
    achieved = heavy * space
    before = achieved.cumsum(1) - achieved
    left = (need.unsqueeze(1) - before).clamp_(min=0)
    take = torch.where(heavy > 0, torch.minimum(space, left / heavy.clamp(min=1e-38)), 0.0)
    return torch.zeros_like(weight).scatter_(1, order, take)


def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 0,
    noise: Noise | None = None,
    batch_size: int = 500,
) -> Tensor:
    """FAB (`targets` 0) or FAB-T alone: x_adv as `robudget.attacks.alone` describes, the nearest point found.

    For minimum-norm points without a bound, give a threat that allows everything (L∞: ε = 1).
    """

    def machine(victim: Victim) -> Fab:
        return Fab(victim, threat, "fab-t" if targets else "fab", targeted=targets > 0, steps=steps, first=False)

    noise = noise or Noise()
    return alone(machine, model, x, y, threat, targets=targets, restarts=restarts, noise=noise, batch_size=batch_size)
