"""What would make a robust accuracy not worth its digits: each check is a named finding with evidence and advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robudget.attacks.apgd import Apgd
from robudget.attacks.driver import drive, plan
from robudget.attacks.geometry import GEOMETRY, per_row
from robudget.attacks.noise import Noise
from robudget.attacks.victim import Model, Victim, ce, cw, dlr, margin
from robudget.errors import InputError
from robudget.evaluation.spent import Finding
from robudget.threat import Threat

PROBE = 64  # images, at most, that a check looks at
LARGE = {"linf": 0.5, "l2": 10.0, "l1": 150.0}  # radii at which nothing but a masked model survives

ADAPTIVE = (
    "Attack adaptively: take gradients through a smooth stand-in for the masking part (BPDA: backward=, --backward "
    "FILE.py:FUNCTION), use a loss that does not saturate (CW or DLR), more steps and restarts, and Square with "
    "several times the queries."
)
RANDOM = (
    "Use version='rand' (expectation over 20 passes, verdicts by 100) or fix the randomness per image; see what "
    "more passes give."
)


@dataclass(frozen=True)
class Subject:
    """What the checks look at: the model as given, some images that it classifies correctly, and the threat."""

    victim: Victim
    x: Tensor
    y: Tensor
    index: Tensor
    threat: Threat
    seed: int
    differentiable: bool = True
    randomised: bool = False

    @property
    def model(self) -> Model:
        return self.victim.model


# -- before anything runs ----------------------------------------------------------------------------------------------


def check_mode(model: Model) -> list[Finding]:
    """How the model was handed over: in train mode, or with BatchNorm that has no statistics of its own."""
    if not isinstance(model, nn.Module):
        return []
    findings = []
    training = [type(m).__name__ for m in model.modules() if m.training]
    if training:
        findings.append(
            Finding(
                "train-mode",
                "the model was given in train mode; it was evaluated in evaluation mode and put back",
                {"modules": len(training), "of_kinds": ", ".join(sorted(set(training))[:6])},
                "Call model.eval(), and check that the reported clean accuracy is the one you know.",
            )
        )
    unfixed = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    if unfixed:
        findings.append(
            Finding(
                "batch-statistics",
                "BatchNorm layers keep no running statistics, so an image's answer depends on its batch",
                {"layers": len(unfixed), "first": unfixed[0]},
                "Use running statistics (track_running_stats=True) or a norm that looks at one image.",
            )
        )
    return findings


def check_logits(model: Model, x: Tensor, y: Tensor, classes: int | None) -> Tensor:
    """The model's answer to a few images. Raises InputError unless it is logits (N, classes) that know every label."""
    with torch.no_grad():
        z: Any = model(x)
    if not isinstance(z, Tensor):
        raise InputError(f"the model returns a {type(z).__name__} (allowed: a tensor of logits, (N, classes))")
    if z.dim() != 2 or len(z) != len(x) or z.shape[1] < 2 or not z.is_floating_point():
        raise InputError(
            f"the model returns {z.dtype} {tuple(z.shape)} for {len(x)} images "
            f"(allowed: float logits ({len(x)}, classes))"
        )
    if classes is not None and z.shape[1] != classes:
        raise InputError(f"the model tells {z.shape[1]} classes apart, and the data have {classes} (allowed: the same)")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= z.shape[1]:
        raise InputError(
            f"labels lie in [{low}, {high}] but the model has {z.shape[1]} classes (allowed: 0 to {z.shape[1] - 1})"
        )
    return z.float()


def check_surrogate(surrogate: Model, x: Tensor, logits: Tensor) -> None:
    """Raises InputError unless the surrogate answers images x as the model does (with logits of that shape), and with a
    gradient to them."""
    allowed = f"allowed: float logits {tuple(logits.shape)} as the model's, with a gradient to the images"
    try:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            z: Any = surrogate(leaf)
    # The code of a user can fail in any way.
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"the surrogate fails on images {tuple(x.shape)}: {why[:200]} ({allowed})") from None
    if not isinstance(z, Tensor):
        raise InputError(f"the surrogate returns a {type(z).__name__} ({allowed})")
    if z.shape != logits.shape or not z.is_floating_point():
        raise InputError(f"the surrogate returns {z.dtype} {tuple(z.shape)} for {len(x)} images ({allowed})")
    if not _reaches(z, leaf):
        raise InputError(f"the surrogate's logits carry no gradient to the images ({allowed})")


