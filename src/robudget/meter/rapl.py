"""Energy of the CPU packages by RAPL, Linux' powercap files (Intel since Sandy Bridge, AMD since Zen)."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from robudget.errors import RobudgetError
from robudget.meter.counters import Counter, Read, without_mirrors
from robudget.meter.energy import How, Reading
from robudget.meter.poller import Poller
from robudget.meter.share import ProcessShare

POWERCAP = Path("/sys/class/powercap")
# No package draws more; a counter of 2^32 units of 15.3 µJ (65.7 kJ) then wraps no sooner than after a minute.
PACKAGE_WATTS = 1000.0


class NoRapl(RobudgetError):
    """Why RAPL cannot be used here."""


class RaplSource:
    """Joules of all packages × this process's share of the machine's busy CPU time.

    The counters wrap, so a thread reads them often enough that no wrap goes unseen.
    """

    name = "cpu"
    how: How = "measured"
    method = "RAPL package counters × share of the machine's busy CPU time"
    uncertainty = 0.1

    def __init__(self, counters: Sequence[Counter], share: ProcessShare, *, poll: bool = True) -> None:
        self._counters, self._share = list(counters), share
        self._lock = threading.Lock()
        patience = min(counter.patience for counter in counters)
        self._poller = Poller(self.read, patience / 3) if poll else None

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
        max_watts=PACKAGE_WATTS,
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
