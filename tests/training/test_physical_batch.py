"""The same training with fewer images at once: split where images are independent, else kept in the CPU's memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robudget import data
from robudget.backend import host_memory
from robudget.backend.batch_size import Physical, free_bytes
from robudget.backend.precision import Precision
from robudget.errors import InputError, OutOfMemory
from robudget.execution import Site
from robudget.models import build
from robudget.recipe import Recipe
from robudget.training import Trainer, memory
from robudget.training.clock import Stopwatch
from robudget.training.distributed import World
from robudget.training.memory import images_that_fit
from robudget.training.optimisation import build_optimizer
from robudget.training.records import PHASES
from robudget.training.step import Step

CPU = torch.device("cpu")


class Independent(nn.Module):
    """A classifier whose images don't know of each other: its normalisation is over each image's own channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, 4)
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.most = max(self.most, len(x))
        logits: Tensor = self.head(self.body(x).flatten(1))
        return logits


def trained(kind: str, images: int, **changes: Any) -> tuple[nn.Module, Counter[str], list[Any]]:
    base = {"threat.eps": 0.1, "craft.steps": 2, "optim.lr": 0.1}
    recipe = Recipe().with_(base | {k.replace("__", "."): v for k, v in changes.items()})
    torch.manual_seed(0)
    model = (
        Independent().train() if kind == "independent" else build("wrn-10-1", classes=4, image_size=8, base=2).train()
    )
    calls: Counter[str] = Counter(dict.fromkeys(PHASES, 0))
    step = Step(
        recipe,
        model,
        build_optimizer(model, recipe.optim, 0.1),
        None,
        precision=Precision("float32", CPU),
        craft_precision=Precision("float32", CPU),
        world=World(),
        watch=Stopwatch(CPU),
        calls=calls,
        steps_per_epoch=1,
        physical=Physical(images),
    )
    x, y = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4
    outcomes = [step(x, y, y, number) for number in range(2)]
    return model, calls, [(float(o.loss), o.clean, o.crafted) for o in outcomes]


LOSSES: list[dict[str, Any]] = [
    {},
    {"loss": "standard"},
    {"loss": "trades"},
    {"loss": "mart"},
    {"awp__gamma": 0.01},
    {"loss": "trades", "awp__gamma": 0.01, "threat__norm": "l2", "threat__eps": 0.5},
    {"loss": "free-at"},
    {"loss": "trades", "craft__batchnorm": "batch"},
]


@pytest.mark.parametrize("changes", LOSSES, ids=str)
@pytest.mark.parametrize("kind", ["independent", "batchnorm"])
def test_fewer_at_once_train_the_same(kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []
    monkeypatch.setattr(host_memory, "_elsewhere", lambda t: bool(moved.append(t.shape)) or True)
    whole, calls, outcomes = trained(kind, 0, **changes)
    assert not moved
    parts, calls_of_parts, outcomes_of_parts = trained(kind, 5, **changes)
    assert calls == calls_of_parts
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for one, other in zip(outcomes, outcomes_of_parts, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        assert one[1:] == other[1:]
    kept = kind == "batchnorm" or changes.get("loss") == "free-at"
    assert bool(moved) == kept
    assert all(shape[0] == 12 for shape in moved)
    if not kept:
        assert isinstance(parts, Independent)
        assert parts.most == 5


def test_what_waits_in_the_cpus_memory_keeps_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_elsewhere", lambda t: True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    x = torch.rand(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    results = []
    for context in (torch.enable_grad(), host_memory.kept_on_host(6)):
        with context:
            out = torch.conv2d(x, weight).relu().square().sum()
        saved = out.grad_fn.next_functions[0][0]._saved_self  # type: ignore[union-attr]
        results.append((torch.autograd.grad(out, weight)[0], saved))
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][1].is_contiguous(memory_format=torch.channels_last)


RECIPE = Recipe.load("digits").with_(
    {
        "model.base": 2,
        "epochs": 1,
        "epoch_images": 96,
        "batch_size": 32,
        "validation.images": 16,
        "collapse.action": "off",
        "loss": "trades",
        "awp.gamma": 0.01,
    }
)


def failing(trainer: Trainer, above: int, error: BaseException) -> None:
    """Its model has no memory for the backward pass of more than so many images, found out in the forward pass."""
    forward = trainer.model.forward

    def call(x: Tensor) -> Tensor:
        logits = forward(x)
        if len(x) > above and not trainer.physical.images and torch.is_grad_enabled():
            raise error
        return logits

    trainer.model.forward = call  # type: ignore[method-assign]


def test_out_of_memory_goes_on_with_half(tmp_path: Path) -> None:
    digits = data.load("digits")
    whole, heard = Trainer(RECIPE, digits), list[str]()
    list(whole)
    short = Trainer(RECIPE, digits, notify=heard.append)
    failing(short, 16, RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    list(short)
    assert heard == ["out of memory with 32 images at once, going on with 16: the same training, slower"]
    assert short.physical.images == 16
    assert whole.records[-1].calls == short.records[-1].calls  # the pass that failed is not counted
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(short.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_physical_batch_is_what_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert images_that_fit(512, 1, 1000, 0, None) == 0  # a CPU
    assert images_that_fit(512, 1, 1000, 0, 512_000) == 0
    assert images_that_fit(512, 1, 1000, 1, 512_000) == 256  # weights, gradients and momentum count too
    assert images_that_fit(512, 2, 1000, 0, 512_000) == 256  # both the clean and the adversarial image
    assert images_that_fit(512, 1, 1000, 0, 100_000) == 64
    assert images_that_fit(512, 1, 1000, 0, 1) == 4  # a step will tell
    assert images_that_fit(6, 1, 1000, 0, 1) == 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40_000)
    heard: list[str] = []
    digits = data.load("digits")
    few = Trainer(RECIPE, digits, notify=heard.append, activation_bytes=1000)
    parameters = sum(p.numel() for p in few.model.parameters())
    low = few.precision.name == "bfloat16"
    assert few.physical.images == images_that_fit(32, 2, 1000 // (1 + low), parameters, 40_000)
    assert 0 < few.physical.images < 32
    assert heard == [f"0.0 GB are free, too few for 32 images at once: going on with {few.physical.images}"]
    list(few)  # and it trains
    assert Trainer(RECIPE, digits, activation_bytes=None).physical.images == 0
    assert Trainer(RECIPE, digits, Site(physical_batch=16), activation_bytes=1000).physical.images == 16
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 40)
    assert Trainer(RECIPE, digits, activation_bytes=1000).physical.images == 0


def test_free_memory_is_that_of_the_device_and_of_torchs_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"memory_reserved": 700, "memory_allocated": 300, "mem_get_info": (1000, 5000)}
    for name, value in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda", 0)) == 1400
    assert free_bytes(CPU) is None


def test_no_memory_at_all_is_one_line() -> None:
    trainer = Trainer(RECIPE, data.load("digits"), notify=lambda text: None)

    def nothing(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore of it")

    trainer._step._craft = nothing  # type: ignore[assignment, method-assign]
    with pytest.raises(
        OutOfMemory, match=r"^out of memory at step 0 with 4 images at once: CUDA out of memory\. Tried .*"
    ):
        list(trainer)
    with pytest.raises(InputError, match="physical_batch = -1"):
        Site(physical_batch=-1)
