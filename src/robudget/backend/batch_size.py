"""Batch sizes and memory: how many images a call takes, and freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robudget.attacks.victim import Model, Victim, ce


def least_size(victim: Victim, x: Tensor, y: Tensor | None, batch_size: int) -> int:
    """The smallest size from which on every probed size answers as the full batch does, bit for bit.

    Libraries choose their kernels by shape, so logits and gradients of one image may differ in their last bits between
    batch sizes; then verdicts would depend on how many images happen to be left. Calls below the size returned are to
    be padded up to it. `batch_size` itself is returned where no smaller one agrees. x, y: any few images and labels;
    y None: only logits are compared, for a model that has no gradient.
    """
    where = torch.arange(batch_size, device=x.device) % len(x)
    x, y = x[where], None if y is None else y[where]
    full = _answers(victim, x, y)
    least = batch_size
    for size in sorted((s for s in _SIZES if s < batch_size), reverse=True):
        # A row's place within the batch matters to small batches, if to any; a look at large ones twice is not cheap.
        for first in {0, batch_size - size} if size <= 64 else {0}:
            rows = slice(first, first + size)
            part = _answers(victim, x[rows], None if y is None else y[rows])
            if not all(torch.equal(a, b[rows]) for a, b in zip(part, full, strict=True)):
                return least
        least = size
    return least


_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)


SIZES = (64, 128, 256, 512)  # of a call on an accelerator: few, so that few kernels are chosen and few graphs made


def physical_sizes(victim: Victim, x: Tensor, y: Tensor | None, most: int) -> tuple[int, ...]:
    """The sizes that calls on an accelerator are padded up to, ascending, the last one being `most`.

    They are those of `SIZES` whose answers are those of `most` images at once, bit for bit. None but `most` where an
    image's answer there depends on its place in the batch. x, y as in `least_size`.
    """
    where = torch.arange(most, device=x.device) % len(x)
    x, y, period = x[where], None if y is None else y[where], len(x)
    full = _answers(victim, x, y)
    if not all(torch.equal(answer[period:], answer[:-period]) for answer in full if len(answer) > period):
        return (most,)

    def agrees(size: int) -> bool:
        part = _answers(victim, x[:size], None if y is None else y[:size])
        return all(torch.equal(a, b[:size]) for a, b in zip(part, full, strict=True))

    return (*(size for size in SIZES if size < most and agrees(size)), most)


def _answers(victim: Victim, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    if y is None:
        return (victim.logits(x),)
    logits, _, gradient = victim.gradient(x, ce, y, y)
    return victim.logits(x), logits, gradient


def layer_outputs(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, torch.Size]]:
    """Each convolution and linear layer that one image of x (N, C, H, W) passes through, with its output's shape."""
    outputs: list[tuple[nn.Module, torch.Size]] = []

    def look(layer: nn.Module, _: object, out: Tensor) -> None:
        outputs.append((layer, out.shape))

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def call_size(model: Model, x: Tensor, batch_size: int, bytes_each: int) -> int:
    """Images a call of an attack: `batch_size`, on a CPU no more than keep a layer's output within its caches.

    A convolution whose output leaves the last cache is read back from memory by the next one: cut so, the reference's
    WideResNet-16-2 was 1.2 times as fast as with 500 images a call. `bytes_each`: of one number. On an accelerator the
    next of `SIZES`.
    """
    if x.device.type != "cpu":
        return next((size for size in SIZES if size >= batch_size), batch_size)
    if not isinstance(model, nn.Module):
        return batch_size
    largest = bytes_each * max((shape.numel() for _, shape in layer_outputs(model, x)), default=0)
    return min(batch_size, max(_CACHE // largest, _FEW)) if largest else batch_size


_CACHE = 8 << 20  # bytes: two such tensors, and weights, in a last cache of 16 MiB and more
_FEW = 16  # below so many images the fixed cost of a call shows


def tile(device: torch.device, batch_size: int) -> int:
    """Images a call when the model as given is asked for its verdicts: always this many, the last call padded, so that
    an answer does not depend on what else is asked. Small where a padded image costs as much as a real one."""
    return min(batch_size, 8 if device.type == "cpu" else 64)


EVERY = slice(None)


@dataclass
class Physical:
    """The physical batch: how many images one pass of a training takes at once, with the same result; 0 = the whole
    batch. Lowered where the memory does not hold more."""

    images: int = 0

    def parts(self, n: int) -> list[slice]:
        """Of a batch of n."""
        if not self.splits(n):
            return [EVERY]
        return [slice(first, first + self.images) for first in range(0, n, self.images)]

    def splits(self, n: int) -> bool:
        return 0 < self.images < n


def training_bytes(parameters: int, copies: int, images: int, activation_bytes: int) -> int:
    """What a training holds: `copies` of the weights in float32 (of themselves, gradients, momentum, average), and what
    an update keeps of `images` images for its backward pass."""
    return copies * 4 * parameters + images * activation_bytes


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a GPU, with what torch's allocator holds and nothing uses; None on a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(unused)


def validation_size(batch_size: int) -> int:
    """Images a call of a validation, which keeps nothing for a backward pass through the weights, so more fit."""
    return max(batch_size, _VALIDATION)


_VALIDATION = 256


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for the rest of this process. No result depends on it; memory stays at its peak.

    A step of a training or of an attack frees and allocates the same megabytes again and again. By default glibc
    returns large blocks at once, so that the system maps and clears every activation's pages anew: a tenth of a
    training step on a CPU, and for small networks more than their arithmetic.

    False where there is no glibc (other systems, other C libraries).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Older versions of glibc take no more than 32 MiB.
    threshold = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(threshold) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
