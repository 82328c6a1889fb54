"""The processes that train one model together.

Gradients are averaged by hand after the backward pass. Of the 2K + 3 passes of an adversarial step only the last one
has gradients to exchange, so there is little for them to overlap with; in return any number of forwards, weight
perturbation and replays work alike, and one process and many do the same arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robudget import stop
from robudget.errors import InputError, RunFailed

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of one exchange between processes that are training
_LONGEST_WAIT = timedelta(days=7)  # of one process for another that decodes data or evaluates; a dead one ends it
_waiting: Any = None  # the group of those long waits (gloo, which waits asleep)


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
        self.average(p.grad for p in parameters if p.grad is not None)

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Each value's maximum over the processes."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor([float(value) for value in values], device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return [float(value) for value in shared.tolist()]

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

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Every tensor becomes its mean over the processes."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        """Wait, for days if need be, until every process is here. Raises where one of them has ended."""
        if self.size > 1:
            dist.barrier(group=_waiting)


def current() -> World:
    """The world of this process: one of many under an initialised torch.distributed, else alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def join(device: str) -> tuple[World, torch.device]:
    """Join the processes that `torchrun` started (its environment variables say so), or stay alone.

    Returns this process's world and device, which becomes torch's current one: NCCL and GPU number LOCAL_RANK for
    "cuda" (GPU 0 where the launcher shows each process one GPU), gloo for "cpu". Raises InputError where there are
    fewer GPUs than processes, RunFailed where no group can be formed.
    """
    global _waiting
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(), use(torch.device(device))
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", _gpu_of_process())
    use(place)
    if not dist.is_initialized():
        on_gpu = place.type == "cuda"
        try:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=place if on_gpu else None)
            _waiting = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        except (RuntimeError, ValueError) as error:
            raise RunFailed(
                f"the {os.environ['WORLD_SIZE']} processes can't form a group: {_first_line(error)}"
            ) from None
    return current(), place


def first_on_node(world: World, make: Callable[[], T]) -> T:
    """`make()` of every process, by the first one of each machine before the others: what it decodes or fits once lies
    in the cache, from which the others read it."""
    first = world.size == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    made = make() if first else None
    world.barrier()
    return make() if made is None else made


def use(device: torch.device) -> torch.device:
    """Make a GPU torch's current one: else events, streams and a context of their own go to GPU 0."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _gpu_of_process() -> int:
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0  # Slurm's --gpus-per-task: every process sees its own and no other
    if here > gpus:
        raise InputError(f"{here} processes were started on this machine, but it has {gpus} GPUs (one each)")
    return local


@contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device]]:
    """`join`, and leave again at the end what was joined here. After an error it is the launcher that ends them all.

    Raises RunFailed where another process ended or stopped answering.
    """
    global _waiting
    alone = not (dist.is_available() and dist.is_initialized())
    world, place = join(device)
    try:
        yield world, place
    except RuntimeError as error:
        if world.size == 1 or not _lost(error):
            raise
        stop.check()  # the others were asked to stop, and so was this one
        raise RunFailed(
            f"another process of this run ended or stopped answering ({_first_line(error)}); run again to go on"
        ) from error
    if alone and world.size > 1:
        dist.destroy_process_group()
        _waiting = None


def _lost(error: RuntimeError) -> bool:
    """Is this what NCCL or gloo raise when a process on the other side has gone?"""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "closed by peer"))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


# -- BatchNorm over all processes ----------------------------------------------------------------------------------


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
