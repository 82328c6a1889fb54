"""Where an epoch's time goes."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

PARTS = ("data", "craft", "update", "ema", "validation", "checkpoint")


class Stopwatch:
    """`lap(part)` adds the time since the last mark to `part`. On a GPU the marks are events in its stream, so that
    work is charged to the part that asked for it, and nothing waits before `read`."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
        self._mark = self._now()

    def start(self) -> None:
        """Forget the time since the last mark."""
        self._mark = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        if isinstance(now, float):
            assert isinstance(self._mark, float)
            self._seconds[part] += now - self._mark
        else:
            assert isinstance(self._mark, torch.cuda.Event)
            self._events[part].append((self._mark, now))
        self._mark = now

    def read(self) -> dict[str, float]:
        """Seconds by part since the last `clear`."""
        if self._events:
            torch.cuda.synchronize()
            for part, spans in self._events.items():
                self._seconds[part] += sum(begin.elapsed_time(end) for begin, end in spans) / 1000
            self._events.clear()
        return dict(self._seconds)

    def clear(self, seconds: dict[str, float] | None = None) -> None:
        """Begin at zero, or at the seconds that an interrupted epoch had reached."""
        self._events.clear()
        self._seconds = dict(seconds) if seconds is not None else dict.fromkeys(PARTS, 0.0)
        self.start()

    def _now(self) -> float | torch.cuda.Event:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
