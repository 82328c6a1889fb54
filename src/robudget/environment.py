"""What a result may depend on beside its recipe: the device that was resolved, versions, deterministic algorithms."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from robudget import __version__
from robudget.backend.device import answering, current, why_no_gpu
from robudget.errors import InputError
from robudget.execution import Site
from robudget.meter.gpu import driver_version


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """torch's deterministic algorithms alone inside, where so asked."""
    if not deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.get_deterministic_debug_mode()
    # `use_deterministic_algorithms` sets the same flag, and imports torch's compiler (3 s) to tell it too.
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def resolve_device(name: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:1`. Raises InputError where there is no such GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"unknown device {name!r} (allowed: auto, cpu, cuda, cuda:1)") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported (allowed: auto, cpu, cuda, cuda:1)")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        why = f": {why_no_gpu()}" if gpus == 0 else ""
        raise InputError(f"device = {name!r}, but this machine has {gpus} CUDA GPUs{why} (allowed: auto, cpu)")
    return device


@contextmanager
def computing(name: str) -> Iterator[torch.device]:
    """The device called `name`; inside, a GPU is torch's current one, and what it says when it stops answering is one
    line. Raises InputError where there is no such device, RunFailed where it stopped."""
    device = resolve_device(name)
    with answering(), current(device):
        yield device


def chosen(site: Site) -> dict[str, Any]:
    """What was asked of the site: beside its defaults, paths left out."""
    asked = site.model_dump(exclude_defaults=True, exclude={"data_root", "synthetic_root", "teacher", "weights"})
    return {"tf32": site.tf32, "site": asked}


def environment(device: torch.device) -> dict[str, Any]:
    """What a result may depend on beside the recipe: versions, device, threads, the CPU's capability."""
    packages = ("torch", "timm", "numpy", "scikit-learn")
    return {
        "robudget": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **(cuda_versions(device) if device.type == "cuda" else {}),
    }


def peak_memory() -> int:
    """The most memory of the host that this process has taken since its start, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cuda_versions(device: torch.device) -> dict[str, Any]:
    """Versions of what computes on a GPU, and how many GPUs there are (the driver by NVML, None where it is silent)."""
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "driver": driver_version(),
        "gpus": torch.cuda.device_count(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
    }
