"""Rows and their queue: what an attack works on, and the loop that drives any attack over many images.

A row is (image, target class, restart), each with its own iteration. Rows of broken images leave at once and the batch
is refilled from the queue; targets of one image share batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from robudget.attacks.geometry import seal
from robudget.attacks.rng import Noise, Stream
from robudget.threat import Threat


@dataclass
class Batch:
    """Tensors with one line per row: selection and concatenation go over all of them."""

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (indices or a mask), in place."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name)[rows])

    def extend(self, other: Self) -> None:
        """Append the rows of `other`, in place."""
        for f in fields(self):
            setattr(self, f.name, torch.cat((getattr(self, f.name), getattr(other, f.name))))

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))


@dataclass
class Rows(Batch):
    """What is to be attacked. `image` is a position in the caller's x; `target` a class, `rank` its rank (0: none)."""

    image: Tensor
    target: Tensor
    rank: Tensor
    restart: Tensor


def plan(images: Tensor, logits: Tensor, *, targets: int = 0, restarts: int = 1) -> Rows:
    """The rows over `images` (positions), target by target, then restart by restart: the order the queue is worked in.

    `logits` (N, classes) are those of the caller's N clean images: targets are the classes ranked 2, 3, … by them;
    `targets` 0 plans untargeted rows.
    """
    order = logits.sort(dim=1).indices if targets else None
    parts = []
    for rank in range(1, targets + 1) if targets else range(1):
        target = torch.full_like(images, -1) if order is None else order[images, -1 - rank]
        for restart in range(restarts):
            parts.append((images, target, torch.full_like(images, rank), torch.full_like(images, restart)))
    return Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass
class State(Batch):
    """What every attack keeps per row. `x0` the image, `x` the point to be evaluated next.

    `fooled`: `adv` is (in the attack's own arithmetic) misclassified and inside the ball; `done`: nothing left to do;
    `it`: evaluations made; `when`: the evaluation that `fooled` dates from; `worst`: smallest margin seen.
    """

    image: Tensor
    index: Tensor
    target: Tensor
    rank: Tensor
    restart: Tensor
    y: Tensor
    x0: Tensor
    x: Tensor
    adv: Tensor
    it: Tensor
    when: Tensor
    worst: Tensor
    fooled: Tensor
    done: Tensor

    def claim(self, wrong: Tensor, x: Tensor, margin: Tensor) -> None:
        """Note which rows the point `x` fools, and how near the others came. Rows that are done claim nothing."""
        wrong = wrong & ~self.done
        torch.minimum(self.worst, margin, out=self.worst)
        self.when = torch.where(wrong & ~self.fooled, self.it, self.when)
        self.fooled |= wrong
        torch.where(wrong.view(-1, 1, 1, 1), x, self.adv, out=self.adv)


def fresh(rows: Rows, x: Tensor, y: Tensor, index: Tensor) -> dict[str, Tensor]:
    """The fields of `State` for new rows, sitting on their clean image."""
    x0 = x[rows.image]
    n, device = len(rows), x.device
    counts = torch.zeros(n, dtype=torch.int64, device=device)
    return {
        "image": rows.image,
        "index": index,
        "target": rows.target,
        "rank": rows.rank,
        "restart": rows.restart,
        "y": y[rows.image],
        "x0": x0,
        "x": x0.clone(),
        "adv": x0.clone(),
        "it": counts,
        "when": counts.clone(),
        "worst": torch.full((n,), torch.inf, device=device),
        "fooled": torch.zeros(n, dtype=torch.bool, device=device),
        "done": torch.zeros(n, dtype=torch.bool, device=device),
    }


S = TypeVar("S", bound=State)


class Attack(Protocol[S]):
    """A state machine over rows. `name` keys the noise; `stride` is how many `step`s to make between looks."""

    name: str
    stride: int

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> S: ...

    def step(self, state: S) -> None: ...


Verify = Callable[[Tensor, Tensor], Tensor]
"""(x_adv, y) → (N,) bool: does the model as given, in full precision, misclassify?"""


@dataclass
class Outcome:
    """What an attack did to each of the caller's images. `when` is 0 and `x_adv` the image itself where not broken."""

    broken: Tensor
    x_adv: Tensor
    when: Tensor
    restart: Tensor
    target: Tensor
    worst: Tensor
    refuted: int = 0


def drive(
    attack: Attack[S],
    rows: Rows,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    noise: Noise,
    verify: Verify,
    batch_size: int,
    outcome: Outcome | None = None,
    watch: Callable[[Outcome, Tensor, int], None] | None = None,
) -> Outcome:
    """Run `attack` over `rows` of images x (N, C, H, W), labels y (N,); at most `batch_size` rows at a time.

    Every claim of a row is sealed into the threat's contract and verified; a refuted row stays in the attack. `watch`
    is called after every look with (outcome, image positions that are now finished, rows left).
    """
    out = outcome or blank(x)
    left = torch.bincount(rows.image, minlength=len(x))
    state: S | None = None
    first = 0
    while True:
        # Refill, skipping rows whose image has meanwhile been broken by another row.
        live = 0 if state is None else len(state)
        while live < batch_size and first < len(rows):
            piece = slice(first, first + batch_size - live)
            image = rows.image[piece]
            useful = ~out.broken[image]
            chosen = Rows(*(getattr(rows, f.name)[piece][useful] for f in fields(rows)))
            first += len(image)
            if len(chosen):
                stream = noise.stream(attack.name, chosen.image, chosen.rank, chosen.restart)
                new = attack.init(chosen, x, y, stream)
                if state is None:
                    state = new
                else:
                    state.extend(new)
                live = len(state)
        if state is None or not len(state):
            return out
        for _ in range(attack.stride):
            attack.step(state)
        _settle(state, out, threat, verify)
        gone = state.done
        if bool(gone.any()):
            dropped = state.image[gone]
            out.worst.scatter_reduce_(0, dropped, state.worst[gone], "amin")
            left.scatter_add_(0, dropped, torch.full_like(dropped, -1))
            state.keep(~gone)
            if watch is not None:
                finished = torch.unique(dropped)
                finished = finished[out.broken[finished] | (left[finished] <= 0)]
                watch(out, finished, len(state) + len(rows) - first)


def blank(x: Tensor) -> Outcome:
    """No image attacked yet."""
    n, device = len(x), x.device
    zeros = torch.zeros(n, dtype=torch.int64, device=device)
    return Outcome(
        broken=torch.zeros(n, dtype=torch.bool, device=device),
        x_adv=x.clone(),
        when=zeros,
        restart=zeros.clone(),
        target=zeros - 1,
        worst=torch.full((n,), torch.inf, device=device),
    )


def _settle(state: State, out: Outcome, threat: Threat, verify: Verify) -> None:
    """Verify the claims, record what broke, and finish every row of a broken image."""
    claims = state.fooled.nonzero().squeeze(1)
    if not len(claims):
        return
    image = state.image[claims]
    x_adv = seal(state.adv[claims], state.x0[claims], threat.eps, threat.norm)
    true = verify(x_adv, state.y[claims])
    out.refuted += int((~true).sum())
    state.fooled[claims[~true]] = False
    # Two rows of one image may succeed in the same look: the first in queue order is the one reported.
    for row, i, ok in zip(claims.tolist(), image.tolist(), true.tolist(), strict=True):
        if ok and not out.broken[i]:
            at = (claims == row).nonzero().squeeze()
            out.broken[i] = True
            out.x_adv[i] = x_adv[at]
            out.when[i] = state.when[row]
            out.restart[i] = state.restart[row]
            out.target[i] = state.target[row]
    state.done |= out.broken[state.image]
