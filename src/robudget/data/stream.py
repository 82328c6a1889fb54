"""From a recipe and a dataset to the endless stream of training batches.

`prepare` chooses the training, held-out and synthetic images; `Stream` mixes real and synthetic ones at a fixed share
of every batch. Batch `t` is a function of (seed, t) alone. Nothing has to be remembered to go on from any step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from robudget.data import synthetic
from robudget.data.augment import WHOLE
from robudget.data.dataset import HOLDOUT_SEED, Dataset, Split, stratified_rows
from robudget.data.keyed import generator_for
from robudget.errors import InputError
from robudget.recipe import Recipe

# -- which images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """`real` is the published training split, of which the `rows` (int64) are trained on: a list of rows and no copy,
    since the images may be memory-mapped and larger than the memory."""

    real: Split
    rows: Tensor
    validation: Split
    synthetic: Split | None

    @cached_property
    def train(self) -> Split:
        """The images trained on, copied out."""
        return self.real[self.rows]


def prepare(
    recipe: Recipe, dataset: Dataset, synthetic_root: str | Path | None = None, cache: str | Path | None = None
) -> Prepared:
    """Hold out the validation images, take the first `data.amount` of the rest, then make or read the synthetic ones.

    In this order the validation images are the same for every recipe on this dataset, and a generator fitted here has
    seen only images that are trained on. `validation: paper` holds out nothing and validates on the test split.
    """
    real, images, amount = dataset.train, recipe.validation.images, recipe.data.amount
    if recipe.validation.split == "paper":
        rows, held = torch.arange(len(real)), dataset.test.first(images)
    else:
        rows, chosen = stratified_rows(real.labels, recipe.validation.fraction, dataset.classes, seed=HOLDOUT_SEED)
        _enough(images, len(chosen), "validation.images", "are held out")
        held = real[chosen[:images]]
    _enough(amount, len(rows), "data.amount", "are left to train on")
    without = Prepared(real, rows[:amount], held, None)
    generated = synthetic.make(recipe, lambda: without.train, dataset, synthetic_root, cache)
    return replace(without, synthetic=generated)


def _enough(asked: int | None, there: int, key: str, what: str) -> None:
    if asked is not None and asked > there:
        raise InputError(f"{key} = {asked}, but only {there} images {what}")


# -- in which order ---------------------------------------------------------------------------------------------------

AHEAD = 3  # batches read ahead from a source that does not fit in memory
RESIDENT = 1 << 30  # bytes up to which a memory-mapped source is copied into a CPU's memory
Takes = Sequence[tuple[int, int]]  # (first step, images of a batch from then on)


class Passes:
    """Row numbers of one source: pass after pass over all of it, each in a fresh order, without replacement within.

    A batch takes `take` of them, from step `first` of a (first, take) in `later` on so many instead.
    """

    def __init__(self, size: int, take: int, *, seed: int, name: str, later: Takes = ()) -> None:
        self._size, self._seed, self._name = size, seed, name
        self._takes = ((0, take), *later)
        self._orders: OrderedDict[int, Tensor] = OrderedDict()

    def rows(self, step: int) -> Tensor:
        """int64 row numbers of batch `step`."""
        first, take = self._place(step)
        last, parts = first + take, []
        while first < last:
            number, offset = divmod(first, self._size)
            parts.append(self._order(number)[offset : offset + last - first])
            first += len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat([*parts, torch.empty(0, dtype=torch.int64)])

    def _place(self, step: int) -> tuple[int, int]:
        """How many rows the batches before `step` took, and how many it takes."""
        before, (since, take) = 0, self._takes[0]
        for begin, other in self._takes[1:]:
            if step < begin:
                break
            before, since, take = before + (begin - since) * take, begin, other
        return before + (step - since) * take, take

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
class _Reader:
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
    """Batches of `batch_size` images on `device`, a `share` of them synthetic, from step `first` of a (first, share) in
    `later` on that share.

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
        later: Sequence[tuple[int, float]] = (),
    ) -> None:
        phases = ((0, share), *later) if synthetic is not None else ((0, 0.0),)
        generated = [(first, round(part * batch_size)) for first, part in phases]
        for (_, part), (_, take) in zip(phases, generated, strict=True):
            if part < 1 and take >= batch_size:
                raise InputError(
                    f"synthetic.fraction = {part:g} leaves no real image in a batch of {batch_size} (allowed: at "
                    "least one, or synthetic.fraction=1)"
                )
        self.batch_size = batch_size
        self._classes, self._device, self._mine = classes, device, mine
        self._sources: list[_Reader] = []
        for name, split, chosen, takes in (
            ("real", real, rows, [(first, batch_size - take) for first, take in generated]),
            ("synthetic", synthetic, None, generated),
        ):
            most = max(take for _, take in takes)
            if split is None or most == 0:
                continue
            size = len(split) if chosen is None else len(chosen)
            if most > size:
                raise InputError(
                    f"batch_size = {batch_size} takes {most} {name} images at once, but there are only {size}"
                )
            passes = Passes(size, takes[0][1], seed=seed, name=name, later=takes[1:])
            self._sources.append(self._reader(split, chosen, passes))
        self._soft = any(reader.split.soft is not None for reader in self._sources)
        waits = not all(reader.resident for reader in self._sources)
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

    def rows(self, step: int) -> Tensor:
        """int64 row numbers, among the real images trained on, of the real images of batch `step`."""
        return self._sources[0].passes.rows(step)

    def _reader(self, split: Split, chosen: Tensor | None, passes: Passes) -> _Reader:
        size = split.images[0].numel() * (len(split) if chosen is None else len(chosen))
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            fits = size < free // 4
        else:
            fits = size <= RESIDENT
        if not fits:
            return _Reader(split, passes, False, chosen)
        # A copy even on the CPU: a mapped file is left alone from here on.
        part = split if chosen is None else split[chosen]
        images = part.images.to(self._device, copy=chosen is None)
        soft = part.soft.to(self._device) if part.soft is not None else None
        return _Reader(Split(images, part.labels.to(self._device), soft), passes, True, None)

    def _gather(self, step: int) -> Batch:
        # Which rows of the whole batch are this process's is settled before anything is read.
        order = torch.arange(self.batch_size)[self._mine]
        parts = []
        first = 0
        for reader in self._sources:
            rows = reader.rows(step)
            chosen = (
                rows[order[(order >= first) & (order < first + len(rows))] - first] if self._mine != WHOLE else rows
            )
            parts.append(self._take(reader, chosen))
            first += len(rows)
        images, labels, soft = zip(*parts, strict=True)
        return Batch(_joined(images), _joined(labels), _joined(soft) if self._soft else None)

    def _take(self, reader: _Reader, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = reader.split
        if split.labels.device.type == "cuda":
            rows = rows.pin_memory().to(split.labels.device, non_blocking=True)  # else the host waits for the device
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
        if reader.resident:
            return images, labels, soft
        pinned = (images.contiguous(), labels, soft)
        if self._device.type == "cuda":
            pinned = (pinned[0].pin_memory(), labels.pin_memory(), soft.pin_memory())
        return tuple(t.to(self._device, non_blocking=True) for t in pinned)  # type: ignore[return-value]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
