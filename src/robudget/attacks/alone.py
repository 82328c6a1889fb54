"""Any attack alone, as a function: `attack(model, x, y, threat, *, …, noise) -> x_adv`.

Images are float32 (N, C, H, W) in [0, 1], labels int64 (N,). Only images that the model classifies correctly are
attacked. The answer has the same shape and device, lies in the threat's ball and in [0, 1], and is the image itself
where nothing was found. The model's mode, BatchNorm statistics and every `requires_grad` are as before afterwards, also
when the attack raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robudget.attacks.driver import Attack, Found, drive, plan
from robudget.attacks.geometry import GEOMETRY
from robudget.attacks.rng import Noise
from robudget.attacks.victim import Model, Victim, frozen
from robudget.errors import InputError
from robudget.threat import Threat


def alone(
    machine: Callable[[Victim], Attack[Any]],
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    targets: int = 0,
    restarts: int = 1,
    noise: Noise,
    batch_size: int,
    nearest: bool = False,
) -> Tensor:
    """Run one state machine over the images that are classified correctly, verified by the model itself.

    With `nearest` all rows of an image run to their end and the nearest of their examples is returned, else the first.
    """
    check_images(x, y)
    x_adv = x.clone()
    with frozen(model):
        victim = Victim(model)
        logits = clean_logits(victim, x, batch_size)
        images = (logits.argmax(1) == y).nonzero().squeeze(1)
        if not len(images) or threat.eps == 0:
            return x_adv
        drive(
            machine(victim),
            plan(images, logits, targets=min(targets, logits.shape[1] - 1), restarts=restarts),
            x,
            y,
            threat,
            noise=noise,
            verify=lambda at, label: victim.logits(at).argmax(1) != label,
            batch_size=batch_size,
            found=keep_nearest(x_adv, x, threat) if nearest else keep_in(x_adv),
            exhaust=nearest,
        )
    return x_adv


def keep_in(x_adv: Tensor) -> Found:
    """A `found` that writes the examples into x_adv."""

    def found(at: Tensor, examples: Tensor) -> None:
        x_adv[at.to(x_adv.device)] = examples.to(x_adv.device)

    return found


def keep_nearest(x_adv: Tensor, x: Tensor, threat: Threat) -> Found:
    """A `found` that writes the examples into x_adv where they are nearer than what is there (the image: nothing)."""
    best = torch.full((len(x),), torch.inf, device=x.device)
    size = GEOMETRY[threat.norm].distance

    def found(at: Tensor, examples: Tensor) -> None:
        at, examples = at.to(x.device), examples.to(x.device)
        distance = size(examples, x[at])
        nearer = distance < best[at]
        best[at[nearer]], x_adv[at[nearer]] = distance[nearer], examples[nearer]

    return found


def clean_logits(victim: Victim, x: Tensor, batch_size: int) -> Tensor:
    """(N, classes) logits of all images, a batch at a time."""
    return torch.cat([victim.logits(x[i : i + batch_size]) for i in range(0, len(x), batch_size)])


def check_images(x: Tensor, y: Tensor) -> None:
    """Raises InputError unless x is a float32 (N, C, H, W) batch in [0, 1] with N > 0 and y its int64 labels."""
    if x.dim() != 4:
        raise InputError(f"images have shape {tuple(x.shape)} (allowed: (N, C, H, W))")
    if x.dtype != torch.float32:
        raise InputError(f"images are {x.dtype} (allowed: torch.float32 in [0, 1]; divide uint8 by 255)")
    if not len(x):
        raise InputError("there are 0 images (allowed: at least 1)")
    if y.dtype != torch.int64 or y.shape != (len(x),):
        raise InputError(f"labels are {y.dtype} {tuple(y.shape)} (allowed: torch.int64 ({len(x)},))")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        raise InputError(f"images lie in [{low:.4g}, {high:.4g}] (allowed: [0, 1])")
