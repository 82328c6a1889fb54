"""The processes that train one model together.

Gradients are averaged by hand after the backward pass. Of the 2K + 3 passes of an adversarial step only the last one
has gradients to exchange, so there is little for them to overlap with; in return any number of forwards, weight
perturbation and replays work alike, and one process and many do the same arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robudget.errors import InputError


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes. Rows of a global batch are dealt out in turn, so that each gets its share of
    synthetic images too."""

    rank: int = 0
    size: int = 1

    @property
    def mine(self) -> slice:
        """This process's rows of a global batch."""
        return slice(self.rank, None, self.size)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every `grad` becomes its mean over the processes (each has the mean over its equal share of the batch)."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def whole(self, rows: Tensor) -> Tensor:
        """The global batch whose rows each process has its own of."""
        if self.size == 1:
            return rows
        out = rows.new_zeros((len(rows) * self.size, *rows.shape[1:]))
        out[self.mine] = rows
        return self.total(out)

    def totals(self, counts: dict[str, int], device: torch.device) -> dict[str, int]:
        """Each count summed over the processes; all must have the same names."""
        if self.size == 1:
            return dict(counts)
        names = sorted(counts)
        summed = self.total(torch.tensor([counts[name] for name in names], dtype=torch.int64, device=device)).tolist()
        return dict(zip(names, summed, strict=True))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def current() -> World:
    """The world of this process: one of many under an initialised torch.distributed, else alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def join(device: str) -> tuple[World, torch.device]:
    """Join the processes that `torchrun` started (its environment variables say so), or stay alone.

    Returns this process's world and device: NCCL and GPU number LOCAL_RANK for "cuda", gloo for "cpu". Raises
    InputError where there are fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(), torch.device(device)
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.startswith("cuda"):
        gpus = torch.cuda.device_count()
        if here > gpus:
            raise InputError(f"{here} processes were started on this machine, but it has {gpus} GPUs (one each)")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return current(), torch.device(device)


@contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device]]:
    """`join`, and leave again at the end what was joined here. After an error it is the launcher that ends them all."""
    alone = not (dist.is_available() and dist.is_initialized())
    world, place = join(device)
    yield world, place
    if alone and world.size > 1:
        dist.destroy_process_group()


# -- BatchNorm over all processes ----------------------------------------------------------------------------------


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm by the statistics of the global batch, on any device (torch's own is for GPUs only).

    With it, training does not depend on how many processes share the batch. The same buffers and parameters as
    `nn.BatchNorm2d`, so checkpoints don't know the difference.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        sums = torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), count[None]])
        sums = _SumOverWorld.apply(sums)
        total = sums[-1]
        mean, square = (sums[:-1] / total).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        if self.track_running_stats:
            self._track(mean.detach(), var.detach(), float(total.detach()))
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        out: Tensor = (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
        return out

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, total: float) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        momentum = self.momentum if self.momentum is not None else 0.1
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * total / (total - 1), momentum)


class _SumOverWorld(torch.autograd.Function):
    """all_reduce that gradients flow through: the sum of a sum's gradients is again a sum over the processes."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        out = gradient.clone()
        dist.all_reduce(out)
        return out


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Every BatchNorm of `model` replaced by one over all processes: torch's on a GPU, ours elsewhere."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
