"""What the attacks compute in: a copy of the model that is cheaper to run and says the same."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from robudget.attacks.victim import Model
from robudget.backend.batch_size import layer_outputs
from robudget.backend.folding import fold
from robudget.errors import unknown

PRECISIONS = ("auto", "float32", "bfloat16")


# Below this many FLOPs an image, a network is bound by the cost of calls, which low precision does not lower.
SMALL = 20e6


def resolve(asked: str, device: torch.device, model: Model, x: Tensor) -> str:
    """`float32` or `bfloat16`; `auto` decides from the device's flags and the model's FLOPs, never from a timing."""
    if asked not in PRECISIONS:
        raise unknown("precision", asked, PRECISIONS)
    if asked != "auto":
        return asked
    return "bfloat16" if has_bfloat16(device) and _flops(model, x) >= SMALL else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 in hardware (not by emulation)?"""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = Path("/proc/cpuinfo")
    return device.type == "cpu" and flags.exists() and not _BF16_FLAGS.isdisjoint(flags.read_text().split())


_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def _flops(model: Model, x: Tensor) -> float:
    """Of one image's convolutions and linear layers, a multiply-add being 2; 0 for a plain function."""
    if not isinstance(model, nn.Module):
        return 0.0
    return sum(
        2.0 * cast(Tensor, layer.weight).numel() * shape.numel() / (shape[1] if len(shape) == 4 else shape[-1])
        for layer, shape in layer_outputs(model, x)
    )


def crafting_copy(model: Model, x: Tensor, precision: str) -> Model:
    """The cheapest copy whose answers agree with the model's on images x (N, C, H, W), or the model itself.

    Successes are verified on the model as given whatever this returns; a copy that agreed on no more than x would cost
    attack strength, never a false success.
    """
    if not isinstance(model, nn.Module):
        return model
    low = precision == "bfloat16"
    dtype = torch.bfloat16 if low else torch.float32
    channels_last = x.shape[2] * x.shape[3] >= 256
    truth = _answers(model, x)
    # Rounding moves a few ReLUs across zero, which shows in gradients long before it does in logits.
    tolerance = (0.03, 0.3) if low else (1e-3, 1e-2)
    try:
        # A traced graph prints what fails in it; here a failure only means that the model is run as it is.
        with redirect_stderr(io.StringIO()):
            copy = fold(model, x[:2], dtype, channels_last)
            agrees = _agree(_answers(copy, x), truth, tolerance)
    # Tracing a stranger's code can fail in as many ways as there are strangers; the model itself always works.
    except Exception:
        agrees = False
    if agrees:
        return copy
    return _autocast(model, x.device.type) if low else model


def _autocast(model: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            z: Tensor = model(x.contiguous(memory_format=torch.channels_last))
        return z

    return call


def _answers(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and a gradient of x; few images at a time, since nobody knows yet how many fit into memory."""
    logits, gradients = [], []
    for part in x.split(8):  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            z = model(leaf).float()
            (gradient,) = torch.autograd.grad((z - z.detach().mean(1, keepdim=True)).square().sum(), leaf)
        logits.append(z.detach())
        gradients.append(gradient)
    return torch.cat(logits), torch.cat(gradients)


def _agree(ours: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], tolerances: tuple[float, float]) -> bool:
    for mine, theirs, tolerance in zip(ours, truth, tolerances, strict=True):
        error = (mine - theirs).flatten(1).norm(dim=1)
        size = theirs.flatten(1).norm(dim=1)
        if not bool((error <= tolerance * size + 1e-12).float().mean() > 0.9):
            return False
    return True
