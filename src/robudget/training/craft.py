"""The adversary of a training: PGD from its start, and what it raises.

The same mathematics as `robudget.attacks.pgd`; what differs is that noise comes from a generator on the device, bounds
are computed once, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from robudget.attacks.geometry import GEOMETRY
from robudget.attacks.victim import Model
from robudget.backend.batch_size import EVERY, Physical
from robudget.backend.graph import Graphs
from robudget.backend.precision import Autocast
from robudget.recipe import Recipe
from robudget.threat import Threat
from robudget.training.distributed import World

GAUSSIAN = 0.001  # TRADES starts from x + 0.001·N(0, 1) (Zhang et al. 2019, released code)


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
    `craft.method` names either for another loss.
    """
    threat, part = recipe.threat.threat(), recipe.craft
    method = part.method or recipe.loss
    if method == "fgsm-rs":
        return Adversary(threat, 1, part.step_size or 1.25 * threat.eps)
    if method == "n-fgsm":
        return Adversary(threat, 1, part.step_size or threat.eps, reach=2.0, bounded=False)
    return Adversary(threat, part.steps, part.step_size_for(threat.eps), part.start)


def warming_up(adversary: Adversary, step: int, steps: int) -> Adversary:
    """The adversary of update `step` (from 0) in a warm-up of `steps`: all its lengths, the radius and the step size,
    times (step + 1)/(steps + 1), as the learning rate warms up; afterwards `adversary` itself."""
    if step >= steps:
        return adversary
    share, threat = (step + 1) / (steps + 1), adversary.threat
    return replace(adversary, threat=Threat(threat.norm, share * threat.eps), step_size=share * adversary.step_size)


@dataclass(frozen=True)
class Objective:
    """What the adversary raises: `of(logits, against)` summed over images, `against` being what they are compared with,
    a line an image of the batch. Called with logits (n, classes) of the batch, or of the rows given by a slice."""

    of: Callable[[Tensor, Tensor], Tensor]
    against: Tensor

    def __call__(self, logits: Tensor, rows: slice = EVERY) -> Tensor:
        return self.of(logits, self.against[rows])


def cross_entropy(labels: Tensor) -> Objective:
    """The sum of cross-entropies against hard labels (N,): what AT, MART and validation raise."""
    return Objective(_cross_entropy, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def divergence(clean_logits: Tensor) -> Objective:
    """The sum of KL(clean ‖ adversarial) (N, classes): what TRADES raises (Zhang et al. 2019, equation 5)."""
    return Objective(_divergence, F.log_softmax(clean_logits.detach(), dim=1))


def _divergence(logits: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, dim=1), log_p, reduction="sum", log_target=True)


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
    physical: Physical | None = None,
    graphs: Graphs | None = None,
) -> Tensor:
    """PGD (Madry et al. 2018): x_adv like x (N, C, H, W), in the ball around x and in [0, 1].

    Call it inside a `CraftMode`. Each step is one forward and one backward pass of the model, under `autocast`; logits,
    loss and images stay in float32. `physical`: so many images at a time, each with the noise that it has in the batch.
    `graphs`: of this model, whose weights and buffers stay where they are from call to call.
    """
    x_adv = torch.empty_like(x).copy_(start_of(x, adversary, generator, world))  # in x's memory format
    if physical is None or not physical.splits(len(x)):
        return _climb(model, x, x_adv, objective, adversary, autocast, graphs)
    for rows in physical.parts(len(x)):
        part = Objective(objective.of, objective.against[rows])
        x_adv[rows] = _climb(model, x[rows], x_adv[rows], part, adversary, autocast, graphs)
    return x_adv


def _climb(
    model: Model,
    x: Tensor,
    x_adv: Tensor,
    objective: Objective,
    adversary: Adversary,
    autocast: Autocast,
    graphs: Graphs | None,
) -> Tensor:
    """The steps of PGD from x_adv, which may be overwritten."""
    threat, geometry, of = adversary.threat, GEOMETRY[adversary.threat.norm], objective.of
    bounds: tuple[Tensor, ...] = ()
    if adversary.bounded and threat.norm == "linf":
        # L∞ in place, against bounds made once; equal to geometry.project to the last bit.
        bounds = (x - threat.eps).clamp_(min=0), (x + threat.eps).clamp_(max=1)

    def moved(x_adv: Tensor, x: Tensor, against: Tensor, *bounds: Tensor) -> Tensor:
        gradient = input_gradient(model, x_adv, lambda logits: of(logits, against), autocast)
        if bounds:
            floor, ceiling = bounds
            return torch.clamp(x_adv.add_(gradient.sign_(), alpha=adversary.step_size), floor, ceiling, out=x_adv)
        x_adv.add_(geometry.steepest(gradient), alpha=adversary.step_size)
        return geometry.project(x_adv, x, threat.eps) if adversary.bounded else x_adv.clamp_(0, 1)

    if graphs is None:
        for _ in range(adversary.steps):
            x_adv = moved(x_adv, x, objective.against, *bounds)
        return x_adv
    key = of, x.shape, threat, adversary.step_size, adversary.bounded
    step = graphs.of(
        key, lambda x_adv, *fixed: x_adv.copy_(moved(x_adv, *fixed)), (x_adv, x, objective.against, *bounds)
    )
    for _ in range(adversary.steps):
        step()
    return step.buffers[0].clone()


def input_gradient(model: Model, x: Tensor, objective: Callable[[Tensor], Tensor], autocast: Autocast) -> Tensor:
    """The gradient of `objective` at x, a float32 tensor of x's shape that the caller may overwrite."""
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        with autocast():
            logits = model(leaf)
        (gradient,) = torch.autograd.grad(objective(logits.float()), leaf)
    return gradient
