"""Clean accuracy and robust accuracy under PGD, on images that training does not see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robudget.data.dataset import to_unit
from robudget.data.keyed import generator_for
from robudget.threat import Threat
from robudget.training.craft import CraftMode, craft, cross_entropy


@dataclass(frozen=True)
class Validation:
    """Fractions over `images` images; an image is robust if it is classified correctly before and after PGD."""

    clean: float
    robust: float
    images: int


def validate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    seed: int,
    batch_size: int,
    memory_format: torch.memory_format,
    autocast: Callable[[], AbstractContextManager[object]],
    calls: Counter[str],
) -> Validation:
    """PGD with one uniform start on uint8 `images` (N, C, H, W); images that are wrong already are not attacked.

    The noise depends on `seed` and the batch alone, so that epochs are comparable. Passes are added to `calls`. The
    model is used in eval mode and left as it was.
    """
    clean = robust = 0
    with CraftMode(model, "eval")():
        for index, first in enumerate(range(0, len(labels), batch_size)):
            x = to_unit(images[first : first + batch_size]).contiguous(memory_format=memory_format)
            y = labels[first : first + batch_size]
            with torch.no_grad(), autocast():
                right = model(x).argmax(1) == y
            calls["validation_forward"] += len(y)
            x, y = x[right], y[right]
            clean += len(y)
            if len(y) == 0:
                continue
            x_adv = craft(
                model,
                x.contiguous(memory_format=memory_format),
                cross_entropy(y),
                threat,
                steps=steps,
                step_size=step_size,
                start="uniform",
                generator=generator_for(x.device, seed, "validation", index),
                autocast=autocast,
            )
            with torch.no_grad(), autocast():
                robust += int((model(x_adv).argmax(1) == y).sum())
            calls["validation_forward"] += (steps + 1) * len(y)
            calls["validation_backward"] += steps * len(y)
    return Validation(clean / len(labels), robust / len(labels), len(labels))
