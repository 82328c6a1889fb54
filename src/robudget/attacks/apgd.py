"""APGD: PGD with momentum and a step size that adapts per row (Croce & Hein 2020, algorithm 1; L1: Croce & Hein 2021).

A row spends steps + 1 evaluations: its start, then one after every update. In L1 with `large_eps` a row goes through
the balls 3ε, 2ε and ε in 30, 30 and 40% of the iterations, each started from the best point of the last; only ε
decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robudget.attacks.driver import Rows, State, initial
from robudget.attacks.geometry import GEOMETRY, l1_project, per_row
from robudget.attacks.noise import Stream
from robudget.attacks.victim import Victim, margin, objective
from robudget.threat import Threat


@dataclass
class ApgdState(State):
    eps: Tensor  # of the phase the row is in
    phase: Tensor
    k: Tensor  # evaluations made in this phase
    step_size: Tensor  # η
    x_old: Tensor  # x_{k−1}, the iterate before the last update
    x_best: Tensor  # x_max
    grad_best: Tensor  # the gradient there
    loss_best: Tensor  # f_max
    loss_last: Tensor
    loss_best_check: Tensor  # f_max at the last checkpoint
    halved: Tensor  # was the step size halved there?
    rises: Tensor  # steps since then in which the loss rose
    since: Tensor  # steps since then
    period: Tensor  # steps from that checkpoint to the next
    density: Tensor  # L1: share of entries that a step moves
    nonzero: Tensor  # L1: ‖x_best − x‖₀ at the last checkpoint


@dataclass
class Apgd:
    """The state machine. `loss`: ce, dlr, ce-targeted or dlr-targeted; `eot` gradients are averaged per evaluation.

    Checkpoints (the set W): in L∞ and L2 after max(0.22·n, 1) steps, then after periods that shrink by max(0.03·n, 1)
    down to max(0.06·n, 1); in L1 every max(0.04·n, 1) steps.
    """

    victim: Victim
    threat: Threat
    name: str = "apgd-ce"
    loss: str = "ce"
    steps: int = 100
    eot: int = 1
    rho: float = 0.75
    large_eps: bool = False
    stride: int = 1
    phases: list[tuple[float, int]] = field(init=False)
    """(radius, steps) of each."""

    def __post_init__(self) -> None:
        eps, n = self.threat.eps, self.steps
        self._l1 = self.threat.norm == "l1"
        if self.large_eps and self._l1:
            first = math.ceil(0.3 * n)
            self.phases = [(3 * eps, first), (2 * eps, first), (eps, n - 2 * first)]
        else:
            self.phases = [(eps, n)]
        self._objective = objective(self.loss)
        self._geometry = GEOMETRY[self.threat.norm]

    @property
    def calls(self) -> int:
        return sum(steps + 1 for _, steps in self.phases)

    def _first_period(self, steps: int) -> int:
        return max(int((0.04 if self._l1 else 0.22) * steps), 1)

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> ApgdState:
        """Every row at its random start x_0."""
        base = initial(rows, x, y, stream.index)
        x0, shape = base["x0"], tuple(x.shape[1:])
        eps, steps = self.phases[0]
        noise = stream.uniform(0, shape) if self._geometry.noise == "uniform" else stream.gaussian(0, shape)
        start = self._geometry.surface(x0, noise.to(x0.dtype), eps)
        base["x"] = start
        number, count = base["worst"], base["it"]
        features = x0[0].numel()
        moved = (start != x0).flatten(1).sum(1).to(x0.dtype)
        several = len(self.phases) > 1
        return ApgdState(
            **base,
            eps=torch.full_like(number, eps),
            phase=torch.zeros_like(count),
            k=torch.zeros_like(count),
            step_size=torch.full_like(number, eps if self._l1 else 2 * eps),
            x_old=start.clone(),
            x_best=start.clone(),
            grad_best=torch.zeros_like(start),
            loss_best=torch.full_like(number, -torch.inf),
            loss_last=torch.zeros_like(number),  # the authors compare step 1 with 0, not with the start's loss
            loss_best_check=torch.full_like(number, torch.inf),
            halved=torch.ones_like(base["fooled"]),
            rises=torch.zeros_like(count),
            since=torch.zeros_like(count),
            period=torch.full_like(count, self._first_period(steps)),
            density=moved / features / 1.5 if several else torch.full_like(number, 0.2),
            nonzero=moved if several else torch.full_like(number, features),
        )

    def step(self, s: ApgdState) -> None:
        """Evaluate x_k, and move on to x_{k+1}."""
        logits, loss, grad = self.victim.gradient(s.x, self._objective, s.y, s.target)
        for _ in range(self.eot - 1):
            logits, loss, more = self.victim.gradient(s.x, self._objective, s.y, s.target)
            grad = grad + more
        if self.eot > 1:
            grad = grad / self.eot
        worst = margin(logits, s.y)
        decides = s.phase == len(self.phases) - 1
        s.claim((logits.argmax(1) != s.y) & decides, s.x, worst.where(decides, torch.inf))

        at_start = s.k == 0
        s.rises += (loss > s.loss_last) & ~at_start
        s.loss_last = torch.where(at_start, s.loss_last, loss)
        # Lines 4, 5 and 9 to 11: the best point so far.
        better = loss > s.loss_best
        wide = per_row(better, s.x)
        torch.where(wide, s.x, s.x_best, out=s.x_best)
        torch.where(wide, grad, s.grad_best, out=s.grad_best)
        s.loss_best = torch.where(better, loss, s.loss_best)
        s.loss_best_check = torch.where(at_start, s.loss_best, s.loss_best_check)
        s.since += (~at_start).long()

        x, grad = self._checkpoint(s, s.x, grad)
        self._update(s, x, grad)
        s.it += 1
        s.k += 1
        self._next_phase(s)

    def _checkpoint(self, s: ApgdState, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Lines 12 to 16: at a checkpoint a row may get a smaller step, and go on from its best point."""
        due = s.since == s.period
        # A look at `due` is free on a CPU and a synchronisation elsewhere, where everything below is masked anyway.
        if x.device.type == "cpu" and not bool(due.any()):
            return x, grad
        if self._l1:
            moved = (s.x_best != s.x0).flatten(1).sum(1).to(x.dtype)
            sparser = moved / s.nonzero < 0.95
            smaller = torch.maximum(s.step_size / 1.5, s.eps / 10).minimum(s.eps)
            s.step_size = torch.where(due, torch.where(sparser, s.eps, smaller), s.step_size)
            s.density = torch.where(due, moved / x[0].numel() / 1.5, s.density)
            s.nonzero = torch.where(due, moved, s.nonzero)
            restart = due & sparser
        else:
            condition_1 = s.rises <= s.period * self.rho
            condition_2 = ~s.halved & (s.loss_best_check >= s.loss_best)
            restart = due & (condition_1 | condition_2)
            s.step_size = torch.where(restart, s.step_size / 2, s.step_size)
            s.halved = torch.where(due, restart, s.halved)
            s.loss_best_check = torch.where(due, s.loss_best, s.loss_best_check)
            shrink, least = max(int(0.03 * self.steps), 1), max(int(0.06 * self.steps), 1)
            s.period = torch.where(due, (s.period - shrink).clamp(min=least), s.period)
        s.rises = s.rises.masked_fill(due, 0)
        s.since = s.since.masked_fill(due, 0)
        wide = per_row(restart, x)
        return torch.where(wide, s.x_best, x), torch.where(wide, s.grad_best, grad)

    def _update(self, s: ApgdState, x: Tensor, grad: Tensor) -> None:
        """Lines 7 and 8 (line 3 at the start of a phase, without momentum); in L1 a sparse step without momentum."""
        project, step_size = self._geometry.project, per_row(s.step_size, x)
        if self._l1:
            s.x = l1_project(x + step_size * self._sparse_sign(grad, s.density), s.x0, s.eps)
            return
        z = project(x + step_size * self._geometry.steepest(grad), s.x0, s.eps)
        alpha = per_row(torch.where(s.k > 0, 0.75, 1.0).to(x.dtype), x)
        # In place: x + α(z − x) + (1 − α)(x − x_old).
        z.sub_(x).mul_(alpha).add_(x).add_((x - s.x_old).mul_(1 - alpha))
        s.x_old = x
        s.x = project(z, s.x0, s.eps)

    def _sparse_sign(self, grad: Tensor, density: Tensor) -> Tensor:
        """The signs of the `density` largest entries, with L1 norm 1."""
        size = grad.abs().flatten(1)
        n = size.shape[1]
        rank = ((1 - density) * n).clamp(0, n - 1).long().unsqueeze(1)
        threshold = size.sort(dim=1).values.gather(1, rank)
        sign = (grad.flatten(1) * (size >= threshold)).sign()
        return (sign / (sign.abs().sum(1, keepdim=True) + 1e-10)).view_as(grad)

    def _next_phase(self, s: ApgdState) -> None:
        last = len(self.phases) - 1
        s.done |= (s.phase == last) & (s.k > self.phases[last][1])
        for phase, (_, steps) in enumerate(self.phases[:-1]):
            over = (s.phase == phase) & (s.k > steps)
            if over.device.type == "cpu" and not bool(over.any()):  # elsewhere a look is a synchronisation
                continue
            eps, next_steps = self.phases[phase + 1]
            start = l1_project(s.x_best, s.x0, eps)
            wide = per_row(over, s.x)
            s.x = torch.where(wide, start, s.x)
            s.x_best = torch.where(wide, start, s.x_best)
            moved = (s.x != s.x0).flatten(1).sum(1).to(s.x.dtype)
            s.phase = s.phase.masked_fill(over, phase + 1)
            s.k = s.k.masked_fill(over, 0)
            s.eps = s.eps.masked_fill(over, eps)
            s.step_size = s.step_size.masked_fill(over, eps)
            s.loss_best = s.loss_best.masked_fill(over, -torch.inf)
            s.since = s.since.masked_fill(over, 0)
            s.period = s.period.masked_fill(over, self._first_period(next_steps))
            s.density = torch.where(over, moved / s.x[0].numel() / 1.5, s.density)
            s.nonzero = torch.where(over, moved, s.nonzero)
