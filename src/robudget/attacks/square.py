"""Square: random search with square windows and the margin loss, no gradients (Andriushchenko et al. 2020).

Every row draws its own windows and signs from its counter, a block of queries at a time. A row spends steps + 1
queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robudget.attacks.driver import Rows, State, initial
from robudget.attacks.geometry import GEOMETRY, l1_project, per_row
from robudget.attacks.noise import Stream, below
from robudget.attacks.victim import Victim, margin
from robudget.threat import Norm, Threat

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def side(query: int, p: float, norm: Norm, height: int, width: int) -> int:
    """The side of query's window: √(p·h·w), p halved after queries 10, 50, 200, …; odd and at least 3 in L2 and L1."""
    halved = sum(query > q for q in _HALVED_AFTER)
    s = max(round(math.sqrt(p / 2**halved * height * width)), 1 if norm == "linf" else 3)
    if norm != "linf" and s % 2 == 0:
        s += 1
    return min(s, height, width)


@functools.cache
def sides(queries: int, p: float, norm: Norm, height: int, width: int, device: torch.device) -> Tensor:
    """`side` of queries 0 … queries − 1."""
    return torch.tensor([side(q, p, norm, height, width) for q in range(queries)]).to(device)


@functools.cache
def bumps(queries: int, p: float, norm: Norm, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The different sides of these queries' windows, ascending, and (sides, 2, height, width) the bump of each, as it
    is and turned, in the upper left corner."""
    size = torch.unique(sides(queries, p, norm, height, width, torch.device("cpu")))
    shapes = [[_padded_bump(v, norm, height, width, t) for t in (False, True)] for v in size.tolist()]
    return size.to(device), torch.stack([torch.stack(pair) for pair in shapes]).to(device, torch.float32)


Propose = Callable[[Tensor, Tensor], Tensor]
"""(number in the block (K, R), row (R,)) → candidates (K, R, C, H, W)."""


@dataclass
class SquareState(State):
    best: Tensor  # smallest margin so far; x is where it was found
    queries: Tensor  # made while it was positive


@dataclass
class Square:
    """The state machine; one `step` makes `block` queries."""

    victim: Victim
    threat: Threat
    seed: int
    name: str = "square"
    steps: int = 5000
    p: float = 0.8
    block: int = 64
    stride: int = 1

    @property
    def calls(self) -> int:
        return 0  # a step makes as many queries as the rows at hand allow

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> SquareState:
        base = initial(rows, x, y, stream.index)
        x0 = base["x0"]
        c, w = x.shape[1], x.shape[3]
        eps = self.threat.eps
        if self.threat.norm == "linf":
            words = stream.words(0, c * w).view(-1, c, 1, w)
            start = torch.where(words >= 1 << 31, _high(x0, eps), _low(x0, eps))
        else:
            start = self._bumps(x0, stream)
        base["x"] = start
        gap = margin(self.victim.logits(start), base["y"])
        base["it"] += 1
        state = SquareState(**base, best=gap, queries=torch.ones_like(base["it"]))
        self._claim(state)
        return state

    def step(self, s: SquareState) -> None:
        """Up to `block` queries of every row.

        Queries are proposed `ahead` at a time from the same point and the first that improves is taken, the later ones
        thrown away: the same search as one by one, since a proposal's window and signs depend on its number alone. Few
        queries improve, so a small batch is filled at little waste.
        """
        n = len(s)
        # Fill a call up to where its fixed cost stops to matter.
        ahead = max(1, min(8, (1 << 15 if s.x.device.type == "cpu" else 1 << 22) // max(s.x.numel(), 1)))
        words = Stream(self.seed, self.name, s.index, s.rank, s.restart).block(
            s.it, self.block, self._words(s.x.shape[1])
        )
        propose = self._linf_proposals(s, words) if self.threat.norm == "linf" else self._bump_proposals(s, words)
        row = torch.arange(n, device=s.it.device)
        turn = torch.arange(ahead, device=s.it.device).unsqueeze(1)
        label = s.y.repeat(ahead)
        used = torch.zeros_like(s.it)
        for _ in range(self.block // ahead):
            x = propose(used + turn, row)
            gap = margin(self.victim.logits(x.flatten(0, 1)), label).view(ahead, n)
            left = self.steps + 1 - s.it
            better = (gap < s.best) & (turn < left)
            gained, first = better.max(dim=0)
            advance = torch.minimum(torch.where(gained, first + 1, ahead), left)
            s.queries += advance * (s.best > 0)
            s.best = torch.where(gained, gap[first, row], s.best)
            torch.where(per_row(gained, s.x), x[first, row], s.x, out=s.x)
            s.it += advance
            used += advance
        s.done |= s.it > self.steps
        self._claim(s)

    def _claim(self, s: SquareState) -> None:
        # `done` rows may claim what their last queries found, so the guard of `State.claim` does not fit here.
        wrong = s.best <= 0
        torch.minimum(s.worst, s.best, out=s.worst)
        s.when = torch.where(wrong, s.queries, s.when)
        s.fooled |= wrong
        torch.where(per_row(wrong, s.x), s.x, s.adv, out=s.adv)

    def _windows(self, s: SquareState, words: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(K, R) sides and corners of a block's windows from words (K, R, ≥ 2), and their masks (K, R, 1, h, w)."""
        query = s.it - 1 + torch.arange(len(words), device=s.it.device).unsqueeze(1)
        size = sides(*self._schedule(h, w), s.it.device)[query]
        # The authors draw from {0, …, h − s − 1}, so no window touches the last row or column.
        top, left = below(words[..., 0], h - size), below(words[..., 1], w - size)
        rows = torch.arange(h, device=s.it.device)
        columns = torch.arange(w, device=s.it.device)
        inside_h = (rows >= top.unsqueeze(-1)) & (rows < (top + size).unsqueeze(-1))
        inside_w = (columns >= left.unsqueeze(-1)) & (columns < (left + size).unsqueeze(-1))
        return size, top, left, (inside_h.unsqueeze(-1) & inside_w.unsqueeze(-2)).unsqueeze(2)

    def _schedule(self, h: int, w: int) -> tuple[int, float, Norm, int, int]:
        """What `sides` and `bumps` ask for, of images of h × w."""
        return self.steps + 1 + self.block, self.p, self.threat.norm, h, w

    def _words(self, channels: int) -> int:
        """Random words of a query: corners (and an orientation), then a bit per channel."""
        return (2 if self.threat.norm == "linf" else 5) + -(-channels // 32)

    def _linf_proposals(self, s: SquareState, words: Tensor) -> Propose:
        """L∞: adding ±2ε to a window of a point in the ball and clipping lands on the ball's upper or lower face."""
        c, h, w = s.x.shape[1:]
        *_, mask = self._windows(s, words, h, w)
        up = bits(words[..., 2:], c).unsqueeze(-1).unsqueeze(-1)
        low, high = _low(s.x0, self.threat.eps), _high(s.x0, self.threat.eps)

        def propose(query: Tensor, row: Tensor) -> Tensor:
            return torch.where(mask[query, row], torch.where(up[query, row], high, low), s.x)

        return propose

    # -- L2 and L1: a window's mass is moved into another, shaped like a bump of two signs -----------------------------

    def _bump_proposals(self, s: SquareState, words: Tensor) -> Propose:
        c, h, w = s.x.shape[1:]
        size, top, left, first = self._windows(s, words[..., 0:2], h, w)
        *_, second = self._windows(s, words[..., 2:4], h, w)
        turned = (words[..., 4] >= 1 << 31).long()
        sign = bits(words[..., 5:], c).to(s.x.dtype).mul_(2).sub_(1).unsqueeze(-1).unsqueeze(-1)
        known, shapes = bumps(*self._schedule(h, w), s.it.device)
        number = torch.searchsorted(known, size)
        # Bumps lie in the table's corner; turning the indices puts them into their windows.
        i = (torch.arange(h, device=size.device) - top.unsqueeze(-1)) % h
        j = (torch.arange(w, device=size.device) - left.unsqueeze(-1)) % w

        def propose(query: Tensor, row: Tensor) -> Tensor:
            which = number[query, row].unsqueeze(-1).unsqueeze(-1), turned[query, row].unsqueeze(-1).unsqueeze(-1)
            bump = shapes[(*which, i[query, row].unsqueeze(-1), j[query, row].unsqueeze(-2))].unsqueeze(2)
            return self._move_mass(s, bump * sign[query, row], first[query, row], second[query, row])

        return propose

    def _move_mass(self, s: SquareState, bump: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """x with the mass of two windows gathered in the first, plus what the ball allows, along old + new bump."""
        eps, c = self.threat.eps, s.x.shape[1]
        delta, mass = s.x - s.x0, functools.partial(_mass, norm=self.threat.norm)
        total = per_row(GEOMETRY[self.threat.norm].size(delta), delta)
        both = mass(delta * (first | second))
        old = delta * first
        new = bump + old / (mass(old) + 1e-12)
        if self.threat.norm == "l2":
            scale = ((eps**2 - total**2).clamp(min=0) / c + both**2).sqrt()
        else:
            scale = ((eps - total).clamp(min=0) / c + both) * c
        new = new / (mass(new) + 1e-12) * scale
        delta = torch.where(first, new, torch.where(second, 0, delta))
        return self._onto_ball(s.x0.repeat(len(delta), 1, 1, 1), delta.flatten(0, 1)).view_as(delta)

    def _bumps(self, x0: Tensor, stream: Stream) -> Tensor:
        """The L2 and L1 start: a grid of bumps, each with its own sign per channel and its own orientation per row."""
        c, h, w = x0.shape[1:]
        s = max(h // 5, 1)
        lead = max((h - 5 * s) // 2, 0)
        corners = [(a, b) for a in range(lead, h - s + 1, s) for b in range(lead, w - s + 1, s)]
        words = stream.words(0, len(corners) * (1 + -(-c // 32))).view(len(x0), len(corners), -1)
        delta = torch.zeros_like(x0)
        shapes = torch.stack([_bump(s, self.threat.norm, t) for t in (False, True)]).to(x0)
        for n, (a, b) in enumerate(corners):
            sign = bits(words[:, n, 1:], c).to(x0.dtype) * 2 - 1
            shape = shapes[(words[:, n, 0] >= 1 << 31).long()].unsqueeze(1)
            delta[:, :, a : a + s, b : b + s] = shape * sign.unsqueeze(-1).unsqueeze(-1)
        return self._onto_ball(x0, delta)

    def _onto_ball(self, x0: Tensor, delta: Tensor) -> Tensor:
        """x0 + delta, scaled to norm ε (L2) or projected into the ball (L1), and moved into [0, 1]."""
        eps = self.threat.eps
        if self.threat.norm == "l1":
            return l1_project(x0 + delta, x0, eps * (1 - 1e-6))
        size = per_row(GEOMETRY["l2"].size(delta), delta)
        return (x0 + delta * (eps / (size + 1e-12))).clamp_(0, 1)


def bits(words: Tensor, count: int) -> Tensor:
    """(…, words) → (…, count) bool, 32 bits a word."""
    shifts = torch.arange(32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :count].bool()


def _low(x: Tensor, eps: float) -> Tensor:
    return (x - eps).clamp_(min=0)


def _high(x: Tensor, eps: float) -> Tensor:
    return (x + eps).clamp_(max=1)


def _bump(s: int, norm: Norm, turned: bool) -> Tensor:
    """(s, s): two stacked pyramids of opposite sign, norm 1 (the authors' η)."""
    top = torch.cat((_pyramid(s // 2, s, norm), -_pyramid(s - s // 2, s, norm)))
    top = top / _mass(top, norm)
    return top.T if turned else top


def _pyramid(x: int, y: int, norm: Norm) -> Tensor:
    """(x, y): nested rectangles around the centre, the n-th weighing 1/n² (L2) or 1/n⁴ (L1), norm 1."""
    out = torch.zeros(x, y)
    a, b = x // 2, y // 2
    for n in range(max(x // 2 + 1, y // 2 + 1)):
        out[max(a, 0) : min(a + 2 * n + 1, x), max(b, 0) : min(b + 2 * n + 1, y)] += 1 / (n + 1) ** (
            2 if norm == "l2" else 4
        )
        a, b = a - 1, b - 1
    return out / _mass(out, norm) if x else out


def _mass(v: Tensor, norm: Norm) -> Tensor:
    """The norm over height and width, (…, 1, 1)."""
    if norm == "l2":
        return v.square().sum((-2, -1), keepdim=True).sqrt()
    return v.abs().sum((-2, -1), keepdim=True)


def _padded_bump(s: int, norm: Norm, h: int, w: int, turned: bool) -> Tensor:
    out = torch.zeros(h, w)
    out[:s, :s] = _bump(s, norm, turned)
    return out