def carries_gradient(model: Model, x: Tensor) -> bool:
    """Do the logits of x depend on it as far as autograd knows? (Not behind torch.no_grad, a comparison or argmax.)"""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        return _reaches(model(leaf), leaf)


def _reaches(z: Tensor, leaf: Tensor) -> bool:
    try:
        return z.requires_grad and torch.autograd.grad(z.sum(), leaf, allow_unused=True)[0] is not None
    except RuntimeError:  # an operation that has no derivative
        return False


def no_gradient() -> Finding:
    """For a model that only Square can attack."""
    return Finding(
        "no-gradient",
        "the model's logits carry no gradient to the image, so no white-box attack was possible",
        {"attacks": "square"},
        "Square alone proves little: give the model without torch.no_grad, or a differentiable stand-in (backward=, "
        "--backward FILE.py:FUNCTION).",
    )


def no_examples(file: str) -> Finding:
    """For a file of examples none of which is of the images evaluated."""
    return Finding(
        "no-examples",
        "a file of examples to transfer has none of these images",
        {"file": file},
        "Give the examples of an evaluation of the same rows of the split.",
    )


def few_classes(classes: int, note: str) -> Finding:
    return Finding(
        "few-classes",
        note,
        {"classes": classes},
        "With so few classes cross-entropy does what DLR would do; there is nothing to change.",
    )


# -- on the clean images -----------------------------------------------------------------------------------------------


def check_model(
    subject: Subject, clean_margin: np.ndarray[Any, Any], *, random_expected: bool, voted: bool = False
) -> list[Finding]:
    """The checks that need no attack's verdicts. `clean_margin` (n,) of all images; `random_expected`: the attacks take
    expectations over several passes, so a randomised model is no news; `voted`: several passes decide on an image."""
    findings = [*_finite(clean_margin)]
    if not len(subject.x):
        return findings
    random = list(_randomised(subject))
    findings += [] if random_expected or voted else random
    findings += [deterministic(len(subject.x))] if voted and not random else []
    subject = replace(subject, randomised=bool(random))
    findings += [*_dynamic(subject), *_probabilities(subject)]
    if not random:
        findings += _neighbours(subject)
    if subject.victim.surrogate is not None:
        findings += _surrogate(subject)
    if subject.differentiable:
        findings += _zero_gradients(subject)
        # The gradient of a surrogate is not meant to be that of the model's answers.
        findings += [] if random or subject.victim.surrogate is not None else _finite_differences(subject)
    if subject.threat.eps > 0:
        findings += _noise(subject)
        findings += _monotone(subject) if subject.differentiable else []
    return findings


def _finite(margin: np.ndarray[Any, Any]) -> Iterator[Finding]:
    bad = int((~np.isfinite(margin)).sum())
    if bad:
        yield Finding(
            "not-finite",
            "the model answers some clean images with NaN or infinite logits; those count as misclassified",
            {"images": bad, "of": len(margin)},
            "Find the layer that overflows; an attack's gradient is lost behind it.",
        )


def _randomised(s: Subject) -> Iterator[Finding]:
    z = torch.stack([_unit(s.victim.logits(s.x)) for _ in range(5)])
    spread = float((z - z[:1]).norm(dim=2).max())
    flips = int((z.argmax(2) != z.argmax(2)[:1]).any(0).sum())
    if spread > 1e-4 or flips:
        yield Finding(
            "randomised",
            "repeated passes over the same images give different answers",
            {"largest_difference": spread, "classes_changed": flips, "images": len(s.x)},
            RANDOM,
        )


