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
from robudget.errors import InputError, RunFailed, first_line

T = TypeVar("T")
FORMING = timedelta(minutes=5)  # until all processes of a group have found each other
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

    def given(self, tensors: Sequence[Tensor | None] | None) -> list[Tensor | None]:
        """The first process's tensors of the CPU, in every process; the others hand over None."""
        about = [None if tensors is None else [None if t is None else (t.shape, t.dtype) for t in tensors]]
        dist.broadcast_object_list(about, src=0, group=_waiting)
        assert about[0] is not None
        given: list[Tensor | None] = []
        for number, shape in enumerate(about[0]):
            own = tensors[number] if tensors is not None else None
            tensor = None if shape is None else own if own is not None else torch.empty(shape[0], dtype=shape[1])
            if tensor is not None:
                dist.broadcast(tensor, src=0, group=_waiting)
            given.append(tensor)
        return given

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
    fewer GPUs than processes, RunFailed where no group can be formed within FORMING.
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
            store, rank, size = next(dist.rendezvous("env://", timeout=FORMING))  # type: ignore[attr-defined]
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
                device_id=place if on_gpu else None,
            )
            _waiting = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        except (RuntimeError, ValueError) as error:
            raise RunFailed(
                f"the {os.environ['WORLD_SIZE']} processes can't form a group: {first_line(error)}"
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
            f"another process of this run ended or stopped answering ({first_line(error)}); run again to go on"
        ) from error
    if alone and world.size > 1:
        dist.destroy_process_group()
        _waiting = None


def _lost(error: RuntimeError) -> bool:
    """Is this what NCCL or gloo raise when a process on the other side has gone?"""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "closed by peer"))
