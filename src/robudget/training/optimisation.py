"""Optimizers, weight decay groups and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import nn

from robudget.errors import InputError, unknown
from robudget.recipe import OptimPart
from robudget.training.sgd import Sgd

# Of torch, or our own; every other name goes to timm.
_OWN = ("sgd", "adam", "adamw")


class Optimizer(Protocol):
    """What the training loop needs of an optimizer; torch's have it."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None: ...
    def step(self) -> object: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def peak_lr(part: OptimPart, batch_size: int) -> float:
    """The recipe's lr at this batch size: linear in it (Goyal et al. 2017), or as given without `lr_batch`."""
    return part.lr if part.lr_batch is None else part.lr * batch_size / part.lr_batch


def lr_at(part: OptimPart, peak: float, step: int, *, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of update `step` (from 0) out of `steps`.

    First a linear warm-up of `warmup_epochs`; at the end `cooldown_epochs` at the schedule's last value; both count
    among `steps`. Between them, by `schedule`: cosine: half a cosine from the peak to `final` × peak; piecewise: ×0.1
    at 50% and again at 75% (Rice et al. 2020); onecycle: up linearly for 40% of the steps and down to 0 (Wong et al.
    2020); constant.
    """
    end = max(1, steps - round(part.cooldown_epochs * steps_per_epoch))
    warmup = min(round(part.warmup_epochs * steps_per_epoch), end - 1)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    # The lowest lr is reached after the last step of the schedule, or held through the cool-down.
    done = min((step - warmup) / (end - warmup), 1.0)
    match part.schedule:
        case "cosine":
            return peak * (part.final + (1 - part.final) * 0.5 * (1 + math.cos(math.pi * done)))
        case "piecewise":
            return peak * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
        case "onecycle":
            return peak * ((done + 1 / (end - warmup)) / 0.4 if done < 0.4 else (1 - done) / 0.6)
        case "constant":
            return peak


def parameter_groups(model: nn.Module, part: OptimPart) -> list[dict[str, Any]]:
    """Weight decay on everything, or not on BatchNorm's and biases (tensors of one dimension) unless `decay_norm`."""
    decayed = [p for p in model.parameters() if part.decay_norm or p.ndim > 1]
    spared = [p for p in model.parameters() if not part.decay_norm and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": part.weight_decay}]
    return [*groups, {"params": spared, "weight_decay": 0.0}] if spared else groups


def build_optimizer(model: nn.Module, part: OptimPart, lr: float) -> Optimizer:
    """`sgd` is our own, `adam` and `adamw` torch's (fused); any other name is timm's. Raises InputError."""
    groups, name = parameter_groups(model, part), part.name.lower()
    if name == "sgd":
        return Sgd(groups, lr=lr, momentum=part.momentum, nesterov=part.nesterov)
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
