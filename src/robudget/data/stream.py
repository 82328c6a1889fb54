"""The endless stream of training batches: real and synthetic images, mixed at a fixed share of every batch.

Batch `t` is a function of (seed, t) alone. Nothing has to be remembered to go on from any step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robudget.data.dataset import Split
from robudget.data.keyed import generator_for
from robudget.errors import InputError


class Passes:
    """Row numbers of one source: pass after pass over all of it, each in a fresh order, without replacement within."""

    def __init__(self, size: int, take: int, *, seed: int, name: str) -> None:
        self._size, self._take, self._seed, self._name = size, take, seed, name
        self._orders: dict[int, Tensor] = {}

    def rows(self, step: int) -> Tensor:
        """int64 (take,) row numbers of batch `step`."""
        first, parts = step * self._take, []
        while first < (step + 1) * self._take:
            number, offset = divmod(first, self._size)
            part = self._order(number)[offset : offset + (step + 1) * self._take - first]
            parts.append(part)
            first += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _order(self, number: int) -> Tensor:
        if number not in self._orders:
            # A batch touches two passes at most at a time, unless the source is smaller than its share of a batch.
            self._orders = {n: order for n, order in self._orders.items() if n == number - 1}
            generator = generator_for("cpu", self._seed, self._name, number)
            self._orders[number] = torch.randperm(self._size, generator=generator)
        return self._orders[number]


@dataclass(frozen=True)
class Batch:
    """`images` uint8 (N, C, H, W) and `labels` int64 (N,) on the device; the first `real` rows are real images."""

    images: Tensor
    labels: Tensor
    real: int


class Stream:
    """Batches of `batch_size` images on `device`, a `share` of them synthetic.

    Images that fit are moved to the device once; memory-mapped ones are read row by row. Raises InputError when the
    batch asks for more images than a source has.
    """

    def __init__(
        self,
        real: Split,
        synthetic: Split | None,
        *,
        batch_size: int,
        share: float,
        seed: int,
        device: torch.device,
        resident: bool = True,
    ) -> None:
        generated = round(share * batch_size) if synthetic is not None else 0
        if generated >= batch_size:
            raise InputError(
                f"synthetic.fraction = {share} leaves no real image in a batch of {batch_size} (allowed: at least one)"
            )
        self.real = batch_size - generated
        self.batch_size = batch_size
        self._device = device
        self._sources = []
        for name, split, take in (("real", real, self.real), ("synthetic", synthetic, generated)):
            if split is None or take == 0:
                continue
            if take > len(split):
                raise InputError(
                    f"batch_size = {batch_size} takes {take} {name} images at once, but there are only {len(split)}"
                )
            held = Split(split.images.to(device), split.labels.to(device)) if resident else split
            self._sources.append((held, Passes(len(split), take, seed=seed, name=name)))

    def batch(self, step: int) -> Batch:
        """Batch number `step`, counted from 0."""
        images, labels = [], []
        for split, passes in self._sources:
            rows = passes.rows(step).to(split.labels.device)
            images.append(split.images.index_select(0, rows).to(self._device))
            labels.append(split.labels.index_select(0, rows).to(self._device))
        return Batch(
            images[0] if len(images) == 1 else torch.cat(images),
            labels[0] if len(labels) == 1 else torch.cat(labels),
            self.real,
        )
