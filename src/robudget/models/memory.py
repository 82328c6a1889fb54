"""Less memory for more work: activations recomputed in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robudget.errors import InputError
from robudget.models.layers import Normalized

_NORM = nn.modules.batchnorm._BatchNorm


def run_block(block: nn.Module, x: Tensor, *, recompute: bool) -> Tensor:
    """`block(x)`, its inner activations kept for the backward pass or computed again in it.

    The second forward must not count in BatchNorm's running statistics: the batch has been seen once.
    """
    if not recompute or not torch.is_grad_enabled():
        out: Tensor = block(x)
        return out
    norms = [module for module in block.modules() if isinstance(module, _NORM)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _untracked(norms)

    again: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return again


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Turn recomputation on. Raises InputError for a model that can't: one of timm's without the switch, or with
    BatchNorm, whose statistics timm would update twice."""
    if hasattr(model, "checkpointing"):
        setattr(model, "checkpointing", True)  # noqa: B010 (nn.Module's attributes are typed as modules and tensors)
        return
    switch: Callable[[bool], None] | None = None
    if isinstance(model, Normalized) and not any(isinstance(m, _NORM) for m in model.modules()):
        switch = getattr(model.body, "set_grad_checkpointing", None)
    if switch is None:
        raise InputError(f"activation checkpointing is not available for model {name!r}")
    try:
        switch(True)
    except AssertionError:
        raise InputError(f"activation checkpointing is not available for model {name!r}") from None


@contextmanager
def _untracked(norms: list[_NORM]) -> Iterator[None]:
    # Momentum 0 leaves the running statistics exactly as they are, and saves the same tensors as the first forward did.
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
