"""Which arithmetic "float32" is on CUDA, stage by stage, and which errors are a lack of memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from robudget import data
from robudget.attacks.victim import Victim, out_of_memory
from robudget.backend.precision import float32_as
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.measurement import Setting, prepared
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.threat import Threat
from robudget.training import Trainer


def tf32() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("asked", [False, True])
def test_the_switches_are_set_and_put_back(asked: bool) -> None:
    before = tf32()

    def fail() -> None:
        with float32_as(tf32=asked):
            assert tf32() == (asked, asked)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert tf32() == before


def test_torchs_newer_switches_are_honoured() -> None:
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        conv.fp32_precision = "tf32"  # from here on the older switch refuses to answer
        with float32_as(tf32=False):
            assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
        assert conv.fp32_precision == "tf32"
    finally:
        conv.fp32_precision, matmul.fp32_precision = before
        torch.backends.cudnn.allow_tf32 = True


class Watching(nn.Module):
    """A linear classifier of 8×8 images that notes the switches at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[bool, bool]] = set()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(tf32())
        logits: Tensor = self.head(x.flatten(1))
        return logits


def test_every_verdict_is_by_ieee_float32() -> None:
    model, images = Watching(), data.load("digits").test.first(20)
    verdicts = evaluate(model, images.unit()[:, :1], images.labels, Threat("linf", 0.1), attacks=["apgd-ce"])
    assert model.seen == {(False, False)}
    assert verdicts.about["arithmetic"] == {"verdicts": "IEEE float32", "attacks": "IEEE float32"}


def test_every_measurement_is_by_ieee_float32() -> None:
    model, images = Watching(), data.load("digits").test.first(4)
    before = tf32()
    with prepared(model, images.unit()[:, :1], images.labels, Setting()) as work:
        assert tf32() == (False, False)
        work.run([work.clean()], {})
    assert model.seen == {(False, False)}
    assert tf32() == before


@pytest.mark.parametrize("asked", [False, True])
def test_a_training_uses_tensorfloat_only_where_asked_and_never_to_validate(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robudget.training.step import Step
    from robudget.training.validation import Validator

    seen: dict[str, tuple[bool, bool]] = {}
    for name, kind in (("step", Step), ("validation", Validator)):
        call = kind.__call__

        def watched(self, *args, name=name, call=call):  # type: ignore[no-untyped-def]
            seen[name] = tf32()
            return call(self, *args)

        monkeypatch.setattr(kind, "__call__", watched)
    changes = {"model.base": 2, "epochs": 1, "epoch_images": 64, "batch_size": 32, "validation.steps": 1}
    list(Trainer(Recipe.load("digits").with_(changes), data.load("digits"), Site(tf32=asked)))
    assert seen == {"step": (asked, asked), "validation": (False, False)}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_lack_of_memory_is_recognised(error: RuntimeError) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_memory_is_given_back_after_the_failed_calls_tensors_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive_at_release: list[bool] = []

    def model(x: Tensor) -> Tensor:
        activation = x * 2
        if len(x) > 4:
            held.append(weakref.ref(activation))
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return activation.flatten(1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive_at_release.append(held[-1]() is not None))
    gc.disable()  # only the reference count may free it
    try:
        with pytest.warns(UserWarning, match="out of memory at batch 8: going on with 4"):
            assert len(Victim(model, most=8).logits(torch.rand(8, 1, 2, 2))) == 8
    finally:
        gc.enable()
    assert alive_at_release == [False]