def deterministic(images: int) -> Finding:
    return Finding(
        "deterministic",
        "verdicts are by repeated passes, and repeated passes over the same images give the same answers",
        {"passes": 5, "images": images},
        "Use version='standard': its attacks are stronger on a deterministic model, at fewer passes.",
    )


def _dynamic(s: Subject) -> Iterator[Finding]:
    with _counted_gradients() as calls:
        s.victim.logits(s.x[:2])
    if calls:
        yield Finding(
            "dynamic",
            "the forward pass takes gradients itself: a defence that changes at test time",
            {"calls": len(calls)},
            "Attacks here do not look through it. Attack the adapted model, and transfer from the undefended one.",
        )


@contextmanager
def _counted_gradients() -> Iterator[list[str]]:
    calls: list[str] = []
    grad, backward = torch.autograd.grad, torch.autograd.backward

    def counted_grad(*args: Any, **kwargs: Any) -> Any:
        calls.append("grad")
        return grad(*args, **kwargs)

    def counted_backward(*args: Any, **kwargs: Any) -> Any:
        calls.append("backward")
        return backward(*args, **kwargs)

    with patch.object(torch.autograd, "grad", counted_grad), patch.object(torch.autograd, "backward", counted_backward):
        yield calls


def _probabilities(s: Subject) -> Iterator[Finding]:
    z = s.victim.logits(s.x)
    if bool(z.min() > -1e-5) and bool(z.max() < 1 + 1e-5) and bool(((z.sum(1) - 1).abs() < 1e-4).all()):
        yield Finding(
            "probabilities",
            "the outputs lie in [0, 1] and sum to 1: probabilities, not logits",
            {"smallest": float(z.min()), "largest": float(z.max())},
            "Return what goes into the softmax; through it, gradients vanish and the margin loss is squeezed.",
        )


def _neighbours(s: Subject) -> Iterator[Finding]:
    whole = _unit(s.victim.logits(s.x))
    turned = _unit(s.victim.logits(s.x.flip(0))).flip(0)
    alone = torch.cat([_unit(s.victim.logits(s.x[i : i + 1])) for i in range(min(4, len(s.x)))])
    apart = max(float((whole - turned).abs().max()), float((whole[: len(alone)] - alone).abs().max()))
    if apart > 1e-3:
        yield Finding(
            "batch-dependent",
            "an image's answer changes with the batch it is in",
            {"largest_difference": apart},
            "A verdict per image means nothing then: look for batch statistics or detection across the batch.",
        )


def _zero_gradients(s: Subject) -> Iterator[Finding]:
    classes = s.victim.logits(s.x[:1]).shape[1]
    losses = {"ce": ce} | ({"dlr": dlr} if classes >= 3 else {})
    shares = {}
    for name, loss in losses.items():
        gradient = s.victim.gradient(s.x, loss, s.y, s.y)[2]
        shares[name] = float((gradient.flatten(1).abs().sum(1) == 0).float().mean())
    if max(shares.values()) > 0.05:
        yield Finding(
            "zero-gradients",
            "the gradient of the loss with respect to the image is exactly zero for a share of the images",
            {f"share_{name}": share for name, share in shares.items()} | {"images": len(s.x)},
            ADAPTIVE,
        )


def _surrogate(s: Subject) -> Iterator[Finding]:
    assert s.victim.surrogate is not None
    ours = s.victim.logits(s.x)
    theirs = Victim(s.victim.surrogate, most=s.victim.most).logits(s.x)
    share = float((ours.argmax(1) != theirs.argmax(1)).float().mean())
    if share > 0.1:
        yield Finding(
            "surrogate-differs",
            "the surrogate that gradients are taken from classifies a share of the images as the model does not",
            {"share": share, "median_difference": float((_unit(ours) - _unit(theirs)).norm(dim=1).median())}
            | {"images": len(s.x)},
            "Its gradients say little of this model: a surrogate should agree with the model wherever it can.",
        )


