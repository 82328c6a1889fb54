"""Energy of the CPU and the memory: RAPL where it can be read, else CPU time × watts; the memory's by a model."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

from robudget.errors import RobudgetError
from robudget.meter.counters import Clock, Counter, Poller, Read, without_mirrors
from robudget.meter.devices import devices
from robudget.meter.energy import How, Reading, Source

POWERCAP = Path("/sys/class/powercap")
# No package draws more: a counter of 2^32 units of 15.3 µJ (65.7 kJ) then wraps no sooner than after a minute.
PACKAGE_MAX_WATTS = 1000.0
# Below this the kernel's ticks of 10 ms are too coarse to divide by.
_SHORTEST_SECONDS = 0.5
# CodeCarbon's default for a CPU it does not know.
_WATTS_PER_THREAD = 4.0


class NoRapl(RobudgetError):
    """Why RAPL cannot be used here."""


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


# -- this process's share of the machine ------------------------------------------------------------------------------


def process_seconds() -> float:
    """CPU time of this process: all threads, and children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def machine_seconds() -> float:
    """CPU time that the machine was busy with anything, since boot."""
    t = psutil.cpu_times()
    parts = (getattr(t, name, 0.0) for name in ("nice", "irq", "softirq", "interrupt", "dpc"))
    return float(t.user + t.system + sum(parts))


class ProcessShare:
    """Splits a machine-wide quantity that only grows: from the machine's total, this process's total."""

    def __init__(
        self,
        *,
        process: Callable[[], float] = process_seconds,
        machine: Callable[[], float] = machine_seconds,
    ) -> None:
        self._process, self._machine = process, machine
        self._settled = self._latest = 0.0
        self._from = (0.0, process(), machine())

    def of(self, total: float) -> float:
        """This process's part of everything since the beginning, given the machine's `total` now (NaN: unknown).

        It never falls, so that windows side by side add up to at most the window around them: within a stretch that is
        too short to divide by, what others do later does not take back what this process was given before.
        """
        if math.isnan(total):
            return math.nan
        now = (total, self._process(), self._machine())
        growth, own, busy = (b - a for a, b in zip(self._from, now, strict=True))
        share = own / max(busy, own) if own > 0 else 0.0
        part = self._latest = max(self._latest, self._settled + growth * share)
        if busy >= _SHORTEST_SECONDS:
            self._settled, self._from = part, now
        return part


# -- RAPL -------------------------------------------------------------------------------------------------------------


class RaplSource:
    """Joules of all packages × this process's share of the machine's busy CPU time.

    The counters wrap around, so a thread reads them often enough to notice every time that they do.
    """

    name = "cpu"
    how: How = "measured"
    method = "RAPL package counters × share of the machine's busy CPU time"
    uncertainty = 0.1

    def __init__(self, counters: Sequence[Counter], share: ProcessShare, *, poll: bool = True) -> None:
        self._counters, self._share = list(counters), share
        self._lock = threading.Lock()
        patience_seconds = min(counter.patience_seconds for counter in counters)
        self._poller = Poller(self.read, patience_seconds / 3) if poll else None

    def read(self) -> Reading:
        with self._lock:
            totals = [counter.total() for counter in self._counters]
            raw = {f"rapl_{counter.name}_joules": total for counter, total in zip(self._counters, totals, strict=True)}
            lost = sum(counter.lost for counter in self._counters)
            notes = tuple(note for counter in self._counters for note in counter.notes)
            return Reading(self._share.of(sum(totals)), raw, lost, notes)

    def close(self) -> None:
        if self._poller is not None:
            self._poller.close()


def open_counters(root: Path = POWERCAP) -> list[Counter]:
    """The packages' counters. Raises NoRapl with the reason: no such files, or no permission to read them."""
    zones = sorted(path for path in root.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", path.name))
    packages = [zone for zone in zones if (_text(zone / "name") or "").startswith("package")]
    if not packages:
        raise NoRapl("no RAPL here")
    energies = [_number(zone / "energy_uj") for zone in packages]
    readable = [(zone, energy) for zone, energy in zip(packages, energies, strict=True) if energy is not None]
    if len(readable) < len(packages):
        raise NoRapl("RAPL is here but may not be read (permission of its energy_uj files)")
    keep = without_mirrors([energy / 1e6 for _, energy in readable])
    return [_counter(readable[index][0]) for index in keep]


def _counter(zone: Path) -> Counter:
    span = _number(zone / "max_energy_range_uj")
    return Counter(
        _text(zone / "name") or zone.name,
        _joules(zone / "energy_uj"),
        time.monotonic,
        wraps_at=None if span is None else span / 1e6,
        max_watts=PACKAGE_MAX_WATTS,
    )


def _joules(path: Path) -> Read:
    def read() -> float | None:
        value = _number(path)
        return None if value is None else value / 1e6

    return read


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    return float(text) if text is not None and text.isdigit() else None


# -- CPU time × watts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuPower:
    """What one busy hardware thread draws, and how that is known."""

    watts_per_thread: float
    method: str
    uncertainty: float


class TimeSource:
    """CPU seconds of this process × watts of a busy thread. Power that the machine draws when idle is not in it."""

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


@lru_cache(maxsize=1)
def cpu_power() -> CpuPower:
    """Thermal design power per thread of this machine's CPU: by our table, else CodeCarbon's, else its default of 4 W.

    A virtual machine has a few of its host's threads, so only a table that says how many the CPU has is used there.
    """
    name, virtual, sockets = identity()
    cpu = next((d for d in devices().values() if d.kind == "cpu" and plain(d.name) == plain(name)), None)
    if cpu is not None:
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
    """Model name, whether this is a virtual machine, number of sockets: from /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return "", False, 1
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", text, re.MULTILINE)
    sockets = set(re.findall(r"^physical id\s*:\s*(\d+)", text, re.MULTILINE))
    return (names[0].strip() if names else ""), flags is not None, max(len(sockets), 1)


def plain(name: str) -> str:
    """A CPU's name without trademarks, clock and core count, in lower case: the form in which tables are searched."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|\b\d+-core\b|@.*$", " ", name.lower())
    return " ".join(name.split())


def _tdp(name: str) -> float | None:
    """Watts of the CPU named as in /proc/cpuinfo, by CodeCarbon's table."""
    from codecarbon.input import DataSource

    table = DataSource().get_cpu_power_data()  # type: ignore[no-untyped-call]
    by_name = dict(zip(table["Name"].map(plain), table["TDP"], strict=True))
    tdp = by_name.get(plain(name))
    return None if tdp is None else float(tdp)


@lru_cache(maxsize=1)
def memory_watts() -> float:
    """What the machine's memory draws by CodeCarbon's model: 5 W a module (1.5 W on Arm), modules by total size."""
    from codecarbon.external.ram import RAM

    return float(RAM(tracking_mode="machine").total_power().W)


class MemorySource:
    """Watts of the machine's memory × seconds × this process's share of the busy CPU time."""

    name = "memory"
    how: How = "estimated"
    uncertainty = 0.5

    def __init__(self, watts: float, share: ProcessShare, clock: Clock = time.monotonic) -> None:
        self.method = f"{watts:.3g} W of memory (CodeCarbon's model) × share of the machine's busy CPU time"
        self._watts, self._share, self._clock = watts, share, clock
        self._start = clock()

    def read(self) -> Reading:
        return Reading(self._share.of(self._watts * (self._clock() - self._start)))

    def close(self) -> None:
        pass
