"""The stopwatch of a GPU, by a stand-in: events go to the stream of its own device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robudget.training.clock import Stopwatch


def test_events_go_to_the_stream_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self, stream: str) -> None:
            used.append(stream)
            self.at = float(len(used))

        def elapsed_time(self, other: Event) -> float:
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: used.append(f"wait for {device}"))
    watch = Stopwatch(torch.device("cuda:1"))
    watch.lap("craft")
    watch.lap("update")
    assert used == ["stream of cuda:1"] * 3  # nothing waits before it is read
    seconds = watch.read()
    assert used[-1] == "wait for cuda:1"
    assert (seconds["craft"], seconds["update"], seconds["data"]) == (1.0, 1.0, 0.0)
