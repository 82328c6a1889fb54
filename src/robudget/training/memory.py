"""A step that the memory does not hold: again with half the images at once, which changes nothing but the speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robudget.attacks.victim import out_of_memory
from robudget.errors import RunFailed
from robudget.training.distributed import World
from robudget.training.optimisation import Optimizer
from robudget.training.physical import Physical
from robudget.training.step import Outcome, Step

SMALLEST = 4  # images at once


class FittingStep:
    """`step`, and where the memory does not hold it, again with half the images at once. `calls` counts the images of
    the attempt that succeeds alone. `notify` is told.

    Raises RunFailed where that can't be: with other processes, which are in the middle of the step, with weights that
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
                raise RunFailed(
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
