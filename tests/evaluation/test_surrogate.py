"""Gradients through a surrogate (BPDA): what they are, that they break what masks its gradients, and their bill."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.ensemble import Member, Passes
from robudget.attacks.victim import Victim, ce, difference
from robudget.errors import InputError
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.examples import replay
from robudget.evaluation.verdicts import Verdicts, merge, page
from robudget.threat import Threat

THREAT = Threat("linf", 0.08)
WHITE = [Member("apgd-ce", steps=20), Member("apgd-t", steps=15, targets=3), Member("fab-t", steps=15, targets=3)]
DCT = torch.stack(
    [(0.5 if k else math.sqrt(1 / 8)) * torch.cos(math.pi / 8 * (torch.arange(8) + 0.5) * k) for k in range(8)]
)


def quantised(x: Tensor) -> Tensor:
    return (x * 15).round() / 15


def jpeg(x: Tensor) -> Tensor:
    """The coefficients of the 8×8 cosine transform, rounded."""
    return (DCT.T @ ((DCT @ x @ DCT.T) * 10).round() @ DCT / 10).clamp(0, 1)


def thresholded(x: Tensor) -> Tensor:
    return (x > 0.5).float()


class Defended(nn.Module):
    """A model behind a function that has no useful gradient."""

    def __init__(self, model: nn.Module, before) -> None:
        super().__init__()
        self.model, self.before = model, before
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.before(x))


class WithSurrogate(Defended):
    def surrogate(self) -> nn.Module:
        return self.model


def attacked(model, images, **changes) -> Verdicts:
    given = {"attacks": WHITE, "batch_size": 32, "examples": True} | changes
    return evaluate(model, *images, THREAT, **given)


@pytest.fixture(scope="module")
def undefended(small, images) -> float:
    return attacked(small, images, checks=False).robust_accuracy


@pytest.mark.parametrize("defence", [quantised, jpeg], ids=lambda f: f.__name__)
def test_a_defence_that_hides_its_gradient_falls_to_its_surrogate(small, images, undefended, defence):
    model = Defended(small, defence)
    hidden = attacked(model, images)
    assert hidden.robust_accuracy > 0.9
    assert {"zero-gradients", "survives-large-eps"} <= {finding.name for finding in hidden.findings}
    found = attacked(model, images, backward=small)
    assert found.robust_accuracy <= undefended + 0.05 < 0.2
    assert not found.findings
    # Every success is one of the model as given.
    assert found.examples is not None
    assert replay(model, found.examples).fooled.all()
    text = page(found)
    assert "Gradients of the surrogate Small" in text
    assert "(BPDA)" in text
    assert found.about["backward"].startswith("Small ")


def test_a_model_without_any_gradient_has_one_through_a_surrogate(small, images, undefended):
    """A comparison ends the graph at the image, though the logits still depend on weights that want gradients."""
    model = Defended(small, thresholded)
    with pytest.raises(InputError, match=r"apgd-ce needs a gradient.*backward="):
        attacked(model, images)
    square = attacked(model, images, attacks=["square:steps=20"])
    assert "no-gradient" in [finding.name for finding in square.findings]
    found = attacked(model, images, backward=small)
    assert found.robust_accuracy <= undefended + 0.15
    through_function = attacked(lambda x: model(x).detach(), images, backward=lambda x: small(x), checks=False)
    assert through_function.robust.tolist() == found.robust.tolist()


def test_a_models_own_surrogate_is_taken_unless_none_is_asked_for(small, images):
    model = WithSurrogate(small, quantised)
    own, given, none = (
        attacked(model, images, checks=False, **k) for k in ({}, {"backward": small}, {"backward": None})
    )
    assert own.frame.equals(given.frame)
    assert own.about["backward"] == given.about["backward"]
    assert none.about["backward"] is None
    assert none.robust_accuracy > 0.9 > own.robust_accuracy


def test_the_gradient_is_that_of_the_surrogate_for_the_objective_at_the_models_logits():
    """Linear surrogate Wx: the gradient of cross-entropy is Wᵀ(softmax(z) − 1_y) with the model's own logits z."""
    torch.manual_seed(0)
    w, x, y = torch.randn(4, 12), torch.rand(5, 1, 3, 4), torch.tensor([0, 1, 2, 3, 0])

    def model(x: Tensor) -> Tensor:
        return 2 * torch.sign(x.flatten(1) - 0.5) @ w.T.abs()

    victim = Victim(model, surrogate=lambda x: x.flatten(1) @ w.T, least=8, most=8)
    logits, value, gradient = victim.gradient(x, ce, y, y)
    assert torch.equal(logits, model(x))
    assert torch.equal(value, nn.functional.cross_entropy(model(x), y, reduction="none"))
    wanted = (model(x).softmax(1) - nn.functional.one_hot(y, 4)) @ w
    torch.testing.assert_close(gradient.flatten(1), wanted)
    assert victim.passes == Passes(8, 0, 8, 8)
    # FAB's linearisation: the gap of the model, the normal of the surrogate's boundary.
    target = (y + 1) % 4
    _, gap, normal = victim.gradient(x, difference, y, target)
    rows = torch.arange(5)
    assert torch.equal(gap, model(x)[rows, target] - model(x)[rows, y])
    torch.testing.assert_close(normal.flatten(1), w[target] - w[y])
    z, jacobian = victim.jacobian(x)
    assert torch.equal(z, model(x))
    torch.testing.assert_close(jacobian.flatten(2), w.expand(5, 4, 12))


