"""FGSM-PGI: one step from a perturbation that is remembered of every training image (Jia et al., ECCV 2022).

The variant with momentum over all previous epochs (FGSM-MEP, arXiv 2207.08859, section 3.2), with the numbers of its
authors: α = ε, μ = 0.3, λ = 10, and everything forgotten every 40 epochs. As in released code, the momentum adds
gradients scaled to an L1 norm of 1 over the batch, and a perturbation belongs to an image as it was augmented.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robudget.data.keyed import generator_for
from robudget.recipe import Recipe

DECAY = 0.3  # μ of the momentum
WEIGHT = 10.0  # λ of the regulariser
RESET_EPOCHS = 40


@dataclass
class Memory:
    """Of every training image, `delta` (the start of its next attack) and `momentum`, float32 (images, C, H, W)."""

    delta: Tensor
    momentum: Tensor

    @classmethod
    def begin(cls, recipe: Recipe, images: int, like: Tensor, epoch: int) -> Memory:
        """Every pixel at −ε or ε at random, no momentum. `like`: a batch, for shape and device."""
        eps, shape = recipe.threat.eps, (images, *like.shape[1:])
        generator = generator_for(like.device, recipe.seed, "prior", epoch)
        signs = torch.rand(shape, generator=generator, device=like.device).lt_(0.5).mul_(2).sub_(1)
        return cls(eps * signs, torch.zeros(shape, device=like.device))

    def advanced(
        self, rows: Tensor, x: Tensor, gradient: Tensor, eps: float, step_size: float
    ) -> tuple[Tensor, Memory]:
        """The adversarial images of a step from the remembered perturbations of `rows`, and what is to be remembered of
        these rows after it. x and gradient, at x + delta, (N, C, H, W)."""
        delta = self.delta[rows]
        momentum = gradient / gradient.abs().sum().clamp(min=1e-30) + DECAY * self.momentum[rows]

        def moved(direction: Tensor) -> Tensor:
            ball = (delta + step_size * direction.sign()).clamp(-eps, eps)
            return torch.minimum(torch.maximum(ball, -x), 1 - x)

        return x + moved(gradient), Memory(moved(momentum), momentum)

    def store(self, rows: Tensor, after: Memory) -> None:
        self.delta[rows], self.momentum[rows] = after.delta, after.momentum
