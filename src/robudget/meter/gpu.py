"""Energy of one GPU: NVML's energy counter, else its power integrated, else utilisation × TDP, else TDP alone."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from robudget.meter.counters import Counter, Integral, Poller
from robudget.meter.devices import gpu_watts
from robudget.meter.energy import How, Reading, Source

# NVML refreshes its power reading every 20 to 100 ms, depending on the generation.
_POLL_SECONDS = 0.1
# No GPU draws more. NVML's counter of millijoules has 64 bits and does not wrap in practice.
GPU_MAX_WATTS = 3000.0


class Gpu:
    """One device behind NVML. Every method returns None for what it cannot tell, whatever happened to the device."""

    def __init__(self, nvml: ModuleType, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float | None:
        """Since the driver was loaded (Volta and later)."""
        return self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption, 1e-3)

    def watts(self) -> float | None:
        return self._ask(self._nvml.nvmlDeviceGetPowerUsage, 1e-3)

    def limit_watts(self) -> float | None:
        return self._ask(self._nvml.nvmlDeviceGetEnforcedPowerLimit, 1e-3)

    def memory_bytes(self) -> float | None:
        """Of the whole device."""
        try:
            return float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).total)
        except (self._nvml.NVMLError, AttributeError):
            return None

    def partitioned(self) -> bool:
        """Is it cut into slices (MIG), each of which a process sees as a GPU?"""
        try:
            return int(self._nvml.nvmlDeviceGetMigMode(self._handle)[0]) == 1
        except (self._nvml.NVMLError, AttributeError):
            return False

    def utilisation(self) -> float | None:
        """Share of the last sample period in which a kernel ran."""
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
        except self._nvml.NVMLError:
            return None

    def shared(self) -> bool | None:
        """Whether more than one process computes on the device (in a container their ids would not say which)."""
        try:
            return len(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)) > 1
        except self._nvml.NVMLError:
            return None

    def _ask(self, question: Callable[[Any], float], scale: float) -> float | None:
        try:
            return float(question(self._handle)) * scale
        except self._nvml.NVMLError:
            return None


@dataclass(frozen=True)
class Slice:
    """What a process has of a GPU that is cut into slices (MIG), whose meters are those of the whole."""

    share: float

    def __str__(self) -> str:
        return f" × {self.share:.3g}, this slice's share of its memory (MIG)"


class CounterSource:
    """NVML's energy counter, for the whole GPU."""

    name = "gpu"

    def __init__(self, counter: Counter, shared: Callable[[], bool | None], slice_: Slice | None = None) -> None:
        self.how: How = "measured" if slice_ is None else "estimated"
        self.method, self.uncertainty = (
            f"NVML energy counter of the whole GPU{slice_ or ''}",
            0.05 if slice_ is None else 0.5,
        )
        self._counter, self._shared, self._share = counter, shared, 1.0 if slice_ is None else slice_.share

    def read(self) -> Reading:
        total, counter = self._counter.total(), self._counter
        raw = {"nvml_joules": total}
        return Reading(total * self._share, raw, counter.lost, tuple(counter.notes), self._shared())

    def close(self) -> None:
        pass


class IntegralSource:
    """Power integrated over samples that a thread takes."""

    name = "gpu"

    def __init__(
        self,
        integral: Integral,
        shared: Callable[[], bool | None],
        *,
        how: How = "measured",
        method: str = "NVML power integrated",
        uncertainty: float = 0.1,
        poll_seconds: float | None = _POLL_SECONDS,
        share: float = 1.0,
    ) -> None:
        self.how: How = how
        self.method, self.uncertainty, self._share = method, uncertainty, share
        self._integral, self._shared = integral, shared
        self._lock = threading.Lock()
        self._poller = Poller(self.sample, poll_seconds) if poll_seconds is not None else None

    def sample(self) -> float:
        with self._lock:
            return self._integral.sample()

    def read(self) -> Reading:
        total, integral = self.sample(), self._integral
        raw = {"power_samples": float(integral.samples), "integrated_joules": total}
        return Reading(total * self._share, raw, integral.lost, tuple(integral.notes), self._shared())

    def close(self) -> None:
        if self._poller is not None:
            self._poller.close()


