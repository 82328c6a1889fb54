"""How many images the memory holds at once: by an estimate at first, and half as many where a step shows it was wrong.

Neither changes anything of a training but its speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robudget.attacks.victim import out_of_memory
from robudget.backend.batch_size import Physical, free_bytes, training_bytes
from robudget.backend.precision import Precision
from robudget.errors import OutOfMemory
from robudget.losses import LOSSES
from robudget.recipe import Recipe
from robudget.training.distributed import World
from robudget.training.optimisation import Optimizer
from robudget.training.step import Outcome, Step

SMALLEST = 4  # images at once


def images_that_fit(batch: int, images: int, activation_bytes: int, parameters: int, free: int | None) -> int:
    """The physical batch that `free` bytes hold: 0 for the whole `batch`, else the first of its halves, quarters, …, at
    least SMALLEST. An update takes `images` images through the model for each image of the batch and keeps
    `activation_bytes` of each; gradients and momentum of the parameters are still to come."""
    size = batch
    while free is not None and training_bytes(parameters, 2, size * images, activation_bytes) > free:
        if size // 2 < SMALLEST:
            break
        size //= 2
    return 0 if size == batch else size


def chosen_batch(
    recipe: Recipe,
    batch: int,
    activation_bytes: int,
    model: nn.Module,
    precision: Precision,
    notify: Callable[[str], None],
) -> int:
    """The physical batch for `batch` images a process on the model's device, 0 for all; `notify` is told of a smaller
    one. `activation_bytes`: of one image in float32."""
    free = free_bytes(precision.device)
    if precision.name == "bfloat16":
        activation_bytes //= 2
    parameters = sum(p.numel() for p in model.parameters())
    size = images_that_fit(batch, LOSSES[recipe.loss].images, activation_bytes, parameters, free)
    if free is not None and size:
        notify(f"{free / 1e9:.1f} GB are free, too few for {batch} images at once: going on with {size}")
    return size


class FittingStep:
    """`step`, and where the memory does not hold it, again with half the images at once. `calls` counts the images of
    the attempt that succeeds alone. `notify` is told.

    Raises OutOfMemory where that can't be: with other processes, which are in the middle of the step, with weights that
    have changed already, and at the smallest size.
    """

    def __init__(
        self,
        step: Step,
        model: nn.Module,
        optimizer: Optimizer,
        physical: Physical,
        *,
        world: World,
        calls: Counter[str],
        notify: Callable[[str], None],
    ) -> None:
        self._step, self._optimizer, self._physical = step, optimizer, physical
        self._world, self._calls, self._notify = world, calls, notify
        self._buffers = [buffer.detach() for buffer in model.buffers()]
        self._before = [buffer.clone() for buffer in self._buffers]

    def __call__(self, x: Tensor, labels: Tensor, target: Tensor, number: int) -> Outcome:
        torch._foreach_copy_(self._before, self._buffers)
        while True:
            calls = Counter(self._calls)
            try:
                return self._step(x, labels, target, number)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                cause = str(error).strip().splitlines()[0][:120]
            # Only here has the error gone, whose traceback holds the activations.
            images = self._physical.images or len(x)
            half = images // 2
            if self._world.size > 1 or self._step.applied or self._step.delta is not None or half < SMALLEST:
                smaller = f"physical_batch={half}, " if half >= SMALLEST else ""
                raise OutOfMemory(
                    f"out of memory at step {number} with {images} images at once: {cause}; "
                    f"try {smaller}checkpointing=true or a smaller model"
                )
            self._physical.images = half
            self._calls.clear()
            self._calls.update(calls)
            torch._foreach_copy_(self._buffers, self._before)
            self._optimizer.zero_grad()
            if self._step.graphs is not None:
                self._step.graphs.clear()
            if x.device.type == "cuda":
                torch.cuda.empty_cache()
            self._notify(f"out of memory with {images} images at once, going on with {half}: the same training, slower")
