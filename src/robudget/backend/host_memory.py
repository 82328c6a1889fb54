"""Activations that wait for the backward pass in the CPU's memory instead of the GPU's."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def kept_on_host(n: int) -> AbstractContextManager[object]:
    """Inside, what autograd saves of a batch of n images (tensors of n rows) is copied to the CPU's memory, and back
    when the backward pass needs it: the same bits in the same layout. Weights stay where they are.

    Both copies are queued in the stream that computes, so that nothing waits for them but the computation itself.
    """

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.ndim < 2 or tensor.shape[0] != n or not _elsewhere(tensor):
            return tensor.device, tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available())
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _elsewhere(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"
