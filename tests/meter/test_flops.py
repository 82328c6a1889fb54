"""Counts on shapes alone against torch's counter over the real thing."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robudget import losses
from robudget.data.dataset import Dataset, Split
from robudget.meter import conventions as convention
from robudget.meter import flops
from robudget.meter.flops import training_calls
from robudget.models.build import build
from robudget.recipe import Recipe
from robudget.training import Trainer


class TorchCounter(TorchDispatchMode):
    """torch's formulas over whatever really runs. (FlopCounterMode's module hooks forbid autograd.grad of a leaf.)"""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def on_meta(name: str, size: int = 32) -> nn.Module:
    with torch.device("meta"):
        return build(name, classes=10, image_size=size)


def pictures(n: int, size: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 10
    names = tuple(str(i) for i in range(10))
    return Dataset("cifar10", Split(images, labels), Split(images, labels), names, "0" * 16)


@pytest.mark.parametrize("name", convention.PAPER_MODELS)
def test_the_papers_models_on_shapes_alone(name: str) -> None:
    depth, width = convention.PAPER_MODELS[name]
    counted = flops.count(on_meta(name), (3, 32, 32))
    assert counted.forward == convention.wrn_forward_flops(depth, width)
    assert counted.parameters == convention.wrn_parameters(depth, width)
    for loss in ("at", "trades"):
        for steps in (1, 2, 5, 7, 10):
            n = losses.passes_per_image(loss, steps)
            calls = {
                f"{phase}_{kind}": getattr(n, f"{phase}_{kind}")
                for phase in ("craft", "update")
                for kind in ("forward", "backward")
            }
            exact = sum(flops.totals(counted, calls).values())
            assert exact == pytest.approx(convention.exact_factor(loss, steps) * counted.forward, rel=1e-3)
    assert counted.uncounted_share < 1e-3
    assert set(counted.uncounted) >= {"relu"}


RUNS = {
    "at": {"loss": "at", "craft.steps": 2},
    "trades-ema": {"loss": "trades", "craft.steps": 1, "ema.decay": 0.9},
    "standard": {"loss": "standard"},
    "mart": {"loss": "mart", "craft.steps": 1},
    "ikl by cross-entropy": {"loss": "ikl", "craft.steps": 1, "craft.objective": "ce"},
    "aligned": {"craft.steps": 1, "craft.grad_align": 0.2},
    "grad-norm": {"loss": "grad-norm", "beta": 1},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["wrn-10-1", "vit_tiny_patch16_224"])
def test_exact_is_what_a_counter_counts_over_a_real_training(name: str, run: str) -> None:
    recipe = Recipe.from_dict({"model": {"name": name}}).with_(
        {
            **RUNS[run],
            "batch_size": 8,
            "epoch_images": 16,
            "epochs": 1,
            "precision": "float32",
            "validation.fraction": 0.2,
            "validation.steps": 2,
        }
    )
    trainer = Trainer(recipe, pictures(100, 32))
    with TorchCounter() as counter:
        (record,) = list(trainer)
    calls = training_calls(recipe, record.calls, record.steps)
    counted = flops.count(trainer.model, (3, 32, 32), twice=recipe.differentiates_twice)
    by_phase = flops.totals(counted, calls)
    average = by_phase.pop("ema", 0.0)  # element by element, which torch's counter leaves out
    assert sum(by_phase.values()) == counter.flops
    assert average == (3 * record.steps * sum(p.numel() for p in trainer.model.parameters()) if "ema" in run else 0)
    assert {"validation_forward", "update_backward"} <= by_phase.keys()


def test_a_resumed_training_counts_what_one_in_one_go_counts(tmp_path) -> None:
    recipe = Recipe.from_dict({"model": {"name": "wrn-10-1", "base": 4}}).with_(
        {"craft.steps": 1, "batch_size": 8, "epoch_images": 16, "epochs": 3, "validation.steps": 1}
    )
    dataset = pictures(60, 8)
    straight = list(Trainer(recipe, dataset))[-1]
    for _ in range(3):  # each attempt is killed after one epoch
        record = next(iter(Trainer(recipe, dataset, folder=tmp_path)))
    assert record.calls == straight.calls
    counted = flops.count(Trainer(recipe, dataset).model, (3, 8, 8))
    whole = sum(flops.totals(counted, straight.calls).values())
    half = {name: n / 2 for name, n in straight.calls.items()}  # one of two ranks
    assert 2 * sum(flops.totals(counted, half).values()) == whole


def test_a_model_is_left_as_it_was_and_counted_once() -> None:
    model = build("wrn-10-1", classes=10, image_size=16, base=4)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = flops.count(model, (3, 16, 16))
    assert flops.count(model, (3, 16, 16)) is first
    assert flops.count(model, (3, 8, 8)) is not first
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.device.type == "cpu"
    recipe = Recipe.from_dict({"model": {"name": "wrn-10-1", "base": 4}})
    assert flops.of_recipe(recipe, 10, (3, 16, 16)).forward == first.forward
    assert flops.of_recipe(recipe, 10, (3, 16, 16)) is flops.of_recipe(recipe.with_({"epochs": 7}), 10, (3, 16, 16))
    equal = Recipe.from_dict({"model": {"name": "wrn-10-1", "base": 4}, "seed": 1})
    assert flops.of_recipe(equal, 10, (3, 16, 16)) is flops.of_recipe(recipe, 10, (3, 16, 16))


def test_an_attack_step_is_a_forward_and_the_inputs_backward() -> None:
    model = build("wrn-10-1", classes=10, image_size=16, base=4)
    counted = flops.count(model, (3, 16, 16))
    x = torch.rand(4, 3, 16, 16, requires_grad=True)
    with TorchCounter() as counter:  # the weights still ask for gradients; autograd is asked for x's
        torch.autograd.grad(model.eval()(x).sum(), x)
    assert counter.flops == 4 * (counted.forward + counted.input_backward)


def test_grouped_convolutions_are_not_charged_once_per_group() -> None:
    grouped = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False, groups=4))
    counted = flops.count(grouped, (8, 10, 10))
    by_hand = 2 * 16 * (8 // 4) * 9 * 100
    assert counted.forward == by_hand
    assert counted.update_backward == by_hand  # the weights' gradient alone: it is the first layer
    assert counted.full_backward == 2 * by_hand


class Moody(nn.Module):
    """Looks at its data before it decides what to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x.flatten(1))
        return h if float(h.detach().sum()) > 1e9 else 2 * h


