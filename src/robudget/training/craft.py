"""Making adversarial examples during training: the inner loop that takes nearly all of the time.

Same mathematics as `robudget.attacks.pgd`; what differs is that noise comes from a generator on the device, bounds are
computed once, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from robudget.attacks.geometry import GEOMETRY
from robudget.threat import Threat

GAUSSIAN = 0.001  # TRADES starts from x + 0.001·N(0, 1) (Zhang et al. 2019, released code)

Objective = Callable[[Tensor], Tensor]
"""Logits (N, classes) to the sum over the batch of what the adversary raises."""


class CraftMode:
    """Puts a model into crafting mode and back: no gradient for weights, and BatchNorm as asked.

    `eval`: the whole model in eval mode. `batch`: the same, but BatchNorm normalises by the batch at hand; its running
    statistics are not touched (TRADES in the paper). On leaving, every module's mode and every `requires_grad` are what
    they were, also after an exception. The lists are made once: a model of 100 modules is switched in microseconds.
    """

    def __init__(self, model: nn.Module, batchnorm: str) -> None:
        self._modules = list(model.modules())
        self._norms = [m for m in self._modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._parameters = list(model.parameters())
        self._batch = batchnorm == "batch"

    @contextmanager
    def __call__(self) -> Iterator[None]:
        modes = [m.training for m in self._modules]
        tracked = [m.track_running_stats for m in self._norms]
        learnt = [p for p in self._parameters if p.requires_grad]
        try:
            for module in self._modules:
                module.training = False
            if self._batch:
                for norm in self._norms:
                    norm.training, norm.track_running_stats = True, False
            for parameter in learnt:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in zip(self._modules, modes, strict=True):
                module.training = mode
            for norm, track in zip(self._norms, tracked, strict=True):
                norm.track_running_stats = track
            for parameter in learnt:
                parameter.requires_grad_(True)


def cross_entropy(labels: Tensor) -> Objective:
    """The sum of cross-entropies against hard labels (N,): what AT, MART and validation raise."""
    return lambda logits: F.cross_entropy(logits, labels, reduction="sum")


def divergence(clean_logits: Tensor) -> Objective:
    """The sum of KL(clean ‖ adversarial) (N, classes): what TRADES raises (Zhang et al. 2019, equation 5)."""
    log_p = F.log_softmax(clean_logits.detach(), dim=1)
    return lambda logits: F.kl_div(F.log_softmax(logits, dim=1), log_p, reduction="sum", log_target=True)


def start_of(x: Tensor, threat: Threat, start: str, generator: torch.Generator | None) -> Tensor:
    """`uniform`: a uniform draw from the ball; `gaussian`: TRADES' small noise; `none`: x itself. A new tensor."""
    if start == "uniform":
        return GEOMETRY[threat.norm].inside(x, threat.eps, generator)
    if start == "gaussian":
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return GEOMETRY[threat.norm].project(x + GAUSSIAN * noise, x, threat.eps)
    return x.clone()


def craft(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    objective: Objective,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    start: str,
    generator: torch.Generator | None,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """PGD (Madry et al. 2018): x_adv like x (N, C, H, W), in the ball of `threat` around x and in [0, 1].

    Call it inside a `CraftMode`. Each step is one forward and one backward pass of the model, under `autocast`; logits,
    loss and images stay in float32.
    """
    geometry = GEOMETRY[threat.norm]
    x_adv = start_of(x, threat, start, generator).contiguous(memory_format=_format(x))
    low, high = (x - threat.eps).clamp_(min=0), (x + threat.eps).clamp_(max=1)
    for _ in range(steps):
        gradient = input_gradient(model, x_adv, objective, autocast)
        if threat.norm == "linf":
            # In place, against bounds made once; equal to geometry.project to the last bit.
            torch.clamp(x_adv.add_(gradient.sign_(), alpha=step_size), low, high, out=x_adv)
        else:
            x_adv = geometry.project(x_adv.add_(geometry.steepest(gradient), alpha=step_size), x, threat.eps)
    return x_adv


def input_gradient(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    objective: Objective,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """The gradient of `objective` at x, a float32 tensor of x's shape that the caller may overwrite."""
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        with autocast():
            logits = model(leaf)
        (gradient,) = torch.autograd.grad(objective(logits.float()), leaf)
    return gradient


def _format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