def _finite_differences(s: Subject) -> Iterator[Finding]:
    """Along the gradient of the margin the margin must change as the gradient says (a central difference, ours).

    The step is chosen for a change of 1% of the spread of the logits, above the rounding of float32 and small enough
    that few ReLUs switch; images are moved inside the box first, since a model may clip what leaves it.
    """
    inside = s.x.clamp(_STEP, 1 - _STEP)
    logits, _, gradient = s.victim.gradient(inside, cw, s.y, s.y)
    slope = gradient.flatten(1).norm(dim=1)
    usable = (slope > 0) & slope.isfinite()
    if not bool(usable.any()):
        return
    inside, label, gradient, slope = inside[usable], s.y[usable], gradient[usable], slope[usable]
    direction = gradient / per_row(slope, gradient)
    step = (0.01 * logits[usable].std(1) / slope).minimum(_STEP / direction.flatten(1).abs().amax(1))
    move = direction * per_row(step, direction)
    change = margin(s.victim.logits(inside - move), label) - margin(s.victim.logits(inside + move), label)
    error = (change / (2 * step * slope) - 1).abs()
    share = float((error > 0.5).float().mean())
    if share > 0.2:
        yield Finding(
            "finite-differences",
            "the gradient with respect to the image disagrees with finite differences of the model's own answers",
            {"share": share, "median_relative_error": float(error.median()), "images": len(error)},
            ADAPTIVE,
        )


_STEP = 1 / 255  # of a pixel, at most


def _noise(s: Subject) -> Iterator[Finding]:
    rows = torch.arange(len(s.x))
    zero = torch.zeros_like(rows)
    stream = Noise(s.seed, s.index).stream("transfer", rows, zero, zero)
    geometry, shape = GEOMETRY[s.threat.norm], tuple(s.x.shape[1:])
    noise = (stream.uniform if geometry.noise == "uniform" else stream.gaussian)(0, shape).to(s.x.device)
    wrong = s.victim.logits(geometry.surface(s.x, noise, s.threat.eps)).argmax(1) != s.y
    share = float(wrong.float().mean())
    if share > 0.1:
        yield Finding(
            "random-noise",
            "random noise of the same size already misleads the model on a share of the images it classified correctly",
            {"share": share, "images": len(s.x)},
            "Such a model is not robust to this threat at all: is ε in the units of [0, 1] images?",
        )


def _monotone(s: Subject) -> Iterator[Finding]:
    """An attack must do no worse with more steps or a larger ball, and everything must fall in a huge one."""

    def accuracy(eps: float, steps: int) -> float:
        threat = replace(s.threat, eps=eps)
        *_, last = drive(
            Apgd(s.victim, threat, steps=steps),
            plan(torch.arange(len(s.x), device=s.x.device), s.x.new_empty(0)),
            s.x,
            s.y,
            threat,
            noise=Noise(s.seed, s.index),
            verify=lambda at, label: s.victim.logits(at).argmax(1) != label,
            batch_size=PROBE,
        )
        return 1 - float(last.outcome.broken.float().mean())

    eps, large = s.threat.eps, max(LARGE[s.threat.norm], s.threat.eps)
    few, many = accuracy(eps, 5), accuracy(eps, 20)
    wide = accuracy(min(2 * eps, large), 20)
    slack = 0.02 + 1 / len(s.x) + (0.1 if s.randomised else 0)
    if many > few + slack or wide > many + slack:
        yield Finding(
            "not-monotone",
            "the accuracy under APGD rises with more steps or a larger ball",
            {"eps_5_steps": few, "eps_20_steps": many, "2eps_20_steps": wide, "images": len(s.x)},
            ADAPTIVE,
        )
    huge = accuracy(large, 20)
    if huge > 0.1:
        yield Finding(
            "survives-large-eps",
            f"APGD leaves images unbroken in a ball of radius {large:g}, where any image may become any other",
            {"accuracy": huge, "eps": large, "images": len(s.x)},
            ADAPTIVE,
        )


def _unit(z: Tensor) -> Tensor:
    return z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10)
