"""What this machine is, what a run on it will measure and what it will estimate, and which fast paths it takes."""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch

from robudget import __version__
from robudget.backend.device import why_no_gpu
from robudget.backend.precision import has_bfloat16
from robudget.environment import resolve_device
from robudget.execution import Site
from robudget.meter import cpu, gpu
from robudget.meter.machine import open_meter
from robudget.threads import cores, held_by_others, quota, share

_WRITTEN_BYTES = 64 << 20  # of the store's disk, to time it
_PACKAGES = ("torch", "timm", "numpy", "pandas", "scipy", "scikit-learn")


@dataclass(frozen=True)
class Line:
    """One fact: `part` is "machine", "measuring" or "fast paths"; `why` says where it comes from or what follows."""

    part: str
    name: str
    value: str
    why: str = ""


def diagnose(site: Site | None = None, store: str | Path = "runs") -> list[Line]:
    """Everything, in the order in which it is to be read. Writes 64 MiB beside the store, and removes them.

    Raises InputError for a device that is not there.
    """
    site = site or Site()
    device = resolve_device(site.device)
    return [*_machine(device, site, Path(store)), *_measuring(device, site), *_fast_paths(device, site)]


# -- what it is --------------------------------------------------------------------------------------------------------


def _machine(device: torch.device, site: Site, store: Path) -> Iterator[Line]:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    yield Line("machine", "versions", f"robudget {__version__}, Python {platform.python_version()}, {versions}")
    yield Line("machine", "system", platform.platform())
    yield from _gpus(device)
    name, virtual, sockets = cpu.identity()
    place = "a virtual machine" if virtual else f"{sockets} socket" + ("s" if sockets > 1 else "")
    capability = torch.backends.cpu.get_cpu_capability()
    yield Line("machine", "CPU", f"{name or 'unnamed'}, {os.cpu_count()} threads, {place}", f"torch uses {capability}")
    granted = quota()
    limit = "no quota" if math.isinf(granted) else f"a quota of {granted:g} CPUs"
    held = sum(held_by_others())
    threads = site.threads or share(held_by_others(), cores())
    why = f"{cores()} usable ({limit}), {held} held by other robudget commands now"
    yield Line("machine", "threads of a command", str(threads), why)
    memory = psutil.virtual_memory()
    yield Line("machine", "memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB available")
    yield _disk(store)


def _gpus(device: torch.device) -> Iterator[Line]:
    if not torch.cuda.is_available():
        yield Line("machine", "device", str(device), why_no_gpu())
        return
    yield Line("machine", "device", str(device), f"{torch.cuda.device_count()} CUDA GPUs are visible")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"compute capability {about.major}.{about.minor}"
        yield Line("machine", f"cuda:{index}", f"{about.name}, {about.total_memory / 1e9:.0f} GB", capability)
    driver = gpu.driver_version() or "unknown (NVML is silent)"
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    yield Line("machine", "CUDA", f"CUDA {torch.version.cuda}, cuDNN {cudnn}, driver {driver}")


def _disk(store: Path) -> Line:
    place = store.absolute()
    while not place.exists():
        place = place.parent
    free = psutil.disk_usage(str(place)).free / 1e9
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            begun = time.perf_counter()
            for _ in range(_WRITTEN_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = _WRITTEN_BYTES / (time.perf_counter() - begun)
    except OSError as error:
        return Line("machine", "disk of the store", f"{place}: not writable", str(error.strerror))
    why = f"timed now: {_WRITTEN_BYTES >> 20} MiB written and on the disk"
    return Line("machine", "disk of the store", f"{place}: {free:.0f} GB free, {speed / 1e6:.0f} MB/s", why)


# -- what will be measured ---------------------------------------------------------------------------------------------


def _measuring(device: torch.device, site: Site) -> Iterator[Line]:
    with open_meter(str(device), **site.meter) as meter:
        for source in meter.sources:
            error = "" if math.isnan(source.uncertainty) else f" ± {100 * source.uncertainty:.0f}%"
            yield Line("measuring", f"energy of {source.name}", f"{source.how}{error}", source.method)
    if site.overhead > 1:
        factor = f"the user's factor {site.overhead:g} on the parts above"
        yield Line("measuring", "fans, switches, supply", "estimated", factor)
    else:
        yield Line("measuring", "fans, switches, supply", "not counted", "meter.overhead=1.15 would add 15%")
    try:
        packages = len(cpu.open_counters())
        yield Line("measuring", "RAPL", f"readable: {packages} package" + ("s" if packages > 1 else ""))
    except cpu.NoRapl as error:
        yield Line("measuring", "RAPL", "not readable", str(error))
    driver = gpu.driver_version()
    yield Line("measuring", "NVML", "answers" if driver else "does not answer", f"driver {driver}" if driver else "")
    yield Line("measuring", "FLOPs", "counted", "on the real model, operation by operation, times the calls made")


# -- what is fast ------------------------------------------------------------------------------------------------------


def _fast_paths(device: torch.device, site: Site) -> Iterator[Line]:
    on_gpu, low = device.type == "cuda", has_bfloat16(device)

    def line(name: str, on: bool, why: str) -> Line:
        return Line("fast paths", name, "on" if on else "off", why)

    why = "where the work gains from it (precision=auto)" if low else f"{device} does not multiply it in hardware"
    yield line("bfloat16", low, why)
    yield line("channels-last memory", low, "with bfloat16" if low else "no bfloat16 here")
    folded = "for this package's residual networks, with craft.batchnorm=eval" if low else "no bfloat16 here"
    yield line("a folded copy to craft with", low, folded)
    if on_gpu:
        asked = (
            "tf32=true, in a training's float32" if site.tf32 else "tf32=true would allow it in a training's float32"
        )
        yield line("TensorFloat-32", site.tf32, f"{asked}; verdicts are by IEEE float32")
        yield line("calls of 64, 128, 256 or 512 images in attacks", True, "of these, those that agree bit for bit")
        benchmark = site.cudnn_benchmark and not site.deterministic
        yield line(
            "cudnn.benchmark", benchmark, "in a training's steps; cudnn_benchmark=false or deterministic=true: not"
        )
        yield line(
            "CUDA graphs",
            site.cuda_graphs,
            "for steps of attacks, in training and evaluation; cuda_graphs=false: not",
        )
        yield line("a compiled update", site.compile, "compile=true puts it through torch.compile")
    else:
        fused = hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        yield line("oneDNN's convolution with its ReLU, in attacks", fused, "where an attack runs channels-last")
        yield line("freed memory is kept", platform.libc_ver()[0] == "glibc", "by glibc's mallopt")
    deterministic = (
        "deterministic=true was asked for" if site.deterministic else "deterministic=true would ask for them"
    )
    yield Line("fast paths", "deterministic algorithms alone", "on" if site.deterministic else "off", deterministic)
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    gpus = torch.cuda.device_count()
    several = "torchrun --nproc-per-node N -m robudget run …; on a CPU by gloo"
    yield line("several GPUs by NCCL", nccl and gpus > 1, several if gpus > 1 else f"{gpus} GPUs are visible")