def test_of_itself_a_surrogate_changes_nothing(small, images):
    plain, through = attacked(small, images, checks=False), attacked(small, images, checks=False, backward=small)
    assert plain.robust.tolist() == through.robust.tolist()
    assert (plain.frame["worst_margin"] - through.frame["worst_margin"]).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["pgd:steps=10", "apgd-ce:steps=10", "apgd-dlr:steps=10", "fab:steps=10"])
def test_every_attack_with_gradients_takes_them_there(small, images, name):
    """And its passes are counted apart: as many forward through the surrogate as gradients were taken."""
    found = attacked(Defended(small, quantised), images, attacks=[name], backward=small, checks=False)
    assert found.robust_accuracy < 0.5
    (item,) = [item for item in found.spent if item.attack == name.partition(":")[0]]
    assert item.backward == 0
    assert item.forward >= item.surrogate_forward > 0
    assert item.surrogate_backward == item.surrogate_forward * (6 if name.startswith("fab") else 1)
    clean = found.spent[0]
    assert clean.surrogate_forward == clean.surrogate_backward == 0
    priced = found.with_flops(10, 20, (3, 4))
    assert priced.spent[-1].flops == 10 * item.forward + 3 * item.surrogate_forward + 4 * item.surrogate_backward
    unknown = found.with_flops(10, 20)
    assert unknown.spent[0].flops == 10 * clean.forward
    assert unknown.spent[-1].flops is None
    assert unknown.flops is None


def test_a_surrogate_in_low_precision_breaks_as_much(small, images):
    model = Defended(small, quantised)
    full, low = (attacked(model, images, backward=small, precision=p, checks=False) for p in ("float32", "bfloat16"))
    assert abs(full.robust_accuracy - low.robust_accuracy) <= 0.05
    assert low.about["precision"] == "bfloat16"
    assert low.examples is not None
    assert replay(model, low.examples).fooled.all()


def test_a_surrogate_that_answers_otherwise_is_a_finding(small, images):
    found = attacked(small, images, backward=lambda x: -small(x), attacks=["apgd-ce:steps=3"])
    (finding,) = [finding for finding in found.findings if finding.name == "surrogate-differs"]
    assert finding.evidence["share"] > 0.5


@pytest.mark.parametrize(
    ("surrogate", "said"),
    [
        (
            lambda x: x.flatten(1)[:, :5],
            r"returns torch.float32 \(2, 5\) for 2 images \(allowed: float logits \(2, 6\)",
        ),
        (lambda x: x.flatten(1)[:1, :6], r"returns torch.float32 \(1, 6\)"),
        (lambda x: (x, x), "returns a tuple"),
        (lambda x: x.flatten(1)[:, :6].detach(), "no gradient"),
        (nn.Sequential(nn.Flatten(), nn.Linear(63, 6)), r"fails on images \(2, 1, 8, 8\): RuntimeError"),
    ],
)
def test_a_surrogate_of_another_shape_is_one_line(small, images, surrogate, said):
    with pytest.raises(InputError, match=said) as caught:
        attacked(small, images, backward=surrogate)
    assert "\n" not in str(caught.value)


def test_the_surrogates_and_the_models_modes_are_left_alone(small, images):
    surrogate = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)).train()
    attacked(small, images, backward=surrogate, attacks=["apgd-ce:steps=2"], checks=False)
    assert surrogate.training
    assert all(p.requires_grad and p.grad is None for p in surrogate.parameters())


def test_shards_and_resumes_are_of_one_surrogate(small, images, tmp_path: Path):
    model, (x, y) = Defended(small, quantised), images
    whole = attacked(model, images, backward=small, checks=False)
    halves = [
        attacked(model, (x[part], y[part]), backward=small, checks=False, index=torch.arange(60)[part])
        for part in (slice(30), slice(30, 60))
    ]
    assert np.array_equal(merge(halves).broken_by, whole.broken_by)
    other = attacked(model, (x[30:], y[30:]), backward=None, checks=False, index=torch.arange(30, 60))
    with pytest.raises(InputError, match="backward = 'Small"):
        merge([halves[0], other])
    quick = {"attacks": ["apgd-ce:steps=2"], "checks": False, "state": tmp_path}
    attacked(model, images, backward=small, **quick)
    with pytest.raises(InputError, match=r"the surrogate \(its weights\) differs"):
        attacked(model, images, backward=None, **quick)
