"""Small modules that several architectures share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robudget.errors import InputError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Normalize(nn.Module):
    """(x − mean) / std per channel, for images (N, C, H, W) in [0, 1].

    The first layer of every model here, so that attacks work in image units and need no constants. Mean and std are
    buffers: they are saved with the weights, and weights loaded into a fresh model bring their own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or any(s <= 0 for s in std):
            raise InputError(f"normalisation needs one mean and one positive std per channel, got {mean} and {std}")
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor([float(s) for s in std]).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Normalized(nn.Module):
    """Any classifier of normalised images behind a `Normalize`: images in [0, 1] to logits."""

    def __init__(self, normalize: Normalize, body: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(self.normalize(x))
        return logits


def kaiming(model: nn.Module) -> None:
    """He et al. 2015, fan-out, for convolutions; BatchNorm to (1, 0); a linear layer's bias to 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
