"""Optimizers, weight decay groups and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from robudget.errors import InputError, unknown
from robudget.recipe import OptimPart

# What torch updates with one fused kernel; every other name goes to timm.
_OWN = ("sgd", "adam", "adamw")


def peak_lr(part: OptimPart, batch_size: int) -> float:
    """The recipe's lr at this batch size: linear in it (Goyal et al. 2017), or as given without `lr_batch`."""
    return part.lr if part.lr_batch is None else part.lr * batch_size / part.lr_batch


def lr_at(part: OptimPart, peak: float, step: int, *, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of update `step` (from 0) out of `steps`.

    cosine: half a cosine from the peak to 0; piecewise: ×0.1 at 50% and again at 75% (Rice et al. 2020); onecycle: up
    linearly for 40% of the steps and down to 0 (Wong et al. 2020); constant. Before that a linear warm-up of
    `warmup_epochs`, whose steps count among `steps`.
    """
    warmup = min(round(part.warmup_epochs * steps_per_epoch), steps - 1)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    match part.schedule:
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
        case "piecewise":
            return peak * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
        case "onecycle":
            return peak * ((done + 1 / (steps - warmup)) / 0.4 if done < 0.4 else (1 - done) / 0.6)
        case "constant":
            return peak


def parameter_groups(model: nn.Module, part: OptimPart) -> list[dict[str, object]]:
    """Weight decay on everything, or not on BatchNorm's and biases (tensors of one dimension) unless `decay_norm`."""
    decayed = [p for p in model.parameters() if part.decay_norm or p.ndim > 1]
    spared = [p for p in model.parameters() if not part.decay_norm and p.ndim <= 1]
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": part.weight_decay}]
    return [*groups, {"params": spared, "weight_decay": 0.0}] if spared else groups


def build_optimizer(model: nn.Module, part: OptimPart, lr: float) -> torch.optim.Optimizer:
    """`sgd`, `adam` and `adamw` are torch's (fused); any other name is timm's. Raises InputError for an unknown one."""
    groups, name = parameter_groups(model, part), part.name.lower()
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=part.momentum, nesterov=part.nesterov, fused=True)
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(groups, lr=lr, fused=True)
    from timm.optim._optim_factory import create_optimizer_v2, list_optimizers

    known = [str(other) for other in list_optimizers()]
    if name not in known:
        raise unknown("optimizer", part.name, [*_OWN, *known])
    try:
        optimizer = create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, momentum=part.momentum)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise InputError(f"optim.name = {part.name!r} can't be used here: {error}") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optim.name = {part.name!r} is not a plain optimizer")
    return optimizer
