"""What an attack raises: functions of (logits, label, target) → (N,), larger is closer to misclassified."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robudget.errors import unknown

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (N, classes), label (N,), target (N,)) → (N,). Untargeted objectives ignore the target."""


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """(N,) z_y − max over the other classes; ≤ 0 where misclassified (or tied)."""
    true = logits.gather(1, label.unsqueeze(1))
    return (true - logits.scatter(1, label.unsqueeze(1), -torch.inf).amax(1, keepdim=True)).squeeze(1)


def ce(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, label, reduction="none")


def ce_targeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return -cross_entropy(logits, target, reduction="none")


def cw(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """−margin (Carlini & Wagner 2017, without the confidence clamp)."""
    return -margin(logits, label)


def dlr(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6); needs 3 classes. Invariant to scale and shift."""
    top = logits.topk(3, dim=1).values
    # Where the label is the largest logit its rival is the second; `margin` finds it either way.
    return -margin(logits, label) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, eq. 7); needs 4 classes."""
    top = logits.topk(4, dim=1).values
    return difference(logits, label, target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def difference(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """z_t − z_y, whose zero is the decision boundary that FAB-T projects onto."""
    chosen = logits.gather(1, torch.stack((target, label), dim=1))
    return chosen[:, 0] - chosen[:, 1]


OBJECTIVES: dict[str, Objective] = {
    "ce": ce,
    "ce-targeted": ce_targeted,
    "cw": cw,
    "dlr": dlr,
    "dlr-targeted": dlr_targeted,
}


def objective(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise unknown("loss", name, OBJECTIVES)
    return OBJECTIVES[name]
