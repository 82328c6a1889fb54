"""The table of devices that a forecast can be asked for: peak, power and what a training attains of the peak."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

from robudget.config import load_yaml
from robudget.errors import unknown


@dataclass(frozen=True)
class Device:
    """`peak`: dense FLOP/s by precision; `attainable`: (low, likely, high) share of it that training a convolutional
    network reaches; `watts`: board power or TDP; `threads`: of a CPU; `memory_gb`: None where it has no own memory."""

    key: str
    name: str
    kind: str
    watts: float
    peak: Mapping[str, float]
    attainable: Mapping[str, tuple[float, float, float]]
    source: str
    memory_gb: float | None = None
    threads: int = 0

    def precision(self, asked: str) -> str:
        """What `asked` (a recipe's precision) comes to here: `auto` takes bfloat16 where the device has it."""
        if asked == "float32" or "bfloat16" not in self.peak:
            return "float32"
        return "bfloat16"

    def flops_per_second(self, precision: str) -> tuple[float, float, float]:
        """(low, likely, high) FLOP/s of a training."""
        low, likely, high = (share * self.peak[precision] for share in self.attainable[precision])
        return low, likely, high


@lru_cache(maxsize=1)
def devices() -> Mapping[str, Device]:
    """Key → device, in the table's order."""
    text = resources.files("robudget.meter").joinpath("devices.yaml").read_text("utf-8")
    return MappingProxyType({key: _device(key, entry) for key, entry in load_yaml(text, "devices.yaml").items()})


def find(key: str) -> Device:
    """The device called `key`, whatever its case. Raises InputError with the nearest name."""
    table = devices()
    if key.lower() not in table:
        raise unknown("device", key, table)
    return table[key.lower()]


def gpu_watts(name: str) -> float | None:
    """Board power of the GPU that its driver calls `name`, None where the table does not know it."""
    for device in devices().values():
        model = device.key.removeprefix("rtx-").replace("-", " ")
        if device.kind == "gpu" and re.search(rf"\b{model}\b", name.lower()):
            return device.watts
    return None


def _device(key: str, entry: Mapping[str, object]) -> Device:
    fields = dict(entry)
    peaks = fields.pop("peak")
    shares = fields.pop("attainable")
    assert isinstance(peaks, dict)
    assert isinstance(shares, dict)
    return Device(
        key=key,
        peak=MappingProxyType({precision: peak * 1e12 for precision, peak in peaks.items()}),
        attainable=MappingProxyType({precision: tuple(share) for precision, share in shares.items()}),
        **fields,  # type: ignore[arg-type]
    )
