"""Every check fires on the fault it is for, with evidence and advice, and is silent on a sound model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.ensemble import Member
from robudget.errors import InputError
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.verdicts import page
from robudget.threat import Threat

THREAT = Threat("linf", 0.05)
QUICK = [Member("apgd-ce", steps=20), Member("square", steps=300)]


class Wrapped(nn.Module):
    """A model between two functions."""

    def __init__(self, model: nn.Module, before=lambda x: x, after=lambda z: z) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


class Noisy(nn.Module):
    """A stochastic layer in front."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.05 * torch.randn_like(x))


class Quantised(nn.Module):
    """Inputs rounded to 16 levels: the gradient is zero everywhere, the model no more robust for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 15).round() / 15)


class StraightThrough(nn.Module):
    """Inputs rounded to 16 levels, and a gradient as if they were not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + ((x * 15).round() / 15 - x).detach())


class Reversed(nn.Module):
    """The same logits, and a gradient that points the other way."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.model(x.detach()) - self.model(x)


class Clipped(nn.Module):
    """Clips its input to [0, 1], which changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.clamp(0, 1))


class Dynamic(nn.Module):
    """Purifies its input by a gradient step of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.clone().requires_grad_()
            (g,) = torch.autograd.grad(self.model(leaf).logsumexp(1).sum(), leaf, create_graph=True)
        return self.model(x + 0.001 * g.sign())


class Centred(nn.Module):
    """Subtracts the batch's mean logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        z = self.model(x)
        return z - z.mean(0, keepdim=True)


def names(model: nn.Module, images, **changes) -> dict[str, object]:
    given = {"attacks": QUICK} | changes
    threat = given.pop("threat", THREAT)
    verdicts = evaluate(model, *images, threat, **given)
    for finding in verdicts.findings:
        assert finding.message
        assert finding.evidence
        assert finding.advice
        assert f"[{finding.name}]" in page(verdicts)
    return {finding.name: finding.evidence for finding in verdicts.findings}


@pytest.mark.parametrize("threat", [THREAT, Threat("l2", 0.3), Threat("l1", 1.0)], ids=str)
def test_a_sound_model_raises_nothing(small, images, threat):
    assert names(small, images, threat=threat) == {}


def test_logits_scaled_by_a_thousand(small, images):
    """Cross-entropy saturates, its gradient is exactly zero, and only DLR and Square still see."""
    found = names(Wrapped(small, after=lambda z: 1e3 * z), images)
    assert found["zero-gradients"]["share_ce"] > 0.5
    assert found["zero-gradients"]["share_dlr"] == 0
    assert "survives-large-eps" in found


def test_quantised_inputs(small, images):
    found = names(Quantised(small), images, threat=Threat("linf", 0.08))
    assert found["zero-gradients"]["share_ce"] == 1
    assert found["masked-gradients"]["points"] > 0.2
    assert found["survives-large-eps"]["accuracy"] > 0.5


@pytest.mark.parametrize("masked", [StraightThrough, Reversed])
def test_a_gradient_that_is_not_the_models(small, images, masked):
    evidence = names(masked(small).eval(), images)["finite-differences"]
    assert evidence["share"] > 0.5
    assert evidence["median_relative_error"] > 0.5


def test_finite_differences_stay_inside_the_box(small, images):
    x, y = (4 * (images[0] - 0.5) + 0.5).clamp(0, 1), images[1]
    assert ((x == 0) | (x == 1)).float().mean() > 0.1
    assert (small(x).argmax(1) == y).sum() > 10
    assert "finite-differences" not in names(Clipped(small).eval(), (x, y))


def test_a_stochastic_layer(small, images):
    found = names(Noisy(small), images)
    assert found["randomised"]["largest_difference"] > 1e-4
    assert "batch-dependent" not in found
    assert "randomised" not in names(Noisy(small), images, attacks=[Member("apgd-ce", steps=3, eot=20)])


def test_a_dynamic_defence(small, images):
    assert names(Dynamic(small), images)["dynamic"]["calls"] >= 1


def test_probabilities(small, images):
    assert "probabilities" in names(Wrapped(small, after=lambda z: z.softmax(1)), images)


def test_an_answer_that_depends_on_its_batch(small, images):
    assert "batch-dependent" in names(Centred(small), images)


def test_train_mode_is_reported_and_put_back(small, images):
    small.train()
    try:
        found = names(small, images)
        assert small.training
    finally:
        small.eval()
    assert found["train-mode"]["modules"] > 3


