"""BatchNorm in training: by the whole batch of all processes, by one batch without a trace, averaged afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robudget.errors import InputError

Norm = nn.modules.batchnorm._BatchNorm


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm by the statistics of the global batch, on any device.

    With it, training does not depend on how many processes share the batch. The same buffers and parameters as
    `nn.BatchNorm2d`, so checkpoints don't know the difference. Not torch's SyncBatchNorm: that one is for GPUs only,
    waits for the device at every layer to leave out processes without images (here all have equally many), and fails
    where activations are recomputed.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        out, mean, var = _normalise(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, var, x.numel() // x.shape[1] * dist.get_world_size())
        return out

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, total: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        momentum = self.momentum if self.momentum is not None else 0.1
        if self.num_batches_tracked is not None:  # None while activations are computed a second time
            self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (total / (total - 1)), momentum)


class _SyncBatchNormAct2d(SyncBatchNorm2d):
    """timm's BatchNorm with an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))  # type: ignore[operator]
        return out


class _Normalise(torch.autograd.Function):
    """(x, weight, bias, ε) → the normalised x in its own dtype, mean and variance (float32) over all processes.

    The input is kept for the backward pass as it came; sums are in float32. Nothing waits for the device.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        count = x.numel() // x.shape[1] * dist.get_world_size()
        wide = x.float()
        sums = torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
        dist.all_reduce(sums)
        mean, square = (sums / count).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        scale = weight * torch.rsqrt(var + eps)
        shift = bias - mean * scale
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count = eps, count
        ctx.mark_non_differentiable(mean, var)
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var = ctx.saved_tensors
        inverse = torch.rsqrt(var + ctx.eps)
        g = gradient.float()
        normal = (x.float() - mean[:, None, None]) * inverse[:, None, None]
        own = torch.cat([g.sum((0, 2, 3)), (g * normal).sum((0, 2, 3))])
        total = own.clone()
        dist.all_reduce(total)
        along, across = ((part / ctx.count)[:, None, None] for part in total.chunk(2))
        inner = (g - along - normal * across) * (weight * inverse)[:, None, None]
        bias, scale = own.chunk(2)
        return inner.to(x.dtype), scale, bias, None


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor] = _Normalise.apply(x, weight, bias, eps)
    return out


def synchronise_batchnorm(model: nn.Module) -> None:
    """Replace every BatchNorm of `model` by one over all processes, in place. Raises InputError for one of a kind that
    is not known here, rather than train with the statistics of a part of the batch."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine:
            module.__class__ = SyncBatchNorm2d
        elif type(module).__name__ == "BatchNormAct2d" and hasattr(module, "act"):
            module.__class__ = _SyncBatchNormAct2d
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm2d):
            raise InputError(
                f"the statistics of {type(module).__name__} can't be synchronised over processes "
                "(allowed: one process, or sync_batchnorm=false)"
            )


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of every BatchNorm of `model`."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]


def norms_of(model: nn.Module) -> list[Norm]:
    return [module for module in model.modules() if isinstance(module, Norm)]


@contextmanager
def untracked(norms: list[Norm]) -> Iterator[None]:
    """BatchNorm by batch statistics without a trace in the running ones."""
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, track in zip(norms, tracked, strict=True):
            norm.track_running_stats = track
