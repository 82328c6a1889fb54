"""What would make a robust accuracy not worth its digits: each check is a named finding with its evidence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robudget.attacks.victim import Model
from robudget.errors import InputError
from robudget.evaluation.verdicts import Finding, Spent, Verdicts


def of_mode(model: Model) -> list[Finding]:
    return []


def logits_of(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The model's answer to a few images. Raises InputError unless it is logits (N, classes) that know every label."""
    with torch.no_grad():
        z: Any = model(x)
    if not isinstance(z, Tensor):
        raise InputError(f"the model returns a {type(z).__name__} (allowed: a tensor of logits, (N, classes))")
    if z.dim() != 2 or len(z) != len(x) or z.shape[1] < 2 or not z.is_floating_point():
        raise InputError(
            f"the model returns {z.dtype} {tuple(z.shape)} for {len(x)} images "
            f"(allowed: float logits ({len(x)}, classes))"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= z.shape[1]:
        raise InputError(
            f"labels lie in [{low}, {high}] but the model has {z.shape[1]} classes (allowed: 0 to {z.shape[1] - 1})"
        )
    return z.float()


def few_classes(classes: int, note: str) -> Finding:
    return Finding("few-classes", note, {"classes": classes})


def before(run: Any, mode: list[Finding], spent: Spent) -> list[Finding]:
    return mode


def after(verdicts: Verdicts, x: Tensor) -> list[Finding]:
    return []