class ConstantSource:
    """Wall time × watts by a table or the user; NaN watts where nobody knows them."""

    name = "gpu"

    def __init__(self, watts: float, method: str, uncertainty: float) -> None:
        self.how: How = "estimated"
        self.method, self.uncertainty = method, uncertainty
        self._watts = watts

    def read(self) -> Reading:
        return Reading(self._watts * time.monotonic())

    def close(self) -> None:
        pass


def open_source(device: str, watts: float | None = None) -> Source:
    """The best source for the GPU that torch calls `device`; `watts`: what it draws under load, by the user."""
    gpu, note = _nvml_gpu(device)
    if gpu is None:
        return _constant(device, watts, note)
    part = _slice(gpu, device) if gpu.partitioned() else None
    if gpu.joules() is not None:
        counter = Counter("NVML", gpu.joules, time.monotonic, max_watts=GPU_MAX_WATTS)
        return CounterSource(counter, gpu.shared, part)
    if gpu.watts() is not None:
        integral = Integral("NVML", gpu.watts, time.monotonic)
        if part is None:
            return IntegralSource(integral, gpu.shared)
        method = f"NVML power of the whole GPU integrated{part}"
        return IntegralSource(integral, gpu.shared, how="estimated", method=method, uncertainty=0.5, share=part.share)
    limit = watts or gpu.limit_watts() or gpu_watts(_name(device))
    if limit is None or gpu.utilisation() is None:
        return _constant(device, watts, "NVML tells neither energy nor power of this GPU")

    def by_utilisation() -> float | None:
        busy = gpu.utilisation()
        return None if busy is None else busy * limit

    integral = Integral("NVML", by_utilisation, time.monotonic)
    method = f"utilisation × {limit:g} W integrated{part or ''}"
    share = 1.0 if part is None else part.share
    return IntegralSource(integral, gpu.shared, how="estimated", method=method, uncertainty=0.4, share=share)


def _slice(gpu: Gpu, device: str) -> Slice:
    import torch

    mine, whole = torch.cuda.get_device_properties(torch.device(device)).total_memory, gpu.memory_bytes()
    return Slice(math.nan if whole is None else min(mine / whole, 1.0))


def driver_version() -> str | None:
    """Of the GPUs, None where NVML is silent."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None


def _constant(device: str, watts: float | None, why: str) -> ConstantSource:
    if watts is not None:
        return ConstantSource(watts, f"wall time × the user's {watts:g} W ({why})", 0.3)
    name = _name(device)
    tdp = gpu_watts(name)
    if tdp is None:
        return ConstantSource(math.nan, f"unknown: no power of {name!r} is known ({why})", math.nan)
    return ConstantSource(tdp, f"wall time × TDP {tdp:g} W of {name}, as if always busy ({why})", 0.5)


def _nvml_gpu(device: str) -> tuple[Gpu | None, str]:
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return None, "NVML is not installed (nvidia-ml-py)"
    except pynvml.NVMLError as error:
        return None, f"NVML does not answer: {error}"
    uuid = str(torch.cuda.get_device_properties(torch.device(device)).uuid)
    try:
        return Gpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")), ""
    except pynvml.NVMLError as error:
        why = f"NVML does not know {device}: {error}"
    try:  # a slice has a UUID of its own, and no meter: the whole GPU's is read
        part = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return Gpu(pynvml, pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)), ""
    except (pynvml.NVMLError, AttributeError):
        return None, why


def _name(device: str) -> str:
    import torch

    kind = torch.device(device).type
    return str(torch.cuda.get_device_name(torch.device(device))) if kind == "cuda" else kind
