"""What a training reports, epoch by epoch: plain numbers; and the stopwatch behind its seconds."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch

# The phases of `EpochRecord.calls`.
PHASES = (
    "craft_forward",
    "craft_backward",
    "update_forward",
    "update_backward",
    "recompute_forward",
    "validation_forward",
    "validation_backward",
)


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. Accuracies are fractions; unknown is None.

    `epoch` counts from 1; `steps` and `images` (of the mixed stream) are cumulative. `train_loss` is the mean over this
    epoch's updates, `train_acc` the accuracy on their clean images where the loss sees those (standard, TRADES, MART),
    `craft_acc` that on the crafted images. `val_clean` and `val_robust` are None in an epoch without validation. `lr`
    is the last update's. `one_step` and `multi_step` are what the collapse watch saw, `collapsed` what it concluded.

    `seconds`: this epoch's time by part (data, craft, update, ema, validation, checkpoint). `calls`: image-passes since
    the start of the run, resumed parts and all processes included, by phase; multiply by FLOPs per image:
    `craft_forward`, `craft_backward` (gradient of the input), `update_forward`, `update_backward` (gradient of the
    weights; for Free-AT of both), `recompute_forward` (activation checkpointing), `validation_forward`,
    `validation_backward` (gradient of the input; the collapse watch's passes are among these).
    """

    epoch: int
    steps: int
    images: int
    train_loss: float
    train_acc: float | None
    craft_acc: float | None
    val_clean: float | None
    val_robust: float | None
    val_images: int
    lr: float
    best: bool
    one_step: float | None = None
    multi_step: float | None = None
    collapsed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Best:
    """The best checkpoint: its epoch (from 1) and its validation, as fractions."""

    epoch: int
    val_clean: float
    val_robust: float

    def score(self, by: str) -> tuple[float, float]:
        """What is compared: robust accuracy first, or clean first for a loss that is not adversarial."""
        return (self.val_robust, self.val_clean) if by == "val_robust" else (self.val_clean, self.val_robust)


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
