"""Energy of the CPU: RAPL where it can be read, else CPU time × thermal design power."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from robudget.meter.energy import How, Reading, Source
from robudget.meter.share import process_seconds

# CodeCarbon's default for a CPU it does not know.
_WATTS_PER_THREAD = 4.0


@dataclass(frozen=True)
class CpuPower:
    """What one busy hardware thread draws, and how that is known."""

    watts_per_thread: float
    method: str
    uncertainty: float


class TimeSource:
    """CPU seconds of this process × watts of a busy thread. Idle power is nobody's, so it is not in it."""

    name = "cpu"
    how: How = "estimated"
    shared: bool | None = None

    def __init__(self, power: CpuPower) -> None:
        self.notes: list[str] = []
        self.method, self.uncertainty = power.method, power.uncertainty
        self._watts = power.watts_per_thread

    def read(self) -> Reading:
        seconds = process_seconds()
        return Reading(seconds * self._watts, {"cpu_seconds": seconds})

    def close(self) -> None:
        pass


def open_source(watts: float | None = None) -> Source:
    """The best source for the CPU; `watts`: what all CPUs of the machine draw under full load, by the user."""
    if watts is not None:
        threads = os.cpu_count() or 1
        return TimeSource(CpuPower(watts / threads, f"CPU time × the user's {watts:g} W / {threads} threads", 0.3))
    return TimeSource(cpu_power())


@lru_cache(maxsize=1)
def cpu_power() -> CpuPower:
    """Thermal design power per thread of this machine's CPU, by CodeCarbon's table; 4 W where it is not told."""
    name, virtual, sockets = _identity()
    threads = os.cpu_count() or 1
    tdp = None if virtual else _tdp(name)
    if tdp is None:
        why = "a virtual machine does not tell its host's" if virtual else "no TDP is known"
        method = f"CPU time × {_WATTS_PER_THREAD:g} W a thread (CodeCarbon's default: {name or 'CPU'}, {why})"
        return CpuPower(_WATTS_PER_THREAD, method, 0.6)
    method = f"CPU time × TDP {tdp:g} W × {sockets} / {threads} threads ({name}, CodeCarbon's table)"
    return CpuPower(tdp * sockets / threads, method, 0.4)


def _identity() -> tuple[str, bool, int]:
    """Model name, whether this is a virtual machine, number of sockets: as /proc/cpuinfo tells."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return "", False, 1
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", text, re.MULTILINE)
    sockets = set(re.findall(r"^physical id\s*:\s*(\d+)", text, re.MULTILINE))
    return (names[0].strip() if names else ""), flags is not None, max(len(sockets), 1)


def _tdp(name: str) -> float | None:
    """Watts of the CPU named as in /proc/cpuinfo, by CodeCarbon's table."""
    from codecarbon.input import DataSource

    table = DataSource().get_cpu_power_data()  # type: ignore[no-untyped-call]
    by_name = dict(zip(table["Name"].map(_plain), table["TDP"], strict=True))
    tdp = by_name.get(_plain(name))
    return None if tdp is None else float(tdp)


def _plain(name: str) -> str:
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|\b\d+-core\b|@.*$", " ", name.lower())
    return " ".join(name.split())
