"""From the stream of uint8 images to what a step trains on: augmented, mixed, in [0, 1], with its targets."""

from __future__ import annotations

import torch
from torch import Tensor

from robudget import losses
from robudget.data.augment import crop_flip, cutmix, randaugment
from robudget.data.dataset import to_unit
from robudget.data.keyed import generator_for
from robudget.data.stream import Prepared, Stream
from robudget.recipe import Recipe
from robudget.training.distributed import World


class Batches:
    """`batches(step)` → this process's (images float32 in [0, 1], hard labels, what the loss is measured against).

    A function of (recipe, step): nothing is remembered between calls. CutMix pairs images within a process; everything
    else is the same whatever the number of processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        classes: int,
        *,
        device: torch.device,
        world: World,
        memory_format: torch.memory_format,
    ) -> None:
        self._recipe, self._classes, self._device, self._world = recipe, classes, device, world
        self._format = memory_format
        self._stream = Stream(
            prepared.real,
            prepared.synthetic,
            rows=prepared.rows,
            classes=classes,
            batch_size=recipe.batch_size,
            share=recipe.synthetic.share,
            seed=recipe.seed,
            device=device,
            mine=world.mine,
        )

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        part, total, mine = self._recipe.data, self._recipe.batch_size, self._world.mine
        batch = self._stream.batch(step)
        generator = generator_for(self._device, self._recipe.seed, "augment", step)
        images = crop_flip(batch.images, crop=part.crop, flip=part.flip, generator=generator, rows=mine, total=total)
        if part.randaugment:
            images = randaugment(images, part.randaugment, generator=generator, rows=mine, total=total)
        labels = batch.labels
        target = labels if batch.soft is None else batch.soft
        if part.cutmix:
            images, target = cutmix(images, losses.smooth(target, self._classes, 0.0), generator=generator)
            labels = target.argmax(1)  # the adversary attacks the label that covers most of the image
        if self._recipe.label_smoothing:
            target = losses.smooth(target, self._classes, self._recipe.label_smoothing)
        return to_unit(images).contiguous(memory_format=self._format), labels, target
