"""Functions over tensors that stay where they are: a CUDA graph in place of many launches, else plain calls.

A GPU waits for the host where kernels are short: an attack step of a small network is hundreds of launches. A captured
function has to work in place on its buffers alone, and must not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from robudget.errors import first_line

Function = Callable[..., object]
_CUDA: Any = torch.cuda  # which has no types
_WARM_UP = 3  # calls before a capture, on a stream of their own (torch's notes on CUDA graphs), for libraries to choose


class Captured:
    """`captured.load(*values)`, then `captured()` calls `function(*buffers)`, which changes `buffers` in place."""

    def __init__(self, function: Function, buffers: Sequence[Tensor]) -> None:
        self.buffers, self._function = list(buffers), function
        self._replay: Callable[[], object] | None = None

    def load(self, *values: Tensor) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.copy_(value)

    def __call__(self) -> None:
        if self._replay is not None:
            self._replay()
        else:
            self._function(*self.buffers)

    def capture(self, pool: Any) -> None:
        """Record the function as a CUDA graph and replay that from now on; the buffers' values are left as they are."""
        before = [buffer.clone() for buffer in self.buffers]
        device = self.buffers[0].device
        aside = _CUDA.Stream(device)
        aside.wait_stream(_CUDA.current_stream(device))
        with _CUDA.stream(aside):
            for _ in range(_WARM_UP):
                self._function(*self.buffers)
        main = _CUDA.current_stream(device)
        main.wait_stream(aside)
        graph = _CUDA.CUDAGraph()
        try:
            # Other threads (a checkpoint's writer) may use CUDA meanwhile.
            with _CUDA.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._function(*self.buffers)
        except RuntimeError:
            _CUDA.set_stream(main)  # a capture that fails at its end leaves torch on the stream that it captured
            raise
        self.load(*before)
        self._replay = graph.replay


class Graphs:
    """`graphs.of(key, function, values)`: the function of that key, over buffers that hold `values`.

    Captured once a key where the device has CUDA graphs; the graphs share their memory, so one runs at a time. Where a
    capture fails, `notify` is told once, `failed` says why, and functions are called as they are from then on.
    """

    def __init__(self, device: torch.device, notify: Callable[[str], None]) -> None:
        self._cuda, self._notify = device.type == "cuda", notify
        self._known: dict[Hashable, Captured] = {}
        self._pool: Any = None
        self.failed: str | None = None

    def of(self, key: Hashable, function: Function, values: Sequence[Tensor]) -> Captured:
        known = self._known.get(key)
        if known is not None:
            known.load(*values)
            return known
        # Copies: what is captured is where the tensors lie.
        self._known[key] = fresh = Captured(function, [value.clone() for value in values])
        if self._cuda and self.failed is None:
            self._capture(fresh)
            fresh.load(*values)  # a warm-up may have changed them before the capture failed
        return fresh

    def clear(self) -> None:
        """Forget all functions and give their memory back."""
        self._known.clear()
        self._pool = None

    def _capture(self, fresh: Captured) -> None:
        try:
            if self._pool is None:
                self._pool = _CUDA.graph_pool_handle()
            fresh.capture(self._pool)
        except RuntimeError as error:
            self.failed = first_line(error)
            self._notify(f"no CUDA graph could be captured, going on without: {self.failed}")
