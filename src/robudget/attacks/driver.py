"""Rows and their queue: what an attack works on, and the loop that drives any attack over many images.

A row is (image, target class, restart), each with its own iteration. Rows of broken images leave at once and the batch
is refilled from the queue; targets of one image share batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from robudget.attacks.geometry import enforce
from robudget.attacks.noise import Noise, Stream
from robudget.attacks.victim import to_float
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


def initial(rows: Rows, x: Tensor, y: Tensor, index: Tensor) -> dict[str, Tensor]:
    """The fields of `State` for new rows, sitting on their clean image."""
    # The caller's images may lie in another memory than the rows are worked on.
    n, device = len(rows), index.device
    x0 = to_float(x[rows.image.to(x.device)].to(device))
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
    """A state machine over rows. `name` keys the noise; `stride`: how many `step`s to make between two reports;
    `calls`: the `step`s that a row takes at most, 0 where that depends on the row."""

    name: str
    stride: int

    @property
    def calls(self) -> int: ...

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> S: ...

    def step(self, state: S) -> None: ...


Verify = Callable[[Tensor, Tensor], Tensor]
"""(x_adv, y) → (N,) bool: does the model as given, in full precision, misclassify?"""


Steps = Callable[[State, int], None]
"""(state, times): makes so many steps of an attack on its rows."""


Tried = Callable[[State, Tensor, Tensor], None]
"""(state, rows, x_adv): told of the claims of these rows (indices) after they were verified as x_adv."""


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
class Report:
    """Where `drive` is. `outcome` so far (the same object in every report); rows that are done, rows in all, and
    evaluations made by those at work; `x_adv` (M, C, H, W): verified examples since the last report, of the images at
    positions `image` (M,)."""

    outcome: Outcome
    rows_done: int
    rows: int
    evaluations: int
    image: Tensor
    x_adv: Tensor


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
    exhaust: bool = False,
    tried: Tried | None = None,
    steps_of: Steps | None = None,
) -> Iterator[Report]:
    """Run `attack` over `rows` of images x (N, C, H, W; float32 or uint8), labels y (N,), at most `batch_size` rows at
    a time; the last report has the whole outcome (there is none where there are no rows).

    Every claim of a row is moved exactly into the ball and verified; a refuted row stays in the attack. With `exhaust`
    the rows of a broken image go on, and every example of theirs is reported. `steps_of` makes the steps between two
    reports, where that is not to call `attack.step` so many times.
    """
    out = Outcome.blank(len(x), rows.image.device)
    left = torch.bincount(rows.image, minlength=len(x))
    state: S | None = None
    first, steps, ends = 0, 0, list[int]()  # `ends`: the steps after which rows are done, known without looking
    while True:
        # Refill, skipping rows whose image has meanwhile been broken by another row.
        while (live := 0 if state is None else len(state)) < batch_size and first < len(rows):
            piece = slice(first, first + batch_size - live)
            more = Rows(*(getattr(rows, f.name)[piece] for f in fields(rows)))
            first += len(more)
            if not exhaust:
                more.keep(~out.broken[more.image])
            if len(more):
                ends.append(steps + attack.calls)
                stream = noise.stream(attack.name, more.image, more.rank, more.restart)
                new = attack.init(more, x, y, stream)
                if state is None:
                    state = new
                else:
                    state.extend(new)
        if state is None or not len(state):
            return
        # Rows that are done work on for nothing until the next report.
        ends = [end for end in ends if end > steps]
        stride = min([attack.stride, *(end - steps for end in ends)])
        if steps_of is not None:
            steps_of(state, stride)
        else:
            for _ in range(stride):
                attack.step(state)
        steps += stride
        image, x_adv = _verify_claims(state, out, threat, verify, exhaust, tried)
        done = state.done
        if bool(done.any()):
            at = state.image[done]
            out.worst.scatter_reduce_(0, at, state.worst[done], "amin")
            left.scatter_add_(0, at, torch.full_like(at, -1))
            out.finished[at] = out.broken[at] | (left[at] <= 0)
            state.keep(~done)
        yield Report(out, first - len(state), len(rows), int(state.it.sum()), image, x_adv)


def _verify_claims(
    state: State, out: Outcome, threat: Threat, verify: Verify, exhaust: bool, tried: Tried | None
) -> tuple[Tensor, Tensor]:
    """Record the claims that hold, and end every row of a broken image; the examples as (positions, x_adv)."""
    claims = state.fooled.nonzero().squeeze(1)
    image = state.image[claims]
    if not len(claims):
        return image, state.adv[claims]
    x_adv = enforce(state.adv[claims], state.x0[claims], threat.eps, threat.norm)
    true = verify(x_adv, state.y[claims])
    if tried is not None:
        tried(state, claims, x_adv)
    out.refuted += int((~true).sum())
    state.refute(claims[~true])
    if exhaust:
        out.broken[image[true]] = True
        state.fooled[claims[true]] = False
        return image[true], x_adv[true]
    # Two rows of one image may succeed at once: the first one is reported.
    by_image: dict[int, int] = {}
    for n, (i, holds) in enumerate(zip(image.tolist(), true.tolist(), strict=True)):
        if holds:
            by_image.setdefault(i, n)
    pick = torch.tensor(list(by_image.values()), dtype=torch.int64, device=image.device)
    at, row = image[pick], claims[pick]
    out.broken[at] = True
    out.when[at], out.restart[at], out.target[at] = state.when[row], state.restart[row], state.target[row]
    if len(pick):
        state.done |= out.broken[state.image]
    return at, x_adv[pick]
