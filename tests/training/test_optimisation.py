"""Optimizers, schedules and averages against torch's own and against values worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from robudget.errors import InputError
from robudget.recipe.parts import EmaPart, OptimPart
from robudget.training.optimisation import Ema, average_of, build_optimizer, lr_at, parameter_groups, peak_lr


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def take_steps(model: nn.Module, optimizer: object, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()  # type: ignore[attr-defined]
        model(torch.rand(8, 1, 4, 4, generator=generator)).square().mean().backward()
        for group in optimizer.param_groups:  # type: ignore[attr-defined]
            group["lr"] = 0.1 / (1 + step)
        optimizer.step()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    part = OptimPart(momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    ours, theirs = network(), network()
    groups = parameter_groups(theirs, part)
    take_steps(ours, build_optimizer(ours, part, 0.1), 5)
    take_steps(theirs, torch.optim.SGD(groups, lr=0.1, momentum=momentum, nesterov=nesterov, foreach=True), 5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_state_goes_on_to_the_same_bits(name: str) -> None:
    part = OptimPart(name=name)
    whole, part_way = network(), network()
    optimizer = build_optimizer(whole, part, 0.1)
    take_steps(whole, optimizer, 3)
    first = build_optimizer(part_way, part, 0.1)
    take_steps(part_way, first, 3)
    second = build_optimizer(part_way, part, 0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(whole, optimizer, 2)
    take_steps(part_way, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part_way.parameters(), strict=True))


def test_weight_decay_spares_biases_and_batchnorm_unless_asked() -> None:
    model = network()
    decayed, spared = parameter_groups(model, OptimPart(weight_decay=0.1))
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert decayed["weight_decay"] == 0.1
    assert len(spared["params"]) == 4
    assert spared["weight_decay"] == 0.0
    (everything,) = parameter_groups(model, OptimPart(decay_norm=True))
    assert len(everything["params"]) == 6


def test_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown optimizer 'adamx'; did you mean 'adam"):
        build_optimizer(network(), OptimPart(name="adamx"), 0.1)


def test_lr_scales_with_the_batch() -> None:
    assert peak_lr(OptimPart(lr=0.1, lr_batch=256), 512) == pytest.approx(0.2)
    assert peak_lr(OptimPart(lr=0.1, lr_batch=None), 512) == pytest.approx(0.1)


def schedule(steps: int = 100, **options: object) -> list[float]:
    part = OptimPart(**options)  # type: ignore[arg-type]
    return [lr_at(part, 1.0, step, steps=steps, steps_per_epoch=10) for step in range(steps)]


def test_cosine_with_warmup_and_cooldown() -> None:
    lrs = schedule(warmup_epochs=1, cooldown_epochs=2, final=0.1)
    assert lrs[0] == pytest.approx(1 / 11)
    assert lrs[9] == pytest.approx(10 / 11)
    assert lrs[10] == 1.0
    assert lrs[45] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 35 / 70)))
    assert lrs[80:] == pytest.approx([0.1] * 20)
    assert lrs[10:80] == sorted(lrs[10:80], reverse=True)


def test_piecewise_onecycle_constant() -> None:
    lrs = schedule(schedule="piecewise")
    assert (lrs[49], lrs[50], lrs[74], lrs[75]) == (1.0, 0.1, 0.1, 0.01)
    lrs = schedule(schedule="onecycle")
    assert max(lrs) == pytest.approx(1.0, abs=0.03)
    assert 38 <= lrs.index(max(lrs)) <= 40
    assert lrs[-1] == pytest.approx(0.01 / 0.6)
    assert set(schedule(schedule="constant")) == {1.0}


def test_warmup_longer_than_the_run_still_ends() -> None:
    lrs = schedule(steps=5, warmup_epochs=3)
    assert lrs[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert lrs[4] == 1.0


def test_ema_is_the_recurrence_with_averaged_buffers() -> None:
    for warmup in (False, True):
        model = network()
        ema = Ema(model, 0.9, warmup=warmup)
        weight = model[0].weight.detach().double().clone()  # type: ignore[index, union-attr]
        mean = model[1].running_mean.double().clone()  # type: ignore[index, union-attr]
        for update in range(4):
            model(torch.rand(8, 1, 4, 4))
            with torch.no_grad():
                model[0].weight.add_(1.0)  # type: ignore[index, union-attr]
            ema.update()
            decay = min(0.9, (1 + update) / (10 + update)) if warmup else 0.9
            weight = decay * weight + (1 - decay) * model[0].weight.detach().double()  # type: ignore[index, union-attr]
            mean = decay * mean + (1 - decay) * model[1].running_mean.double()  # type: ignore[index, union-attr]
        torch.testing.assert_close(ema.model[0].weight.double(), weight, rtol=1e-5, atol=1e-6)  # type: ignore[index]
        torch.testing.assert_close(ema.model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)  # type: ignore[index]
        assert int(ema.model[1].num_batches_tracked) == 4  # type: ignore[index, arg-type]
        assert not any(p.requires_grad for p in ema.model.parameters())


def test_ema_state_round_trip() -> None:
    model = network()
    ema = Ema(model, 0.9, warmup=True)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # type: ignore[index, union-attr]
    ema.update()
    again = Ema(network(), 0.9, warmup=True)
    again.load(ema.state())
    assert again.updates == 1
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in ema.model.state_dict().items())


def test_swa_is_the_plain_mean_of_later_epochs() -> None:
    """Weights at the ends of epochs 3, 4 and 5 of two steps each; until then those of the last epoch."""
    model = network()
    average = average_of(model, EmaPart(equal_after=2), steps_per_epoch=2)
    assert average is not None
    ends = []
    for step in range(1, 11):
        with torch.no_grad():
            model[0].weight.add_(float(step))  # type: ignore[index, union-attr]
        average.update()
        if step % 2 == 0:
            ends.append(model[0].weight.detach().double().clone())  # type: ignore[index, union-attr]
            expected = torch.stack(ends[2:]).mean(0) if len(ends) > 2 else ends[-1]
            torch.testing.assert_close(average.model[0].weight.double(), expected)  # type: ignore[index]
    assert average_of(model, EmaPart(), steps_per_epoch=2) is None


def test_a_trapezoid_is_a_constant_trunk_with_a_way_down() -> None:
    part = OptimPart(schedule="trapezoid", decay_epochs=2, warmup_epochs=1, final=0.1)
    rates = [lr_at(part, 1.0, step, steps=20, steps_per_epoch=2) for step in range(20)]
    assert rates[:2] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert rates[2:17] == [1.0] * 15
    assert rates[17:] == [pytest.approx(1 - 0.9 * done / 4) for done in (1, 2, 3)]
    longer = [lr_at(part, 1.0, step, steps=40, steps_per_epoch=2) for step in range(40)]
    assert longer[:16] == rates[:16]  # two lengths share their trunk
