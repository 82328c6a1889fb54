"""The geometry of the three norms: one row of functions per norm, `GEOMETRY[threat.norm]`.

Every function works on rows: images are float tensors (N, C, H, W) in [0, 1], `eps` is a float or a tensor (N,), and a
row's result depends on that row alone. Norms of shape (N,) are over all entries of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robudget.threat import Norm

Radius = float | Tensor


@dataclass(frozen=True)
class Geometry:
    """What an attack needs to know of a norm."""

    norm: Norm
    size: Callable[[Tensor], Tensor]
    """(N, …) perturbation → (N,) norm."""
    dual: Callable[[Tensor], Tensor]
    """(N, …) gradient → (N,) dual norm: the rise of a linear function over a unit ball."""
    steepest: Callable[[Tensor], Tensor]
    """(N, …) gradient → direction of norm 1 (or 0) that raises a linear function most."""
    project: Callable[[Tensor, Tensor, Radius], Tensor]
    """(x_adv, x, eps) → x_adv moved into the ball around x and into [0, 1]. A new tensor."""
    surface: Callable[[Tensor, Tensor, Radius], Tensor]
    """(x, noise, eps) → AutoAttack's start: noise scaled to norm eps, added, moved into [0, 1]."""
    noise: Literal["uniform", "gaussian"]
    """Which noise `surface` is made for."""
    inside: Callable[[Tensor, Radius, torch.Generator | None], Tensor]
    """(x, eps, generator) → a uniform draw from the ball, moved into [0, 1]: the start of PGD training."""

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """(N,) distance between two batches of images, in float32."""
        return self.size(x_adv - x)


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """(N,) values shaped to broadcast against (N, …)."""
    return value.view(-1, *[1] * (like.dim() - 1))


def _spread(eps: Radius, like: Tensor) -> Radius:
    return per_row(eps, like) if isinstance(eps, Tensor) else eps


def _unit(v: Tensor, size: Tensor) -> Tensor:
    # The authors' 1e-12 keeps an all-zero row at zero.
    return v / per_row(size + 1e-12, v)


# -- L∞ ----------------------------------------------------------------------------------------------------------------


def _linf_size(v: Tensor) -> Tensor:
    return v.flatten(1).abs().amax(1)


def _linf_project(x_adv: Tensor, x: Tensor, eps: Radius) -> Tensor:
    eps = _spread(eps, x)
    return torch.clamp(x_adv, x - eps, x + eps).clamp_(0, 1)


def _linf_surface(x: Tensor, noise: Tensor, eps: Radius) -> Tensor:
    return _linf_project(x + _spread(eps, x) * _unit(noise, _linf_size(noise)), x, eps)


def _linf_inside(x: Tensor, eps: Radius, generator: torch.Generator | None) -> Tensor:
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return _linf_project(x + _spread(eps, x) * (2 * noise - 1), x, eps)


# -- L2 ----------------------------------------------------------------------------------------------------------------


def _l2_size(v: Tensor) -> Tensor:
    return v.flatten(1).square().sum(1).sqrt()


def _l2_project(x_adv: Tensor, x: Tensor, eps: Radius) -> Tensor:
    # Scaling into the ball and then clamping stays in the ball, because x is in the box (but is not the nearest point).
    delta = x_adv - x
    scale = (eps / (_l2_size(delta) + 1e-12)).clamp_(max=1)
    return delta.mul_(per_row(scale, x)).add_(x).clamp_(0, 1)


def _l2_surface(x: Tensor, noise: Tensor, eps: Radius) -> Tensor:
    return (x + _spread(eps, x) * _unit(noise, _l2_size(noise))).clamp_(0, 1)


