"""Which numbers a training computes in: float32, or bfloat16 autocast with channels-last memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from robudget.errors import InputError

Autocast = Callable[[], AbstractContextManager[object]]

_WIDE = 32  # channels from which bfloat16 channels-last convolutions beat float32 on a CPU that has them


@dataclass(frozen=True)
class Precision:
    """`name` is what `auto` came to. Weights, logits, losses and images stay float32 in either."""

    name: Literal["float32", "bfloat16"]
    device: torch.device

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.name == "bfloat16" else torch.contiguous_format

    @property
    def autocast(self) -> Autocast:
        if self.name == "float32":
            return nullcontext
        return lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)


def resolve(asked: str, device: torch.device, model: nn.Module) -> Precision:
    """`auto`: bfloat16 where the device multiplies it faster (CUDA from Ampere on; CPUs with AVX512-BF16 or AMX) and
    the model is wide enough to gain, else float32. Never decided by a timing. Raises InputError where bfloat16 is asked
    for and missing.
    """
    able = _has_bfloat16(device)
    if asked == "bfloat16" and not able:
        raise InputError(f"precision = 'bfloat16' on {device}: not supported there (allowed: float32, auto)")
    if asked != "auto":
        return Precision("bfloat16" if asked == "bfloat16" else "float32", device)
    wide = max((p.shape[0] for p in model.parameters() if p.ndim > 1), default=0) >= _WIDE
    return Precision("bfloat16" if able and wide else "float32", device)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
