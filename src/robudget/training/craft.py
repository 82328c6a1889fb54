"""Making adversarial examples during training: the inner loop that takes nearly all of the time.

Same mathematics as `robudget.attacks.pgd`; what differs is that noise comes from a generator on the device, bounds are
computed once, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robudget.attacks.geometry import GEOMETRY
from robudget.backend.preact_folding import Folded
from robudget.backend.precision import Autocast, Precision
from robudget.models.preact import PreActNet
from robudget.recipe import Recipe
from robudget.threat import Threat
from robudget.training.distributed import World

GAUSSIAN = 0.001  # TRADES starts from x + 0.001·N(0, 1) (Zhang et al. 2019, released code)

Model = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor], Tensor]
"""Logits (N, classes) to the sum over the batch of what the adversary raises."""


@dataclass(frozen=True)
class Adversary:
    """PGD's parameters. `reach`: the radius of the start as a multiple of ε. `bounded`: project onto the ball; without
    it only onto [0, 1]."""

    threat: Threat
    steps: int
    step_size: float
    start: str = "uniform"
    reach: float = 1.0
    bounded: bool = True


def adversary_of(recipe: Recipe) -> Adversary:
    """Who the recipe trains against.

    FGSM-RS (Wong et al. 2020): one step of 1.25·ε from a uniform start, projected. N-FGSM (de Jorge et al. 2022): one
    step of ε from uniform noise of radius 2·ε, not projected. A `step_size` in the recipe goes before these.
    """
    threat, part = recipe.threat.threat(), recipe.craft
    if recipe.loss == "fgsm-rs":
        return Adversary(threat, 1, part.step_size or 1.25 * threat.eps)
    if recipe.loss == "n-fgsm":
        return Adversary(threat, 1, part.step_size or threat.eps, reach=2.0, bounded=False)
    return Adversary(threat, part.steps, part.step_size_for(threat.eps), part.start)


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


def victim_of(model: nn.Module, precision: Precision, batchnorm: str) -> Callable[[], tuple[Model, Autocast]]:
    """What to attack, asked anew for every batch, since its weights change: (model, autocast).

    In bfloat16 and eval mode a WideResNet (any PreActNet) is attacked through a folded copy, which has fewer
    operations.
    """
    if (
        isinstance(model, PreActNet)
        and not model.checkpointing
        and precision.name == "bfloat16"
        and batchnorm == "eval"
    ):
        folded = Folded(model, torch.bfloat16)

        def fresh() -> tuple[Model, Autocast]:
            folded.refresh()
            return folded, nullcontext

        return fresh
    return lambda: (model, precision.autocast)


def cross_entropy(labels: Tensor) -> Objective:
    """The sum of cross-entropies against hard labels (N,): what AT, MART and validation raise."""
    return lambda logits: F.cross_entropy(logits, labels, reduction="sum")


def divergence(clean_logits: Tensor) -> Objective:
    """The sum of KL(clean ‖ adversarial) (N, classes): what TRADES raises (Zhang et al. 2019, equation 5)."""
    log_p = F.log_softmax(clean_logits.detach(), dim=1)
    return lambda logits: F.kl_div(F.log_softmax(logits, dim=1), log_p, reduction="sum", log_target=True)


def start_of(x: Tensor, adversary: Adversary, generator: torch.Generator | None, world: World) -> Tensor:
    """`uniform`: a uniform draw from the ball; `gaussian`: TRADES' small noise; `none`: x itself. A new tensor.

    Noise is drawn for the global batch and each process takes its rows, so that many draw what one would.
    """
    geometry, eps = GEOMETRY[adversary.threat.norm], adversary.threat.eps
    if adversary.start == "none":
        return x.clone()
    whole = x
    if world.size > 1:
        whole = x.new_zeros((len(x) * world.size, *x.shape[1:]))
        whole[world.mine] = x
    if adversary.start == "uniform":
        return geometry.inside(whole, eps * adversary.reach, generator)[world.mine]
    noise = torch.randn(whole.shape, generator=generator, device=x.device, dtype=x.dtype)[world.mine]
    return geometry.project(x + GAUSSIAN * noise, x, eps)


def craft(
    model: Model,
    x: Tensor,
    objective: Objective,
    adversary: Adversary,
    *,
    generator: torch.Generator | None,
    autocast: Autocast,
    world: World = World(),  # noqa: B008 (frozen)
) -> Tensor:
    """PGD (Madry et al. 2018): x_adv like x (N, C, H, W), in the ball around x and in [0, 1].

    Call it inside a `CraftMode`. Each step is one forward and one backward pass of the model, under `autocast`; logits,
    loss and images stay in float32.
    """
    threat, geometry = adversary.threat, GEOMETRY[adversary.threat.norm]
    x_adv = start_of(x, adversary, generator, world).contiguous(memory_format=_format(x))
    # L∞ in place, against bounds made once; equal to geometry.project to the last bit.
    floor, ceiling = (x - threat.eps).clamp_(min=0), (x + threat.eps).clamp_(max=1)
    for _ in range(adversary.steps):
        gradient = input_gradient(model, x_adv, objective, autocast)
        if not adversary.bounded:
            x_adv.add_(geometry.steepest(gradient), alpha=adversary.step_size).clamp_(0, 1)
        elif threat.norm == "linf":
            torch.clamp(x_adv.add_(gradient.sign_(), alpha=adversary.step_size), floor, ceiling, out=x_adv)
        else:
            moved = x_adv.add_(geometry.steepest(gradient), alpha=adversary.step_size)
            x_adv = geometry.project(moved, x, threat.eps)
    return x_adv


def input_gradient(model: Model, x: Tensor, objective: Objective, autocast: Autocast) -> Tensor:
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