def _l2_inside(x: Tensor, eps: Radius, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    radius = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
    return _l2_surface(x, noise, eps * radius)


# -- L1 ----------------------------------------------------------------------------------------------------------------


def _l1_size(v: Tensor) -> Tensor:
    return v.flatten(1).abs().sum(1)


def _l1_steepest(g: Tensor) -> Tensor:
    flat = g.flatten(1)
    best = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter_(1, best, flat.gather(1, best).sign()).view_as(g)


def l1_project(x_adv: Tensor, x: Tensor, eps: Radius) -> Tensor:
    """The nearest point (in L2) of the L1 ball around x intersected with [0, 1] (Croce & Hein 2021, "Mind the box").

    With y = x_adv − x and the room r_i to the bound of [0, 1] that y_i points at, the answer is
    sign(y_i)·min(max(|y_i| − λ, 0), r_i) with the smallest λ ≥ 0 whose norm is at most eps. The norm falls piecewise
    linearly in λ, with kinks at |y_i| and |y_i| − r_i; sorting them makes the solution exact.
    """
    flat, centre = x_adv.flatten(1), x.flatten(1)
    delta = flat - centre
    size = delta.abs()
    room = torch.where(delta > 0, 1 - centre, centre)
    room = torch.minimum(room, size)
    radius = eps if isinstance(eps, Tensor) else torch.full((len(x),), eps, device=x.device, dtype=x.dtype)

    # Between kinks the slope is −#{i: |y_i| − r_i < λ < |y_i|}; each kink changes it by ±1.
    kinks, order = torch.cat((size - room, size), dim=1).sort(dim=1)
    slope = torch.where(order < size.shape[1], 1.0, -1.0).to(size.dtype).cumsum(1)
    falls = slope[:, :-1] * kinks.diff(dim=1)
    norm = torch.cat((room.sum(1, keepdim=True), room.sum(1, keepdim=True) - falls.cumsum(1)), dim=1)
    # The last kink whose norm is still above the radius starts the segment that crosses it.
    above = (norm > radius.unsqueeze(1)).sum(1) - 1
    at = above.clamp(min=0).unsqueeze(1)
    excess = norm.gather(1, at).squeeze(1) - radius
    cut = kinks.gather(1, at).squeeze(1) + excess / slope.gather(1, at).squeeze(1).clamp(min=1)
    cut = torch.where(above < 0, torch.zeros_like(cut), cut).unsqueeze(1)
    length = torch.minimum((size - cut).clamp_(min=0), room)
    return (centre + delta.sign() * length).clamp_(0, 1).view_as(x)


def _l1_surface(x: Tensor, noise: Tensor, eps: Radius) -> Tensor:
    return l1_project(x + noise, x, eps)


def _l1_inside(x: Tensor, eps: Radius, generator: torch.Generator | None) -> Tensor:
    # Uniform in an L1 ball: exponential magnitudes with random signs, over their sum plus one more exponential.
    shape = (len(x), x[0].numel() + 1)
    draws = torch.empty(shape, device=x.device, dtype=x.dtype).exponential_(generator=generator)
    signs = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 0.5
    share = (draws[:, 1:] / draws.sum(1, keepdim=True)).view_as(x)
    return l1_project(x + _spread(eps, x) * share * signs.sign(), x, eps)


GEOMETRY: dict[Norm, Geometry] = {
    "linf": Geometry("linf", _linf_size, _l1_size, torch.sign, _linf_project, _linf_surface, "uniform", _linf_inside),
    "l2": Geometry(
        "l2", _l2_size, _l2_size, lambda g: _unit(g, _l2_size(g)), _l2_project, _l2_surface, "gaussian", _l2_inside
    ),
    "l1": Geometry("l1", _l1_size, _linf_size, _l1_steepest, l1_project, _l1_surface, "gaussian", _l1_inside),
}


# -- the contract ------------------------------------------------------------------------------------------------------


def enforce(x_adv: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """x_adv moved, by rounding errors only, to where the attack's contract holds exactly. Same shape and dtype.

    In [0, 1]; L∞: fl(x − ε) ≤ x_adv ≤ fl(x + ε); L2 and L1: the float64 norm of x_adv − x is at most ε(1 + 1e-6).
    """
    if norm == "linf":
        return _linf_project(x_adv, x, eps)
    out = x_adv.clamp(0, 1)
    size = GEOMETRY[norm].size
    wide = x.double()
    for attempt in range(7):
        length = size(out.double() - wide)
        over = length > eps * (1 + 1e-6)
        if not bool(over.any()):
            return out
        # Storing the shrunk image in float32 rounds it again, so aim further in each time.
        shrink = torch.where(over, eps * (1 - 10.0 ** (attempt - 8)) / length, torch.ones_like(length))
        out = (wide + (out.double() - wide) * per_row(shrink, wide)).to(x.dtype)
    length = size(out.double() - wide)
    return torch.where(per_row(length <= eps * (1 + 1e-6), x), out, x)


def within(x_adv: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """(N,) bool: does the contract hold for each row? (What `enforce` makes true, checked on its own.)"""
    boxed = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    if norm == "linf":
        return boxed & ((x_adv >= x - eps) & (x_adv <= x + eps)).flatten(1).all(1)
    return boxed & (GEOMETRY[norm].size(x_adv.double() - x.double()) <= eps * (1 + 1e-6))
