"""Penalties on the gradient of the loss by the images: the update differentiates them again (double backpropagation).

- GradAlign (Andriushchenko & Flammarion 2020): gradients at x and at a random point of the ball around it
  shall point the same way, which keeps one-step attacks from failing. λ = 0.2 at ε = 8/255 on CIFAR-10 in their code.
- The norm of the gradient at clean images (Rodríguez-Muñoz et al. 2024, arXiv 2409.20139): in place of an attack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robudget.attacks.geometry import GEOMETRY
from robudget.backend.precision import Autocast
from robudget.threat import Norm


@dataclass(frozen=True)
class Slope:
    """Logits (N, classes) at images and the gradient of their summed cross-entropy there (N, C, H, W), both with their
    graphs."""

    logits: Tensor
    gradient: Tensor


def slope(model: Callable[[Tensor], Tensor] | nn.Module, x: Tensor, target: Tensor, autocast: Autocast) -> Slope:
    """At x, which is a new leaf. Fused attention has no second derivative: it is computed by matrix products here."""
    leaf = x.detach().requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):
        with autocast():
            logits = model(leaf)
        loss = F.cross_entropy(logits.float(), target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return Slope(logits.float(), gradient.float())


def misalignment(first: Tensor, second: Tensor) -> Tensor:
    """1 − the mean cosine between gradients (N, C, H, W), over the images where neither is 0."""
    products = ((first * second).flatten(1).sum(1), *(g.square().flatten(1).sum(1) for g in (first, second)))
    valid = (products[1] > 0) & (products[2] > 0)
    ones = torch.ones_like(products[0])
    dot, *squares = (torch.where(valid, product, ones) for product in products)
    cosine = dot / (squares[0].sqrt() * squares[1].sqrt())
    return 1 - (cosine * valid).sum() / valid.sum().clamp(min=1)


def rise(gradient: Tensor, norm: Norm, eps: float) -> Tensor:
    """By how much the linearised loss grows at most within the ball: ε times the gradient's dual norm, the mean over
    the images. The paper has L∞: ε/σ·‖∇‖₁ of images divided by σ is ε·‖∇‖₁ of images in [0, 1]."""
    return eps * GEOMETRY[norm].dual(gradient).mean()
