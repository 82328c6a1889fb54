"""The endless stream of training batches: real and synthetic images, mixed at a fixed share of every batch.

Batch `t` is a function of (seed, t) alone. Nothing has to be remembered to go on from any step.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from robudget.data.augment import WHOLE
from robudget.data.dataset import Split
from robudget.data.keyed import generator_for
from robudget.errors import InputError

AHEAD = 3  # batches read ahead from a source that does not fit in memory
RESIDENT = 1 << 30  # bytes up to which a memory-mapped source is copied into a CPU's memory


class Passes:
    """Row numbers of one source: pass after pass over all of it, each in a fresh order, without replacement within."""

    def __init__(self, size: int, take: int, *, seed: int, name: str) -> None:
        self._size, self._take, self._seed, self._name = size, take, seed, name
        self._orders: OrderedDict[int, Tensor] = OrderedDict()

    def rows(self, step: int) -> Tensor:
        """int64 (take,) row numbers of batch `step`."""
        first, last, parts = step * self._take, (step + 1) * self._take, []
        while first < last:
            number, offset = divmod(first, self._size)
            parts.append(self._order(number)[offset : offset + last - first])
            first += len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _order(self, number: int) -> Tensor:
        if number not in self._orders:
            generator = generator_for("cpu", self._seed, self._name, number)
            self._orders[number] = torch.randperm(self._size, generator=generator)
            # A batch is smaller than its source, so it touches two passes at most.
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[number]


@dataclass(frozen=True)
class Batch:
    """`images` uint8 (N, C, H, W), `labels` int64 (N,) and, where a source has them, probabilities `soft` (N, classes),
    all on the device."""

    images: Tensor
    labels: Tensor
    soft: Tensor | None


@dataclass(frozen=True)
class _Held:
    """A source where it is read from: on the device, or memory-mapped. `chosen`: the rows of `split` that it consists
    of, None = all."""

    split: Split
    passes: Passes
    resident: bool
    chosen: Tensor | None

    def rows(self, step: int) -> Tensor:
        rows = self.passes.rows(step)
        return rows if self.chosen is None else self.chosen[rows]


class Stream:
    """Batches of `batch_size` images on `device`, a `share` of them synthetic.

    What fits is moved to the device once. A larger source stays memory-mapped, and threads read its next batches while
    the device works. `rows` are the rows of `real` that are trained on (None = all), `mine` the rows of every batch
    that this process trains on. Raises InputError when a batch asks for more images than a source has.
    """

    def __init__(
        self,
        real: Split,
        synthetic: Split | None,
        *,
        classes: int,
        batch_size: int,
        share: float,
        seed: int,
        device: torch.device,
        rows: Tensor | None = None,
        mine: slice = WHOLE,
    ) -> None:
        generated = round(share * batch_size) if synthetic is not None else 0
        if generated >= batch_size:
            raise InputError(
                f"synthetic.fraction = {share} leaves no real image in a batch of {batch_size} (allowed: at least one)"
            )
        self.batch_size, self.real = batch_size, batch_size - generated
        self._classes, self._device, self._mine = classes, device, mine
        self._sources: list[_Held] = []
        for name, split, chosen, take in (
            ("real", real, rows, self.real),
            ("synthetic", synthetic, None, generated),
        ):
            if split is None or take == 0:
                continue
            size = len(split) if chosen is None else len(chosen)
            if take > size:
                raise InputError(
                    f"batch_size = {batch_size} takes {take} {name} images at once, but there are only {size}"
                )
            self._sources.append(self._hold(split, chosen, Passes(size, take, seed=seed, name=name)))
        self._soft = any(held.split.soft is not None for held in self._sources)
        waits = not all(held.resident for held in self._sources)
        self._pool = ThreadPoolExecutor(max_workers=AHEAD, thread_name_prefix="read-ahead") if waits else None
        self._ahead: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> Batch:
        """Batch number `step`, counted from 0."""
        if self._pool is None:
            return self._gather(step)
        for number in range(step, step + AHEAD + 1):
            if number not in self._ahead:
                self._ahead[number] = self._pool.submit(self._gather, number)
        batch = self._ahead.pop(step).result()
        self._ahead = {number: future for number, future in self._ahead.items() if number > step}
        return batch

    def _hold(self, split: Split, chosen: Tensor | None, passes: Passes) -> _Held:
        size = split.images[0].numel() * (len(split) if chosen is None else len(chosen))
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            fits = size < free // 4
        else:
            fits = size <= RESIDENT
        if not fits:
            return _Held(split, passes, False, chosen)
        # A copy even on the CPU: a mapped file is left alone from here on.
        part = split if chosen is None else split[chosen]
        images = part.images.to(self._device, copy=chosen is None)
        soft = part.soft.to(self._device) if part.soft is not None else None
        return _Held(Split(images, part.labels.to(self._device), soft), passes, True, None)

    def _gather(self, step: int) -> Batch:
        # Which rows of the whole batch are this process's is settled before anything is read.
        order = torch.arange(self.batch_size)[self._mine]
        parts = []
        first = 0
        for held in self._sources:
            rows = held.rows(step)
            chosen = (
                rows[order[(order >= first) & (order < first + len(rows))] - first] if self._mine != WHOLE else rows
            )
            parts.append(self._take(held, chosen))
            first += len(rows)
        images, labels, soft = zip(*parts, strict=True)
        return Batch(_joined(images), _joined(labels), _joined(soft) if self._soft else None)

    def _take(self, held: _Held, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = held.split
        rows = rows.to(split.labels.device)
        # Files hold height × width × channels; reading whole images in that order is what keeps the disk sequential.
        if split.images.is_contiguous():
            images = split.images.index_select(0, rows)
        else:
            images = split.images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
        labels = split.labels.index_select(0, rows)
        if not self._soft:
            soft = labels
        elif split.soft is None:
            soft = F.one_hot(labels, self._classes).float()
        else:
            soft = split.soft.index_select(0, rows)
        if held.resident:
            return images, labels, soft
        pinned = (images.contiguous(), labels, soft)
        if self._device.type == "cuda":
            pinned = (pinned[0].pin_memory(), labels.pin_memory(), soft.pin_memory())
        return tuple(t.to(self._device, non_blocking=True) for t in pinned)  # type: ignore[return-value]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
