"""Energy of the CPU: RAPL where it can be read, else CPU time × the user's watts or the thermal design power."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from robudget.meter.devices import devices
from robudget.meter.energy import How, Reading, Source
from robudget.meter.rapl import POWERCAP, NoRapl, RaplSource, open_counters
from robudget.meter.share import ProcessShare, process_seconds

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

    def __init__(self, power: CpuPower, why: str = "") -> None:
        self.method = f"{power.method}; {why}" if why else power.method
        self.uncertainty = power.uncertainty
        self._watts = power.watts_per_thread

    def read(self) -> Reading:
        seconds = process_seconds()
        return Reading(seconds * self._watts, {"cpu_seconds": seconds})

    def close(self) -> None:
        pass


def open_source(share: ProcessShare, watts: float | None = None, *, powercap: Path = POWERCAP) -> Source:
    """The best source for the CPU; `watts`: what all CPUs of the machine draw under full load, by the user."""
    try:
        return RaplSource(open_counters(powercap), share)
    except NoRapl as error:
        why = str(error)
    if watts is None:
        return TimeSource(cpu_power(), why)
    threads = os.cpu_count() or 1
    return TimeSource(CpuPower(watts / threads, f"CPU time × the user's {watts:g} W / {threads} threads", 0.3), why)


@lru_cache(maxsize=1)
def cpu_power() -> CpuPower:
    """Thermal design power per thread of this machine's CPU: by our table, by CodeCarbon's, else its 4 W a thread.

    A virtual machine has a few of its host's threads, so only a table that knows how many those are can serve there.
    """
    name, virtual, sockets = identity()
    known = [device for device in devices().values() if device.kind == "cpu" and plain(device.name) == plain(name)]
    if known:
        cpu = known[0]
        method = f"CPU time × TDP {cpu.watts:g} W / {cpu.threads} threads ({cpu.name})"
        return CpuPower(cpu.watts / cpu.threads, method, 0.4)
    tdp = None if virtual else _tdp(name)
    if tdp is None:
        why = "a virtual machine does not tell its host's TDP" if virtual else "its TDP is not known"
        method = f"CPU time × {_WATTS_PER_THREAD:g} W a thread (CodeCarbon's default; {name or 'unnamed CPU'}: {why})"
        return CpuPower(_WATTS_PER_THREAD, method, 0.6)
    threads = os.cpu_count() or 1
    method = f"CPU time × TDP {tdp:g} W × {sockets} / {threads} threads ({name}, CodeCarbon's table)"
    return CpuPower(tdp * sockets / threads, method, 0.4)


def identity() -> tuple[str, bool, int]:
    """Model name, whether this is a virtual machine, number of sockets: as /proc/cpuinfo tells."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return "", False, 1
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", text, re.MULTILINE)
    sockets = set(re.findall(r"^physical id\s*:\s*(\d+)", text, re.MULTILINE))
    return (names[0].strip() if names else ""), flags is not None, max(len(sockets), 1)


def plain(name: str) -> str:
    """A CPU's name without trademarks, clock and core count, in lower case: what tables can be searched by."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|\b\d+-core\b|@.*$", " ", name.lower())
    return " ".join(name.split())


def _tdp(name: str) -> float | None:
    """Watts of the CPU named as in /proc/cpuinfo, by CodeCarbon's table."""
    from codecarbon.input import DataSource

    table = DataSource().get_cpu_power_data()  # type: ignore[no-untyped-call]
    by_name = dict(zip(table["Name"].map(plain), table["TDP"], strict=True))
    tdp = by_name.get(plain(name))
    return None if tdp is None else float(tdp)
