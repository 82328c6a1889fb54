"""GPUs that vanish, drivers of two versions, devices that no one has: one line with the cause, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import robudget as rb
from robudget.backend.device import answering, why_no_gpu
from robudget.environment import resolve_device
from robudget.errors import InputError, RunFailed
from robudget.execution import Site
from robudget.meter import gpu
from robudget.recipe import Recipe
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
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA error: of another kind"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, answering():
        raise error
    assert caught.value is error


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
