"""Functions over static buffers: the bits of plain calls, captured where there is CUDA, called where that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robudget.backend.fast_paths import Compiled, asked_for, tuned_convolutions
from robudget.backend.graph import Graphs
from robudget.execution import Site
from robudget.recipe import Recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def doubled(x: Tensor, by: Tensor) -> None:
    x.mul_(2).add_(by)


def test_a_function_works_on_its_own_buffers() -> None:
    graphs = Graphs(CPU, pytest.fail)
    x, by = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    step = graphs.of("doubled", doubled, (x, by))
    step()
    step()
    assert step.buffers[0].tolist() == [34.0, 68.0]
    assert x.tolist() == [1.0, 2.0]
    again = graphs.of("doubled", pytest.fail, (x + 1, by))  # the function of the key is the first one
    assert again is step
    again()
    assert step.buffers[0].tolist() == [14.0, 26.0]
    graphs.clear()
    assert graphs.of("doubled", doubled, (x, by)) is not step


class Stream:
    waits: list[str]

    def __init__(self, *_: object) -> None:
        self.waits = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(type(other).__name__)


class Gpu:
    """torch.cuda's part of a capture: while it captures, functions are recorded and not run, as on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: str | None = None) -> None:
        self.log: list[str] = []
        self.failure, self.capturing = failure, False
        main, gpu = Stream(), self

        class CUDAGraph:
            recorded: Callable[[], object]

            def replay(self) -> None:
                gpu.log.append("replay")
                self.recorded()

        @contextmanager
        def graph(graph: Any, *, pool: object, capture_error_mode: str) -> Iterator[None]:
            assert (pool, capture_error_mode) == ("pool", "thread_local")
            self.log.append("capture")
            if self.failure is not None:
                raise RuntimeError(self.failure)
            self.capturing, self.current = True, graph
            yield
            self.capturing = False

        @contextmanager
        def stream(_: Stream) -> Iterator[None]:
            self.log.append("aside")
            yield

        names = {"CUDAGraph": CUDAGraph, "graph": graph, "stream": stream, "Stream": Stream}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.log.append(f"back: {stream is main}"))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    def kernel(self, run: Callable[..., None]) -> Callable[..., None]:
        def launched(*buffers: Tensor) -> None:
            if self.capturing:
                self.current.recorded = lambda: run(*buffers)
            else:
                self.log.append("run")
                run(*buffers)

        return launched


def test_a_capture_leaves_the_buffers_as_they_were_and_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    graphs = Graphs(CUDA, pytest.fail)
    x, by = torch.tensor([1.0]), torch.tensor([10.0])
    step = graphs.of("doubled", gpu.kernel(doubled), (x, by))
    assert gpu.log == ["aside", "run", "run", "run", "capture"]
    assert step.buffers[0].item() == 1.0  # neither the warm-up nor the capture shows
    step()
    step()
    assert gpu.log[5:] == ["replay", "replay"]
    assert step.buffers[0].item() == 34.0
    graphs.of("doubled", doubled, (x, by))()
    assert step.buffers[0].item() == 12.0
    assert gpu.log.count("capture") == 1
    assert graphs.failed is None


def test_a_capture_that_fails_is_told_once_and_plain_calls_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might…")
    heard: list[str] = []
    graphs = Graphs(CUDA, heard.append)
    for name in ("one", "other"):
        step = graphs.of(name, gpu.kernel(doubled), (torch.tensor([1.0]), torch.tensor([10.0])))
        step()
        assert step.buffers[0].item() == 12.0  # the warm-up, which ran, left no trace
    cause = "CUDA error: operation not permitted when stream is capturing"
    assert heard == [f"no CUDA graph could be captured, going on without: {cause}"]
    assert graphs.failed == cause
    assert gpu.log.count("back: True") == 1  # torch was left on the stream of the capture
    assert gpu.log.count("capture") == 1


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            raise ModuleNotFoundError("no compiler here\nmore")

        return call

    monkeypatch.setattr(torch, "compile", compiler)
    model, heard, x = nn.Linear(3, 2), list[str](), torch.rand(4, 3)
    update = Compiled(model, heard.append)
    assert torch.equal(update(x), model(x))
    assert torch.equal(update(x), model(x))
    assert heard == ["the update could not be compiled, going on without: no compiler here"]
    monkeypatch.setattr(torch, "compile", lambda model: model)
    working = Compiled(model, pytest.fail)
    assert torch.equal(working(x), model(x))
    assert working.failed is None


def test_out_of_memory_is_no_reason_to_compile_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda model: full)
    update = Compiled(nn.Linear(3, 2), pytest.fail)
    with pytest.raises(torch.OutOfMemoryError):
        update(torch.rand(4, 3))
    assert update.failed is None


def test_convolutions_are_chosen_by_timing_within_alone() -> None:
    before = torch.backends.cudnn.benchmark
    with tuned_convolutions(not before):
        assert torch.backends.cudnn.benchmark is not before
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize(
    ("changes", "site", "processes", "off"),
    [
        ({}, Site(), 1, {"compiled update": "compile=false"}),
        ({}, Site(compile=True), 8, {}),
        ({}, Site(compile=True, deterministic=True), 1, {"cudnn.benchmark": "deterministic=true"}),
        ({}, Site(compile=True, cuda_graphs=False), 1, {"CUDA graphs": "cuda_graphs=false"}),
        (
            {"loss": "trades", "craft.batchnorm": "batch"},
            Site(compile=True, cudnn_benchmark=False),
            2,
            {
                "CUDA graphs": "an attack step exchanges BatchNorm's statistics",
                "cudnn.benchmark": "cudnn_benchmark=false",
            },
        ),
        ({"loss": "trades", "craft.batchnorm": "batch"}, Site(compile=True), 1, {}),
        ({"loss": "standard"}, Site(compile=True), 1, {"CUDA graphs": "nothing is crafted"}),
        ({"loss": "free-at"}, Site(compile=True), 1, {"CUDA graphs": "the loss crafts and updates at once"}),
        (
            {},
            Site(checkpointing=True, compile=True),
            1,
            {"CUDA graphs": "checkpointing=true", "compiled update": "checkpointing=true"},
        ),
    ],
)
def test_every_fast_path_is_on_or_says_why_not(
    changes: dict[str, Any], site: Site, processes: int, off: dict[str, str]
) -> None:
    paths = asked_for(Recipe().with_(changes), site, CUDA, processes)
    assert {name: value.removeprefix("off: ") for name, value in paths.items() if value != "on"} == off
    assert set(asked_for(Recipe(), site, CPU, 1).values()) == {"off: the device is cpu"}