def test_control_flow_that_depends_on_data_is_counted_on_real_images() -> None:
    counted = flops.count(Moody(), (3, 2, 2))
    assert counted.forward == 2 * 12 * 5
    assert "real images" in counted.method
    assert counted.uncounted_share == pytest.approx(sum(counted.uncounted.values()))
    assert counted.uncounted_share > 0


def test_activation_bytes_are_what_autograd_keeps() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1, bias=False)
    )
    counted = flops.count(model, (3, 8, 8))
    # The image (input of the first convolution) and the ReLU's output, which is also the second convolution's input.
    assert counted.activation_bytes == 4 * (3 * 64 + 4 * 64)


def test_unknown_passes_are_refused() -> None:
    counted = flops.count(on_meta("wrn-10-1"), (3, 32, 32))
    with pytest.raises(ValueError, match="unknown pass 'forwards'"):
        flops.totals(counted, {"forwards": 1})
    assert flops.totals(counted, {"apgd-ce_backward": 2}) == {"apgd-ce_backward": 2 * counted.input_backward}


def test_counting_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flops.count(on_meta("wrn-16-2"), (3, 32, 32))


def test_a_count_that_was_kept_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load("digits", {"model.activation": "silu"})
    counted = flops.of_recipe(recipe, 10, (1, 8, 8))
    monkeypatch.setenv("ROBUDGET_CACHE", str(tmp_path))
    monkeypatch.delenv("ROBUDGET_REMEMBER")
    for _ in range(2):
        flops._of_part.cache_clear()
        assert flops.of_recipe(recipe, 10, (1, 8, 8)) == counted
    assert len(list(tmp_path.glob("numbers/flops-*.json"))) == 1
    monkeypatch.setattr(flops, "count", lambda *arguments: pytest.fail("it was counted again"))
    flops._of_part.cache_clear()
    assert flops.of_recipe(recipe, 10, (1, 8, 8)) == counted
