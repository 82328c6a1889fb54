"""One step of training against the same step written out by hand."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from robudget.backend.graph import Graphs
from robudget.backend.precision import Precision
from robudget.data.keyed import generator_for
from robudget.errors import InputError
from robudget.models import build
from robudget.recipe import Recipe
from robudget.training.clock import Stopwatch
from robudget.training.distributed import World
from robudget.training.optimisation import build_optimizer
from robudget.training.penalties import misalignment
from robudget.training.prior import Memory
from robudget.training.records import PHASES
from robudget.training.step import Step

CPU = torch.device("cpu")
FLOAT32 = Precision("float32", CPU)


def setting(**changes: Any) -> tuple[Recipe, nn.Module, Step, Counter[str]]:
    base = {"threat.eps": 0.1, "craft.steps": 1, "craft.start": "none", "optim.lr": 0.1, "optim.weight_decay": 0.0}
    recipe = Recipe().with_(base | {"optim.momentum": 0.0} | {k.replace("__", "."): v for k, v in changes.items()})
    torch.manual_seed(0)
    model = build("wrn-10-1", classes=4, image_size=8, base=2).train()
    calls: Counter[str] = Counter(dict.fromkeys(PHASES, 0))
    step = Step(
        recipe,
        model,
        build_optimizer(model, recipe.optim, 0.1),
        None,
        precision=FLOAT32,
        craft_precision=FLOAT32,
        world=World(),
        watch=Stopwatch(CPU),
        calls=calls,
        steps_per_epoch=1,
    )
    return recipe, model, step, calls


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 3, 8, 8, generator=generator), torch.arange(12) % 4


def descend(model: nn.Module, loss: torch.Tensor) -> None:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= 0.1 * gradient


def close(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)


def test_adversarial_training() -> None:
    _, model, step, calls = setting()
    by_hand = copy.deepcopy(model)
    x, y = batch()
    x_adv = (x + 0.1 * gradient_of(by_hand, x, y).sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    logits = by_hand(x_adv)
    right = int((logits.argmax(1) == y).sum())
    descend(by_hand, F.cross_entropy(logits, y))
    outcome = step(x, y, y, 0)
    close(model, by_hand)
    assert outcome.clean is None
    assert outcome.crafted is not None
    assert int(outcome.crafted) == right
    assert (calls["craft_forward"], calls["craft_backward"], calls["update_backward"]) == (12, 12, 12)


def gradient_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """In eval mode, as crafting does, by plain backward."""
    frozen = copy.deepcopy(model).eval()
    leaf = x.clone().requires_grad_(True)
    F.cross_entropy(frozen(leaf), y).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_weight_perturbation() -> None:
    _, model, step, calls = setting(awp__gamma=0.05)
    by_hand = copy.deepcopy(model)
    x, y = batch()
    x_adv = (x + 0.1 * gradient_of(by_hand, x, y).sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    # v = γ‖w‖ g/‖g‖ of every layer's weights, the update from w + v, applied to w.
    proxy = copy.deepcopy(by_hand)
    F.cross_entropy(proxy(x_adv), y).backward()
    shifts = {}
    for (name, parameter), twin in zip(by_hand.named_parameters(), proxy.parameters(), strict=True):
        if parameter.ndim > 1:
            assert twin.grad is not None
            shifts[name] = 0.05 * parameter.detach().norm() * twin.grad / twin.grad.norm()
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            parameter += shifts.get(name, 0.0)
    gradients = torch.autograd.grad(F.cross_entropy(by_hand(x_adv), y), list(by_hand.parameters()))
    with torch.no_grad():
        for (name, parameter), gradient in zip(by_hand.named_parameters(), gradients, strict=True):
            parameter -= shifts.get(name, 0.0)
            parameter -= 0.1 * gradient
    step(x, y, y, 0)
    close(model, by_hand)
    assert calls["update_backward"] == 24


def test_weight_perturbation_waits() -> None:
    _, _, step, calls = setting(awp__gamma=0.05, awp__after_epochs=2)
    x, y = batch()
    step(x, y, y, 1)
    assert calls["update_backward"] == 12
    step(x, y, y, 2)
    assert calls["update_backward"] == 36


def test_free_adversarial_training() -> None:
    _, model, step, calls = setting(loss="free-at", craft__steps=3)
    by_hand = copy.deepcopy(model)
    x, y = batch()
    delta = torch.zeros_like(x)
    for images in (x, x.flip(3)):  # the perturbation goes on into the next batch
        for _ in range(3):
            leaf = (images + delta).clamp(0, 1).requires_grad_(True)
            loss = F.cross_entropy(by_hand(leaf), y)
            gradients = torch.autograd.grad(loss, [leaf, *by_hand.parameters()])
            with torch.no_grad():
                for parameter, gradient in zip(by_hand.parameters(), gradients[1:], strict=True):
                    parameter -= 0.1 * gradient
                moved = (leaf + 0.1 * gradients[0].sign()).clamp(images - 0.1, images + 0.1).clamp(0, 1)
                delta = moved - images
        step(images, y, y, 0)
    close(model, by_hand)
    assert step.delta is not None
    torch.testing.assert_close(step.delta, delta)
    assert (calls["craft_forward"], calls["update_forward"], calls["update_backward"]) == (0, 72, 72)


def test_prior_guided_steps_are_those_of_a_plain_implementation() -> None:
    """FGSM-MEP of Jia et al. 2022 written out for the whole of three epochs of one batch each."""
    recipe, model, step, calls = setting(loss="fgsm-pgi")
    x, y = batch()
    step.rows_of, step.images = lambda number: (torch.arange(12) + number) % 12, 12
    other = copy.deepcopy(model)
    eps, delta, momentum = 0.1, Memory.begin(recipe, 12, x, 0).delta, torch.zeros_like(x)
    torch.testing.assert_close(delta.abs(), torch.full_like(x, eps))
    assert 0.4 < (delta > 0).float().mean() < 0.6
    for number in range(3):
        rows = (torch.arange(12) + number) % 12
        images, labels = x[rows], y[rows]
        step(images, labels, labels, number)
        start = (images + delta[rows]).requires_grad_(True)
        logits = other(start)
        gradient = torch.autograd.grad(F.cross_entropy(logits, labels), start, retain_graph=True)[0]
        attacked = (delta[rows] + eps * gradient.sign()).clamp(-eps, eps).clamp(min=-images, max=1 - images)
        momentum[rows] = gradient / gradient.norm(p=1) + 0.3 * momentum[rows]
        kept = (delta[rows] + eps * momentum[rows].sign()).clamp(-eps, eps).clamp(min=-images, max=1 - images)
        final = other(images + attacked)
        descend(other, F.cross_entropy(final, labels) + 10 * F.mse_loss(final, logits))
        delta[rows] = kept
        close(model, other)
        assert step.memory is not None
        torch.testing.assert_close(step.memory.delta, delta, rtol=1e-4, atol=1e-5)
    assert calls["craft_backward"] == 3 * 12
    assert calls["update_forward"] == calls["update_backward"] == 3 * 24
    assert "craft_forward" not in {name for name, count in calls.items() if count}


def test_a_prior_is_forgotten_every_forty_epochs() -> None:
    recipe, _, step, _ = setting(loss="fgsm-pgi")
    x, y = batch()
    step.rows_of, step.images = lambda number: torch.arange(12), 12
    for number in (38, 39):
        step(x, y, y, number)
    assert step.memory is not None
    assert step.memory.momentum.abs().sum() != pytest.approx(1, rel=1e-4)
    step(x, y, y, 40)
    assert step.memory.momentum.abs().sum() == pytest.approx(1, rel=1e-4), "of this step's gradient alone"
    first, later = (Memory.begin(recipe, 12, x, epoch).delta for epoch in (0, 40))
    assert not torch.equal(first, later)


def test_ikl_weighs_classes_by_the_epoch_before() -> None:
    """Three epochs of one batch: class means of the epoch before, of the clean logits of its updates."""
    _, model, step, calls = setting(loss="ikl", beta=20, craft__start="uniform")
    other, weights, crafted, craft = copy.deepcopy(model), torch.full((4, 4), 0.25), [], step._craft
    step._craft = lambda *given: crafted.append(craft(*given)) or crafted[-1]  # type: ignore[method-assign, func-returns-value]
    x, y = batch()
    for number in range(3):
        labels = y if number < 2 else (y + 1) % 4
        step(x, labels, labels, number)
        logits, attacked = other(x), other(crafted[-1])
        gap = logits - attacked
        pairs = (gap[:, :, None] - gap[:, None]).square() * weights[labels][:, :, None] * weights[labels][:, None]
        soft = -(logits.detach().softmax(1) * attacked.log_softmax(1)).sum(1).mean()
        descend(other, F.cross_entropy(logits, labels) + 4 * soft + 20 * 0.25 * pairs.sum((1, 2)).mean())
        close(model, other)
        means = (logits.detach() / 4).softmax(1)
        weights = torch.stack([means[labels == k].mean(0) for k in range(4)])
    assert calls["craft_forward"] == 3 * 24  # the clean logits first, as for TRADES
    assert calls["update_forward"] == calls["update_backward"] == 3 * 24


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_norm_of_the_gradient_is_made_small(norm: str) -> None:
    """Double backpropagation as arXiv 2409.20139 has it: CE + λ·ε·‖∇ₓ CE‖ of the dual norm, of clean images alone."""
    _, model, step, calls = setting(loss="grad-norm", beta=1, threat__norm=norm)
    other = copy.deepcopy(model)
    x, y = batch()
    leaf = x.clone().requires_grad_(True)
    each = F.cross_entropy(other(leaf), y, reduction="none")
    (gradient,) = torch.autograd.grad(each.sum(), leaf, create_graph=True)
    size = gradient.flatten(1).abs().sum(1) if norm == "linf" else gradient.flatten(1).norm(dim=1)
    descend(other, each.mean() + 0.1 * size.mean())
    outcome = step(x, y, y, 0)
    close(model, other)
    assert outcome.crafted is None
    assert {name: count for name, count in calls.items() if count} == {"penalty": 12}


def test_gradients_are_aligned_as_in_the_authors_code() -> None:
    """FGSM + GradAlign (Andriushchenko & Flammarion 2020): 1 − cos of the gradients at x and at x + U(−ε, ε)."""
    recipe, model, step, calls = setting(craft__grad_align=0.2, craft__step_size=0.1)
    other = copy.deepcopy(model)
    x, y = batch()
    x_adv = (x + 0.1 * gradient_of(other, x, y).sign()).clamp(0, 1)
    noise = torch.rand(x.shape, generator=generator_for("cpu", recipe.seed, "align", 0))
    gradients = []
    for place in (x, x + 0.1 * (2 * noise - 1)):
        leaf = place.clone().requires_grad_(True)
        gradients += torch.autograd.grad(F.cross_entropy(other(leaf), y), leaf, create_graph=True)
    cosine = F.cosine_similarity(gradients[0].flatten(1), gradients[1].flatten(1)).mean()
    running = copy.deepcopy(model)
    running(x_adv)
    descend(other, F.cross_entropy(other(x_adv), y) + 0.2 * (1 - cosine))
    step(x, y, y, 0)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)
    for (name, mine), theirs in zip(model.named_buffers(), running.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)  # statistics of the adversarial images alone
    expected = {"craft_forward": 12, "craft_backward": 12, "update_forward": 12, "update_backward": 12}
    assert {name: count for name, count in calls.items() if count} == expected | {"penalty": 24}


def test_an_image_without_a_gradient_is_left_out_of_the_alignment() -> None:
    first = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    second = torch.stack([first.detach()[0], torch.zeros(1, 2, 2), -first.detach()[2]])
    found = misalignment(first, second)
    assert float(found.detach()) == pytest.approx(1.0)  # cosines 1 and −1
    (gradient,) = torch.autograd.grad(found, first)
    assert gradient.isfinite().all()
    assert not gradient[1].any()


def test_what_is_crafted_is_a_choice_beside_what_is_minimised() -> None:
    """TRADES on one-step images of N-FGSM that raise the cross-entropy: a step of ε from noise of 2ε, not projected."""
    recipe, model, step, calls = setting(loss="trades", craft__method="n-fgsm", craft__objective="ce", beta=6)
    other = copy.deepcopy(model)
    x, y = batch()
    noise = torch.rand(x.shape, generator=generator_for("cpu", recipe.seed, "craft", 0))
    start = (x + 0.2 * (2 * noise - 1)).clamp(0, 1)
    x_adv = (start + 0.1 * gradient_of(other, start, y).sign()).clamp(0, 1)
    logits, attacked = other(x), other(x_adv)
    divergence = F.kl_div(attacked.log_softmax(1), logits.softmax(1), reduction="batchmean")
    descend(other, F.cross_entropy(logits, y) + 6 * divergence)
    step(x, y, y, 0)
    close(model, other)
    assert (calls["craft_forward"], calls["craft_backward"]) == (12, 12)
    _, model, step, calls = setting(craft__objective="kl", craft__start="gaussian")
    step(x, y, y, 0)
    assert calls["craft_forward"] == 24


def test_clipping_bounds_the_step() -> None:
    _, model, step, _ = setting(loss="standard", optim__clip=1e-3)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    x, y = batch()
    step(x, y, y, 0)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_squared_distances() -> None:
    _, model, step, _ = setting(loss="standard", metric="squared")
    by_hand = copy.deepcopy(model)
    x, y = batch()
    descend(by_hand, (F.softmax(by_hand(x), 1) - F.one_hot(y, 4)).square().sum(1).mean())
    step(x, y, y, 0)
    close(model, by_hand)
    with pytest.raises(InputError, match="metric = 'squared' with loss = 'mart'"):
        setting(loss="mart", metric="squared")


def test_dropout_follows_the_step() -> None:
    def run(number: int) -> torch.Tensor:
        recipe, model, _, calls = setting(loss="standard")
        model.head = nn.Sequential(nn.Dropout(0.5), model.head)  # type: ignore[arg-type]
        optimizer = build_optimizer(model, recipe.optim, 0.1)
        common = {"precision": FLOAT32, "craft_precision": FLOAT32, "world": World(), "watch": Stopwatch(CPU)}
        step = Step(recipe, model, optimizer, None, calls=calls, steps_per_epoch=1, **common)  # type: ignore[arg-type]
        x, y = batch()
        return step(x, y, y, number).loss

    first = run(3)
    assert torch.equal(run(3), first)
    assert not torch.equal(run(4), first)


def test_the_radius_warms_up() -> None:
    # Three steps of warm-up: ε/4, ε/2, 3ε/4, then ε, with one attack step of the same length.
    for number, share in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        _, model, step, calls = setting(threat__warmup_epochs=3, craft__step_size=0.1)
        by_hand = copy.deepcopy(model)
        x, y = batch()
        eps = share * 0.1
        x_adv = (x + eps * gradient_of(by_hand, x, y).sign()).clamp(0, 1)
        descend(by_hand, F.cross_entropy(by_hand(x_adv), y))
        step(x, y, y, number)
        close(model, by_hand)
        assert calls["craft_backward"] == 12


def test_a_warm_up_is_crafted_outside_the_graphs_which_hold_one_radius() -> None:
    asked: list[Any] = []

    class Watched(Graphs):
        def of(self, key: Any, function: Any, values: Any) -> Any:
            asked.append(key)
            return super().of(key, function, values)

    _, _, step, _ = setting(threat__warmup_epochs=3)
    step.graphs = Watched(CPU, lambda note: None)
    x, y = batch()
    for number in range(5):
        step(x, y, y, number)
    assert [threat.eps for _, _, threat, *_ in asked] == [0.1, 0.1]
