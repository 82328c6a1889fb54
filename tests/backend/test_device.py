"""GPUs that vanish, drivers of two versions, devices that no one has: one line with the cause, and the run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import robudget as rb
from robudget.attacks.victim import Victim, dlr_targeted
from robudget.backend.device import answering, why_no_gpu
from robudget.benchmark import Candidate, benchmark
from robudget.environment import computing, resolve_device
from robudget.errors import InputError, OutOfMemory, RunFailed
from robudget.evaluation.specification import Specification
from robudget.evaluation.state import FILE
from robudget.evaluation.victims import on_device
from robudget.execution import Site
from robudget.meter import gpu
from robudget.recipe import Recipe
from robudget.sweep import executor
from robudget.threat import Threat
from robudget.training.step import Step

LOST = (
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported at some other API call"
)


def test_an_error_of_the_gpu_is_one_line() -> None:
    with pytest.raises(RunFailed) as caught, answering():
        raise torch.AcceleratorError(LOST)
    assert str(caught.value) == (
        "the GPU stopped answering (CUDA error: unspecified launch failure); run again to go on from what was saved"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA error: of another kind"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, answering():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_lack_of_memory_that_nothing_mends_is_one_line(error: Exception) -> None:
    line = r"^out of memory \(.*\); try a smaller batch or model.* run again"
    with pytest.raises(OutOfMemory, match=line) as caught, answering():
        raise error
    assert "\n" not in str(caught.value)


def test_a_run_without_memory_is_tried_again_with_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> str:
        raise OutOfMemory("out of memory at step 0 with 4 images at once")

    monkeypatch.setattr(executor, "run_job", short)
    assert executor.attempt(0, {}).cause == "memory"


class Place:
    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


class Elsewhere(torch.nn.Module):
    """A model on a GPU, as far as it is asked."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.places, self.moved = [Place(device) for device in devices], ""

    def parameters(self, recurse: bool = True) -> Any:
        return iter(self.places)

    def to(self, device: Any) -> Elsewhere:  # type: ignore[override]
        self.moved = str(device)
        return self


def test_a_model_on_another_gpu_is_copied_to_the_one_asked_for() -> None:
    model = Elsewhere("cuda:0")
    copy = on_device(torch.device("cuda:1"), model)
    assert isinstance(copy, Elsewhere)
    assert (copy.moved, model.moved) == ("cuda:1", "")
    for here in ("cuda:0", "cuda"):
        assert on_device(torch.device(here), model) is model
    spread = Elsewhere("cuda:0", "cuda:1")
    assert on_device(torch.device("cuda:0"), spread) is spread
    assert on_device(torch.device("cpu"), model) is not model


def test_an_evaluation_makes_its_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", current)
    with computing("cuda:1") as device:
        assert entered == [device] == [torch.device("cuda:1")]
    with computing("cuda"), computing("cpu"):
        assert len(entered) == 1
    with pytest.raises(InputError, match=r"device = 'cuda:2', but this machine has 2 CUDA GPUs"), computing("cuda:2"):
        pass
    with pytest.raises(RunFailed, match="the GPU stopped answering"), computing("cuda:1"):
        raise torch.AcceleratorError(LOST)


def test_an_evaluation_whose_gpu_vanishes_goes_on_when_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\ndef load():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    site = Site(device="cpu", threads=1)
    gradient, lost = Victim.gradient, list[bool]()

    def vanishing(self: Victim, x: Any, objective: Any, *labels: Any) -> Any:
        if objective is dlr_targeted and not lost:
            lost.append(True)
            raise torch.AcceleratorError(LOST)
        return gradient(self, x, objective, *labels)

    monkeypatch.setattr(Victim, "gradient", vanishing)
    asked = Specification(Threat("linf", 0.02), attacks=["apgd-ce:steps=5", "apgd-t:steps=5,targets=2"], checks=False)

    def evaluated() -> Any:
        candidate = Candidate.load(f"{tmp_path / 'net.py'}:load", dataset="digits", site=site)
        return benchmark(candidate, asked, images=60, out=tmp_path / "out", site=site)

    with pytest.raises(RunFailed, match=r"^the GPU stopped answering \(CUDA error: unspecified launch failure\); run"):
        evaluated()
    stages = json.loads(str(np.load(tmp_path / "out" / "state" / FILE)["about"]))["spent"]
    assert "apgd-ce" in stages  # what was done is kept
    assert len(evaluated().verdicts) == 60


def test_a_run_whose_gpu_vanishes_goes_on_when_it_is_run_again(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, site = tiny.with_({"epochs": 2}), Site(device="cpu", threads=1)
    step, seen = Step.__call__, list[int]()

    def vanishing(self: Step, x: Any, labels: Any, target: Any, number: int) -> Any:
        seen.append(number)
        if number == steps + 1 and seen.count(number) == 1:
            raise torch.AcceleratorError(LOST)
        return step(self, x, labels, target, number)

    steps = (recipe.epoch_images or 0) // recipe.batch_size
    assert steps
    monkeypatch.setattr(Step, "__call__", vanishing)
    with pytest.raises(RunFailed, match=r"the GPU stopped answering \(CUDA error: unspecified launch failure\)"):
        rb.run(recipe, store=tmp_path, site=site)
    result = rb.run(recipe, store=tmp_path, site=site)
    assert result.record["training"]["epochs"] == 2
    assert seen.count(0) == 1  # what was saved was not trained again


def test_drivers_of_two_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = "Error 803: system has unsupported display driver / cuda driver combination"

    def init() -> None:
        raise RuntimeError(f"Unexpected error from cudaGetDeviceCount(). {cause}\nmore")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cause in why_no_gpu()
    with pytest.raises(
        InputError, match=r"device = 'cuda', but this machine has 0 CUDA GPUs: .* Error 803: .*\(allowed"
    ):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert why_no_gpu() == "torch is built with CUDA 12.8 and sees no GPU"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_no_gpu() == "torch is built without CUDA"


def test_nvml_of_another_version_than_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def init() -> None:
        raise NVMLError("Driver/library version mismatch")

    monkeypatch.setitem(__import__("sys").modules, "pynvml", SimpleNamespace(nvmlInit=init, NVMLError=NVMLError))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    source = gpu.open_source("cuda:0")
    assert "NVML does not answer: Driver/library version mismatch" in source.method
    assert source.method.startswith("wall time × TDP")
    assert gpu.driver_version() is None