def test_batch_norm_without_statistics(images):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 6)
    ).eval()
    found = names(model, images)
    assert found["batch-statistics"]["layers"] == 1
    assert "batch-dependent" in found


def test_logits_that_are_not_finite(small, images):
    x, y = images
    bright = x.mean((1, 2, 3)) > x.mean()

    def spoil(z: Tensor) -> Tensor:
        return z

    model = Wrapped(small, after=spoil)
    model.forward = lambda v: torch.where((v.mean((1, 2, 3)) > x.mean()).unsqueeze(1), torch.nan, small(v))
    verdicts = evaluate(model, x, y, THREAT, attacks=QUICK)
    found = {f.name: f.evidence for f in verdicts.findings}
    assert found["not-finite"]["images"] == int(bright.sum())
    assert not verdicts.clean[bright.numpy()].any()


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, 16, generator=g))
    x = torch.rand(20, 1, 4, 4, generator=g)
    with torch.no_grad():
        y = model(x).argmax(1)
    verdicts = evaluate(model, x, y, THREAT, attacks=["apgd-dlr", "apgd-t", "fab-t"])
    found = [f for f in verdicts.findings if f.name == "few-classes"]
    assert found
    assert all(f.evidence == {"classes": classes} for f in found)
    assert "cross-entropy" in found[0].message


def test_random_noise_that_already_misleads(small, images):
    assert names(small, images, threat=Threat("linf", 0.9))["random-noise"]["share"] > 0.1


def test_checks_can_be_left_out(small, images):
    assert names(Quantised(small).eval(), images, checks=False) == {}


def test_checks_leave_the_model_as_it_was(small, images):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    names(small, images)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in small.parameters())
    assert not small.training


class Blind(nn.Module):
    """Hides its gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(x)


def test_a_model_without_gradient_is_squares_alone(small, images):
    model, square = Blind(small).eval(), Member("square", steps=200)
    found = names(model, images, attacks=[square], threat=Threat("linf", 0.1))
    assert set(found) == {"no-gradient"}
    seen = evaluate(model, *images, Threat("linf", 0.1), attacks=[square], batch_size=16)
    open_eyed = evaluate(small, *images, Threat("linf", 0.1), attacks=[square], precision="float32", batch_size=16)
    assert 0 < seen.robust_accuracy < 1
    assert seen.frame["broken_by"].equals(open_eyed.frame["broken_by"])
    with pytest.raises(InputError, match="apgd-ce needs a gradient"):
        evaluate(model, *images, THREAT, attacks=[square, Member("apgd-ce")])


class Memory(nn.Module):
    """Knows its images: far from them it answers as it does on the nearest, so that a larger ball breaks fewer."""

    def __init__(self, model: nn.Module, known: Tensor, reach: float) -> None:
        super().__init__()
        self.model, self.known, self.reach = model, known, reach

    def forward(self, x: Tensor) -> Tensor:
        apart = (x[:, None] - self.known[None]).flatten(2).abs().amax(2)
        distance, nearest = apart.min(1)
        with torch.no_grad():
            home = self.model(self.known[nearest])
        return torch.where((distance > self.reach).unsqueeze(1), home, self.model(x))


def test_a_larger_ball_that_breaks_fewer_images(small, images):
    found = names(Memory(small, images[0], 0.09).eval(), images, threat=Threat("linf", 0.08))
    assert found["not-monotone"]["2eps_20_steps"] > found["not-monotone"]["eps_20_steps"] + 0.5
    assert found["survives-large-eps"]["accuracy"] == 1


def test_masking_brings_advice_to_attack_adaptively(small, images):
    verdicts = evaluate(Quantised(small).eval(), *images, Threat("linf", 0.08), attacks=QUICK)
    advice = page(verdicts).split("[masked-gradients]")[1].replace("\n", " ")
    for hint in ("BPDA", "CW or DLR", "steps and restarts", "Square", "several times the queries"):
        assert hint in " ".join(advice.split())
    random = page(evaluate(Noisy(small).eval(), *images, THREAT, attacks=QUICK)).split("[randomised]")[1]
    assert "expectation over 20 passes" in " ".join(random.split())


def test_inputs_outside_the_box_are_refused(small, images):
    x, y = images
    for wrong in (x - 0.5, x + 0.5, 255 * x, x.clone().fill_(torch.nan)):
        with pytest.raises(InputError, match=r"images lie in .* \(allowed: \[0, 1\]\)"):
            evaluate(small, wrong, y, THREAT)
