"""Which physical batch sizes give an image bit-identical answers: found by asking the model, not by timing it."""

from __future__ import annotations

import torch
from torch import Tensor

from robudget.attacks.objective import ce
from robudget.attacks.victim import Victim


def least_size(victim: Victim, x: Tensor, y: Tensor, batch_size: int) -> int:
    """The smallest size from which on every probed size answers as the full batch does, bit for bit.

    Libraries choose their kernels by shape, so logits and gradients of one image may differ in their last bits between
    batch sizes; then verdicts would depend on how many images happen to be left. Calls below the size returned are to
    be padded up to it. `batch_size` itself is returned where no smaller one agrees. x, y: any few images and labels.
    """
    where = torch.arange(batch_size, device=x.device) % len(x)
    x, y = x[where], y[where]
    full = _answers(victim, x, y)
    sizes = sorted({s for s in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if s < batch_size})
    sizes += sorted({batch_size * k // 8 for k in range(1, 8)} - set(range(65)))
    least = batch_size
    for size in reversed(sizes):
        for rows in (slice(0, size), slice(batch_size - size, batch_size)):
            if not all(torch.equal(a, b[rows]) for a, b in zip(_answers(victim, x[rows], y[rows]), full, strict=True)):
                return least
        least = size
    return least


def _answers(victim: Victim, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, _, gradient = victim.gradient(x, ce, y, y)
    return victim.logits(x), logits, gradient
