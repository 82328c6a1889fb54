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
from robudget.attacks.noise import Noise, Stream
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

    def refute(self, rows: Tensor) -> None:
        """The claims of these rows (indices) did not hold: they go on."""
        self.fooled[rows] = False


def fresh(rows: Rows, x: Tensor, y: Tensor, index: Tensor) -> dict[str, Tensor]:
    """The fields of `State` for new rows, sitting on their clean image."""
    # The caller's images may lie in another memory than the rows are worked on.
    n, device = len(rows), index.device
    x0 = x[rows.image.to(x.device)].to(device)
    counts = torch.zeros(n, dtype=torch.int64, device=device)
    return {
        "image": rows.image,
        "index": index,
        "target": rows.target,
        "rank": rows.rank,
        "restart": rows.restart,
        "y": y[rows.image.to(y.device)].to(device),
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

Found = Callable[[Tensor, Tensor], None]
"""(positions (N,), x_adv (N, C, H, W)): these images were just broken by these examples."""


@dataclass
class Outcome:
    """What an attack did to each of the caller's N images.

    `finished`: nothing of the image is left to do; `when`: the evaluation of the model that broke it (0: not broken);
    `worst`: smallest margin an attack saw inside the ball, in its own arithmetic. `refuted` counts claims that the
    verification did not confirm.
    """

    broken: Tensor
    finished: Tensor
    when: Tensor
    restart: Tensor
    target: Tensor
    worst: Tensor
    refuted: int = 0

    @classmethod
    def blank(cls, n: int, device: torch.device | str = "cpu") -> Outcome:
        """No image attacked yet."""
        zeros = torch.zeros(n, dtype=torch.int64, device=device)
        no = torch.zeros(n, dtype=torch.bool, device=device)
        worst = torch.full((n,), torch.inf, device=device)
        return cls(broken=no, finished=no.clone(), when=zeros, restart=zeros.clone(), target=zeros - 1, worst=worst)


@dataclass(frozen=True)
class Look:
    """What `watch` is told: rows done, rows in all, and evaluations made by the rows at work."""

    rows_done: int
    rows: int
    evaluations: int


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
    found: Found,
    watch: Callable[[Outcome, Look], None] | None = None,
    exhaust: bool = False,
) -> Outcome:
    """Run `attack` over `rows` of images x (N, C, H, W), labels y (N,); at most `batch_size` rows at a time.

    Every claim of a row is sealed into the threat's contract and verified; a refuted row stays in the attack. `found`
    is told the examples, `watch` is called after every look. With `exhaust` the rows of a broken image go on, and
    `found` hears of every success.
    """
    out = Outcome.blank(len(x), rows.image.device)
    left = torch.bincount(rows.image, minlength=len(x))
    state: S | None = None
    first = 0
    while True:
        # Refill, skipping rows whose image has meanwhile been broken by another row.
        live = 0 if state is None else len(state)
        while live < batch_size and first < len(rows):
            piece = slice(first, first + batch_size - live)
            chosen = Rows(*(getattr(rows, f.name)[piece] for f in fields(rows)))
            first += len(chosen)
            if not exhaust:
                chosen.keep(~out.broken[chosen.image])
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
        _settle(state, out, threat, verify, found, exhaust)
        gone = state.done
        if bool(gone.any()):
            image = state.image[gone]
            out.worst.scatter_reduce_(0, image, state.worst[gone], "amin")
            left.scatter_add_(0, image, torch.full_like(image, -1))
            out.finished[image] = out.broken[image] | (left[image] <= 0)
            state.keep(~gone)
        if watch is not None:
            watch(out, Look(first - len(state), len(rows), int(state.it.sum())))


def _settle(state: State, out: Outcome, threat: Threat, verify: Verify, found: Found, exhaust: bool) -> None:
    """Verify the claims, record what broke, and finish every row of a broken image."""
    claims = state.fooled.nonzero().squeeze(1)
    if not len(claims):
        return
    x_adv = seal(state.adv[claims], state.x0[claims], threat.eps, threat.norm)
    true = verify(x_adv, state.y[claims])
    out.refuted += int((~true).sum())
    state.refute(claims[~true])
    if exhaust:
        # One row at a time, so that several examples of one image are all heard of.
        for n in true.nonzero():
            found(state.image[claims[n]], x_adv[n])
        out.broken[state.image[claims[true]]] = True
        state.fooled[claims[true]] = False
        return
    # Two rows of one image may succeed in the same look: the first one is reported.
    image = state.image[claims]
    chosen, seen = [], set()
    for n, (i, ok) in enumerate(zip(image.tolist(), true.tolist(), strict=True)):
        if ok and i not in seen:
            seen.add(i)
            chosen.append(n)
    if not chosen:
        return
    pick = torch.tensor(chosen, device=image.device)
    at, row = image[pick], claims[pick]
    out.broken[at] = True
    out.when[at], out.restart[at], out.target[at] = state.when[row], state.restart[row], state.target[row]
    found(at, x_adv[pick])
    state.done |= out.broken[state.image]
