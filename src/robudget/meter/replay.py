"""A meter over recorded hardware: the same sources as for real, reading a recording at a time that you set.

    replay = Replay.load("recording.json")
    with replay.meter.window("train") as window:
        replay.advance(600)
    window.energy.kwh

A recording is a table of columns, one value per sample, null where the sample is missing: `seconds`, and any of
`gpu_joules`, `gpu_watts`, `package_joules`, `process_cpu_seconds`, `machine_cpu_seconds`; beside it `package_wraps_at`
(joules), `gpu_processes` (a number) and `memory_watts`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from robudget.meter.counters import Counter, Integral
from robudget.meter.cpu import PACKAGE_MAX_WATTS, MemorySource, ProcessShare, RaplSource
from robudget.meter.energy import Meter, Source
from robudget.meter.gpu import GPU_MAX_WATTS, CounterSource, IntegralSource

Column = Sequence[float | None]


class Replay:
    """`meter` has a source for every column that the recording has; `advance` lets time go by, sample after sample."""

    def __init__(self, recording: Mapping[str, Any]) -> None:
        self._recording = recording
        self._seconds: Sequence[float] = recording["seconds"]
        self._at = 0
        self._sources = list(self._open())
        self.meter = Meter(self._sources, clock=self._now)

    @classmethod
    def load(cls, path: str | Path) -> Replay:
        return cls(json.loads(Path(path).read_text("utf-8")))

    def advance(self, seconds: float) -> None:
        """Go on by so many seconds of the recording, reading every source at every sample as their threads would."""
        until = bisect_right(self._seconds, self._now() + seconds) - 1
        while self._at < until:
            self._at += 1
            for source in self._sources:
                source.read()

    def _now(self) -> float:
        return self._seconds[self._at]

    def _column(self, name: str) -> Callable[[], float | None]:
        values: Column = self._recording[name]
        return lambda: values[self._at]

    def _known(self, name: str) -> Callable[[], float]:
        values: Sequence[float] = self._recording[name]
        return lambda: values[self._at]

    def _share(self) -> ProcessShare:
        return ProcessShare(process=self._known("process_cpu_seconds"), machine=self._known("machine_cpu_seconds"))

    def _open(self) -> list[Source]:
        has, sources = self._recording.keys(), list[Source]()
        processes = self._recording.get("gpu_processes")
        shared = None if processes is None else processes > 1
        if "gpu_joules" in has:
            counter = Counter("NVML", self._column("gpu_joules"), self._now, max_watts=GPU_MAX_WATTS)
            sources.append(CounterSource(counter, lambda: shared))
        elif "gpu_watts" in has:
            integral = Integral("NVML", self._column("gpu_watts"), self._now)
            sources.append(IntegralSource(integral, lambda: shared, poll_seconds=None))
        if "package_joules" in has:
            package = Counter(
                "package-0",
                self._column("package_joules"),
                self._now,
                wraps_at=self._recording.get("package_wraps_at"),
                max_watts=PACKAGE_MAX_WATTS,
            )
            sources.append(RaplSource([package], self._share(), poll=False))
        if "memory_watts" in has:
            sources.append(MemorySource(self._recording["memory_watts"], self._share(), self._now))
        return sources
