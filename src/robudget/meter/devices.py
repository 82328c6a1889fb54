"""The table of devices: power, peak FLOP/s, and the share of the peak that a training reaches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

from pydantic import TypeAdapter

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
        """What a recipe's precision `asked` resolves to on it: `auto` takes bfloat16 where the device has it."""
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
    table = load_yaml(text, "devices.yaml")
    for key, entry in table.items():
        entry |= {"key": key, "peak": {precision: 1e12 * tera for precision, tera in entry["peak"].items()}}
    return MappingProxyType(TypeAdapter(dict[str, Device]).validate_python(table))


def find(key: str) -> Device:
    """The device called `key`, whatever its case. Raises InputError with the nearest name."""
    table = devices()
    if key.lower() not in table:
        raise unknown("device", key, table)
    return table[key.lower()]


def gpu_watts(name: str) -> float | None:
    """Board power of the GPU that its driver calls `name`, None where it is not in the table."""
    for device in devices().values():
        model = device.key.removeprefix("rtx-").replace("-", " ")
        if device.kind == "gpu" and re.search(rf"\b{model}\b", name.lower()):
            return device.watts
    return None
