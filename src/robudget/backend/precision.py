"""Which numbers a training and an attack compute in: float32, or bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from robudget.backend.batch_size import layer_outputs
from robudget.errors import InputError, unknown

Name = Literal["float32", "bfloat16"]
Autocast = Callable[[], AbstractContextManager[object]]
PRECISIONS = ("auto", "float32", "bfloat16")

_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them, on x86 and on Arm
_MIN_CHANNELS = 32
_MIN_FLOPS_PER_IMAGE = 20e6


@dataclass(frozen=True)
class Precision:
    """Weights, logits, losses and images stay float32 in either; bfloat16 is autocast with channels-last memory."""

    name: Name
    device: torch.device

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.name == "bfloat16" else torch.contiguous_format

    @property
    def autocast(self) -> Autocast:
        if self.name == "float32":
            return nullcontext
        return lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)


@contextmanager
def float32_as(*, tf32: bool) -> Iterator[None]:
    """What "float32" multiplies in on CUDA, inside: IEEE's 24-bit significand, or TensorFloat-32's 11 bits (faster).

    By torch's default convolutions use TensorFloat-32 and matrix products do not. No other device is concerned.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        before = cudnn.allow_tf32, matmul.allow_tf32
    except RuntimeError:  # the user has set torch's newer switches, which the older ones then refuse to sum up
        with _newer_switches("tf32" if tf32 else "ieee"):
            yield
        return
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@contextmanager
def _newer_switches(value: str) -> Iterator[None]:
    switches: tuple[Any, ...] = (getattr(torch.backends.cudnn, "conv"), torch.backends.cuda.matmul)  # noqa: B009
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = value
        yield
    finally:
        for switch, old in zip(switches, before, strict=True):
            switch.fp32_precision = old


def resolve(asked: str, device: torch.device, gains: Callable[[], bool]) -> Precision:
    """What `asked` comes to: what it says, or for `auto` bfloat16 where the device multiplies it in hardware and the
    work `gains` from it (`gains_in_training`, `gains_in_attacks`), else float32. Never decided by a timing.
    """
    if asked not in PRECISIONS:
        raise unknown("precision", asked, PRECISIONS)
    if asked == "auto":
        asked = "bfloat16" if has_bfloat16(device) and gains() else "float32"
    return Precision(cast(Name, asked), device)


def check_training(asked: str, device: torch.device) -> None:
    """Raises InputError where a training asks for bfloat16 and the device has no kernels for it at all. (An attack may:
    what it finds is verified in float32.) oneDNN emulates it on CPUs with AVX-512, slowly but rightly."""
    emulated = device.type == "cpu" and torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if asked == "bfloat16" and not (has_bfloat16(device) or emulated):
        raise InputError(f"precision = 'bfloat16' on {device}: not supported there (allowed: float32, auto)")


def has_bfloat16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 in hardware, not by emulation? (CUDA from Ampere on, CPUs by their flags.)"""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = Path("/proc/cpuinfo")
    if device.type != "cpu" or not torch._C._has_mkldnn or not flags.exists():
        return False
    return not _CPU_FLAGS.isdisjoint(flags.read_text().split())


# A small network is bound by the cost of its calls, which low precision does not lower. Where it begins to pay differs,
# because what it is compared with does: an attack in float32 runs on a folded copy, whose calls cost a fraction.


def gains_in_training(model: nn.Module) -> bool:
    """Against torch's own float32 layers, bfloat16 convolutions in channels-last memory pay from 32 channels on."""
    return max((p.shape[0] for p in model.parameters() if p.ndim > 1), default=0) >= _MIN_CHANNELS


def gains_in_attacks(model: object, x: Tensor) -> bool:
    """Against the folded float32 copy, bfloat16 pays from 20 MFLOP an image (N, C, H, W) on; 0 for a plain function."""
    if not isinstance(model, nn.Module):
        return False
    flops = sum(
        2.0 * cast(Tensor, layer.weight).numel() * shape.numel() / (shape[1] if len(shape) == 4 else shape[-1])
        for layer, shape in layer_outputs(model, x)
    )
    return flops >= _MIN_FLOPS_PER_IMAGE
