"""The meter of this machine: the best source that it has for each component."""

from __future__ import annotations

from collections.abc import Callable

from robudget.meter import cpu, gpu
from robudget.meter.energy import Meter, Source


def open_meter(
    device: str = "cpu",
    *,
    cpu_watts: float | None = None,
    gpu_watts: float | None = None,
    overhead: float | None = None,
) -> Meter:
    """The best meter this machine has for work on `device` ("cpu", "cuda", "cuda:1", …) by this process.

    `cpu_watts`: what the machine's CPUs draw under full load, `gpu_watts`: what the GPU draws, by the user's knowledge;
    they are used only where nothing better can be read. `overhead`: the machine's energy at the plug ÷ what is counted
    of its GPU, CPU and memory, by the user's measurement; without it fans, switches and the loss of the supply are not
    counted. Fails for nothing: what cannot be read is NaN, with a note.
    """
    sources: list[Source] = []
    if device != "cpu":
        sources.append(gpu.open_source(device, gpu_watts))
    sources.append(cpu.open_source(cpu.ProcessShare(), cpu_watts))
    sources.append(cpu.MemorySource(cpu.memory_watts(), cpu.ProcessShare()))
    return Meter(sources, synchronise=_synchroniser(device), overhead=overhead or 1.0)


def _synchroniser(device: str) -> Callable[[], None]:
    if device == "cpu":
        return lambda: None
    import torch

    module = getattr(torch, torch.device(device).type)
    return lambda: module.synchronize() if torch.device(device).type == "mps" else module.synchronize(device)
