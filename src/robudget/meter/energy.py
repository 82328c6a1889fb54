"""Energy of a stretch of work, in named windows that nest: `with meter.window("train") as w: …; w.energy.kwh`.

A meter reads its sources (GPU, CPU, memory) when a window opens and when it closes, after the device has finished what
it was given; in between only when somebody asks (any thread may). Every part says how it was obtained. The CPU's and
the memory's part is this process's own, so that the energies of runs side by side add up to the machine's.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol, get_args

from pydantic import BeforeValidator, TypeAdapter

How = Literal["measured", "estimated", "unknown"]
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]  # JSON has null for NaN
JOULES_PER_KWH = 3.6e6
_MEASURED_SHARE = 0.9  # an energy is called measured when at least this much of it was


@dataclass(frozen=True)
class Part:
    """One component's energy. `uncertainty` is relative (0.05 = ±5%); `raw` holds what the counters advanced by, under
    names that carry their units. `kwh` is NaN where it is unknown."""

    name: str
    kwh: Number
    how: How
    method: str
    uncertainty: Number
    raw: Mapping[str, Number] = field(default_factory=dict)

    def __add__(self, other: Part) -> Part:
        kwh = self.kwh + other.kwh
        error = self.kwh * self.uncertainty + other.kwh * other.uncertainty
        return Part(
            self.name,
            kwh,
            _worse(self.how, other.how),
            self.method if self.method == other.method else f"{self.method}; then {other.method}",
            error / kwh if kwh > 0 else max(self.uncertainty, other.uncertainty),
            {k: self.raw.get(k, 0.0) + other.raw.get(k, 0.0) for k in (*self.raw, *other.raw)},
        )


@dataclass(frozen=True)
class Energy:
    """Energy of the machine's GPU, CPU and memory, without PUE: wall seconds and one `Part` a component.

    Fans, switches, disks and the loss of the power supply are not in it, unless the user stated what they add: then
    they are the part `overhead`.

    `shared`: another process used the same GPU, so its part is not this run's alone (None where that is unknown or
    there is no GPU). `notes` say what went wrong while metering. `+` is for stretches one after the other, `beside`
    for stretches at the same time (ranks of one run).
    """

    seconds: Number
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    shared: bool | None = None

    @property
    def kwh(self) -> float:
        """The sum of the parts; NaN if any of them is unknown or there are none."""
        return sum(part.kwh for part in self.parts) if self.parts else math.nan

    @property
    def how(self) -> How:
        """`measured` if at least 90% of it was measured, `estimated` if not, `unknown` if it is NaN."""
        if math.isnan(self.kwh):
            return "unknown"
        measured = sum(part.kwh for part in self.parts if part.how == "measured")
        return "measured" if measured >= _MEASURED_SHARE * self.kwh and measured > 0 else "estimated"

    @property
    def uncertainty(self) -> float:
        """Relative; the parts' errors are added up, since they may well err together."""
        error = sum(part.kwh * part.uncertainty for part in self.parts)
        return error / self.kwh if self.kwh > 0 else math.nan

    @property
    def method(self) -> str:
        return "; ".join(f"{part.name}: {part.method}" for part in self.parts)

    def __add__(self, other: Energy) -> Energy:
        return self._joined(other, self.seconds + other.seconds)

    def beside(self, other: Energy) -> Energy:
        """Energy of both, spent at the same time: parts add up, seconds do not."""
        return self._joined(other, max(self.seconds, other.seconds))

    def _joined(self, other: Energy, seconds: float) -> Energy:
        parts: dict[str, Part] = {}
        for part in (*self.parts, *other.parts):
            parts[part.name] = parts[part.name] + part if part.name in parts else part
        flags = {flag for flag in (self.shared, other.shared) if flag is not None}
        notes = tuple(dict.fromkeys((*self.notes, *other.notes)))
        return Energy(seconds, tuple(parts.values()), notes, any(flags) if flags else None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back; the derived figures are in it for whoever reads the JSON."""
        figures = {"kwh": self.kwh, "how": self.how, "uncertainty": self.uncertainty, "method": self.method}
        return figures | asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Energy:
        return _adapter().validate_python(data)


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Energy]:
    return TypeAdapter(Energy)


@dataclass(frozen=True)
class Reading:
    """What a source has counted since it was opened: joules (NaN while it cannot be read) and its own raw counts.

    `lost` goes up whenever energy was used that can never be known. `notes`: all there are so far. `shared`: whether
    others use the device now.
    """

    joules: float
    raw: Mapping[str, float] = field(default_factory=dict)
    lost: int = 0
    notes: tuple[str, ...] = ()
    shared: bool | None = None


class Source(Protocol):
    """One component. `read` is cheap and never raises for a fault of the hardware: it counts the loss and notes it."""

    @property
    def name(self) -> str: ...
    @property
    def how(self) -> How: ...
    @property
    def method(self) -> str: ...
    @property
    def uncertainty(self) -> float: ...

    def read(self) -> Reading: ...

    def close(self) -> None: ...


class Window:
    """One stretch of work. `energy` is what it took so far and, once closed, what it took."""

    def __init__(self, meter: Meter, name: str) -> None:
        self.name = name
        self._meter = meter
        self._start = meter._read()
        self._final: Energy | None = None

    @property
    def energy(self) -> Energy:
        return self._final or self._meter._between(self._start, self._meter._read())

    def _close(self) -> None:
        self._final = self.energy


@dataclass(frozen=True)
class _Snapshot:
    time: float
    readings: tuple[Reading, ...]
    notes: int


class Meter:
    """Windows over a set of sources. `synchronise` makes the device finish what it was given; `clock` is in seconds;
    `overhead`: energy at the plug ÷ that of the sources, as the user states it (1: nothing is added)."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        synchronise: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        overhead: float = 1.0,
    ) -> None:
        self._overhead = overhead
        self.sources = tuple(sources)
        self._synchronise = synchronise
        self._clock = clock
        self._notes: list[str] = []
        self._open: list[str] = []
        self._lock = threading.Lock()

    @contextmanager
    def window(self, name: str) -> Iterator[Window]:
        """Meter what happens inside, also if it raises. Windows may nest; an inner one is part of the outer one."""
        self._settle()
        window = Window(self, "/".join((*self._open, name)))
        self._open.append(name)
        try:
            yield window
        finally:
            self._open.pop()
            self._settle()
            window._close()

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settle(self) -> None:
        # The work itself will report a device that failed; here it is only a note.
        try:
            self._synchronise()
        except RuntimeError as error:
            self._notes.append(f"the device could not be synchronised: {str(error).splitlines()[0]}")

    def _read(self) -> _Snapshot:
        with self._lock:
            return _Snapshot(self._clock(), tuple(source.read() for source in self.sources), len(self._notes))

    def _between(self, start: _Snapshot, end: _Snapshot) -> Energy:
        pairs = list(zip(start.readings, end.readings, strict=True))
        parts = tuple(_part(source, *pair) for source, pair in zip(self.sources, pairs, strict=True))
        if self._overhead > 1:
            method = f"the user's factor {self._overhead:g} on all other parts (fans, switches, loss of the supply)"
            kwh = (self._overhead - 1) * sum(part.kwh for part in parts)
            how: How = "unknown" if math.isnan(kwh) else "estimated"
            parts = (*parts, Part("overhead", kwh, how, method, 0.3))
        notes = self._notes[start.notes : end.notes]
        for before, after in pairs:
            notes += (Counter(after.notes) - Counter(before.notes)).keys()
        seconds = end.time - start.time
        if seconds < 0:
            notes.append(f"the clock went back by {-seconds:.3g} s")
            seconds = math.nan
        flags = [reading.shared for pair in pairs for reading in pair if reading.shared is not None]
        return Energy(seconds, parts, tuple(dict.fromkeys(notes)), any(flags) if flags else None)


def _part(source: Source, start: Reading, end: Reading) -> Part:
    # What a source has counted does not fall, except by rounding where totals from before were added again.
    kwh = max(end.joules - start.joules, 0.0) / JOULES_PER_KWH if end.lost == start.lost else math.nan
    raw = {key: value - start.raw.get(key, 0.0) for key, value in end.raw.items()}
    how: How = source.how if not math.isnan(kwh) else "unknown"
    return Part(source.name, kwh, how, source.method, source.uncertainty, raw)


def _worse(a: How, b: How) -> How:
    return max(a, b, key=get_args(How).index)
