"""The time of a training: of each part of a step, and when it looks at its loss, its clock and requests to stop."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

from robudget import stop
from robudget.training.distributed import World

PARTS = ("data", "craft", "update", "ema", "validation", "checkpoint")


class Stopwatch:
    """`lap(part)` adds the time since the last mark to `part`. On a GPU the marks are events in its stream, so that
    work is charged to the part that asked for it, and nothing waits before `read`."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
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
            torch.cuda.synchronize(self._gpu)
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
        if self._gpu is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._gpu))
        return event


LOOK_STEPS = 50  # at most, between two looks at the loss and the clock
LOOK_SECONDS = 5.0  # about, between two looks where steps are long: each waits for the device


class Looks:
    """The steps after which a training looks up, the same ones in all processes of `world`."""

    def __init__(self, world: World, device: torch.device) -> None:
        self._world, self._device = world, device
        self._at, self._step, self._next = time.monotonic(), -1, LOOK_STEPS

    def begin(self, step: int) -> None:
        """An epoch begins at `step`."""
        self._at, self._step = time.monotonic(), step
        self._next = min(self._next, step + LOOK_STEPS)

    def due(self, step: int) -> bool:
        """Alone, a request to stop is seen after every step; many processes agree on it at their looks."""
        return step >= self._next or (self._world.size == 1 and stop.requested())

    def agree(self, step: int, *, late: bool) -> tuple[bool, bool]:
        """What all do after `step`: save, where one of them is `late` with that, and stop, where one was asked to."""
        now = time.monotonic()
        per_step = (now - self._at) / max(step - self._step, 1)
        steps = min(max(int(LOOK_SECONDS / max(per_step, 1e-9)), 1), LOOK_STEPS)
        save, asked, ahead = self._world.largest((late, stop.requested(), steps), self._device)
        self._at, self._step, self._next = now, step, step + int(ahead)
        return bool(save), bool(asked)
