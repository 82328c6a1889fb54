"""Losses against the papers' formulas in numpy float64, and their gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from robudget.training import losses

RNG = np.random.default_rng(0)
CLEAN, ADV = 3 * RNG.normal(size=(6, 5)), 3 * RNG.normal(size=(6, 5))
LABELS = np.array([0, 1, 2, 3, 4, 2])
SOFT = softmax(RNG.normal(size=(6, 5)), axis=1)
ROWS = np.arange(6)
BETA = 5.0


def ce(z: np.ndarray, target: np.ndarray) -> float:
    log_p = log_softmax(z, axis=1)
    return float(-(log_p[ROWS, target] if target.ndim == 1 else (target * log_p).sum(1)).mean())


def kl_rows() -> np.ndarray:
    return (softmax(CLEAN, axis=1) * (log_softmax(CLEAN, axis=1) - log_softmax(ADV, axis=1))).sum(1)


def mart_by_hand(target: np.ndarray) -> float:
    labels = target if target.ndim == 1 else target.argmax(1)
    p_adv = softmax(ADV, axis=1)
    others = p_adv.copy()
    others[ROWS, labels] = 0
    boosted = ce(ADV, target) - np.log(1 - others.max(1)).mean()
    return float(boosted + BETA * (kl_rows() * (1 - softmax(CLEAN, axis=1)[ROWS, labels])).mean())


def squared_by_hand(z: np.ndarray, target: np.ndarray) -> float:
    wanted = np.eye(5)[target] if target.ndim == 1 else target
    return float(((softmax(z, axis=1) - wanted) ** 2).sum(1).mean())


def score_by_hand(target: np.ndarray) -> float:
    gap = ((softmax(CLEAN, axis=1) - softmax(ADV, axis=1)) ** 2).sum(1).mean()
    return squared_by_hand(CLEAN, target) + BETA * float(gap)


CASES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[np.ndarray], float]]] = {
    "standard": (lambda c, a, t: losses.cross_entropy(c, t), lambda t: ce(CLEAN, t)),
    "at": (lambda c, a, t: losses.cross_entropy(a, t), lambda t: ce(ADV, t)),
    "trades": (lambda c, a, t: losses.trades(c, a, t, BETA), lambda t: ce(CLEAN, t) + BETA * float(kl_rows().mean())),
    "mart": (lambda c, a, t: losses.mart(c, a, t, BETA), mart_by_hand),
    "squared": (lambda c, a, t: losses.squared(a, t), lambda t: squared_by_hand(ADV, t)),
    "score": (lambda c, a, t: losses.score(c, a, t, BETA), score_by_hand),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", [LABELS, SOFT], ids=["labels", "probabilities"])
def test_value_and_gradient(name: str, target: np.ndarray) -> None:
    loss, by_hand = CASES[name]
    clean = torch.tensor(CLEAN, requires_grad=True)
    adv = torch.tensor(ADV, requires_grad=True)
    wanted = torch.tensor(target)
    assert float(loss(clean, adv, wanted).detach()) == pytest.approx(by_hand(target), rel=1e-6)
    assert torch.autograd.gradcheck(lambda c, a: loss(c, a, wanted), (clean, adv), atol=1e-5)


def ikl_by_pairs(weights: np.ndarray, target: np.ndarray) -> float:
    """The loss of Cui et al. 2024 as released (γ = 1), pair of classes by pair of classes."""
    distances = 0.0
    for row in ROWS:
        for j in range(5):
            for k in range(5):
                gap = (CLEAN[row, j] - CLEAN[row, k]) - (ADV[row, j] - ADV[row, k])
                distances += 0.25 * weights[row, j] * weights[row, k] * gap**2 / len(ROWS)
    soft = -(softmax(CLEAN, axis=1) * log_softmax(ADV, axis=1)).sum(1).mean()
    return ce(CLEAN, target) + 4 * float(soft) + BETA * distances


@pytest.mark.parametrize("target", [LABELS, SOFT], ids=["labels", "probabilities"])
def test_ikl_is_the_papers_sum_over_pairs_of_classes(target: np.ndarray) -> None:
    weights = softmax(RNG.normal(size=(6, 5)), axis=1)
    got = losses.ikl(*map(torch.tensor, (CLEAN, ADV, target)), BETA, torch.tensor(weights))
    assert float(got) == pytest.approx(ikl_by_pairs(weights, target), rel=1e-6)


def test_its_two_terms_have_the_gradients_of_the_kullback_leibler_divergence() -> None:
    """Theorem 1 of Cui et al.: with an image's own probabilities as weights, the distances move the clean logits, and
    the soft cross-entropy the adversarial ones, as KL(clean ‖ adversarial) does."""
    clean, adv = (torch.tensor(z, requires_grad=True) for z in (CLEAN, ADV))
    to_clean, to_adv = torch.autograd.grad(losses.kl(clean, adv), (clean, adv))
    own, labels = torch.softmax(clean.detach(), 1), torch.tensor(LABELS)
    plain = torch.nn.functional.cross_entropy(clean, labels)
    distances = losses.ikl(clean, adv.detach(), labels, 1.0, own) - plain
    torch.testing.assert_close(torch.autograd.grad(distances, clean)[0], to_clean)
    soft = losses.ikl(clean, adv, labels, 0.0, own) / losses.IKL_ALPHA
    torch.testing.assert_close(torch.autograd.grad(soft, adv)[0], to_adv)


def test_smoothing_is_a_mixture_with_the_uniform() -> None:
    got = losses.smooth(torch.tensor([2]), 5, 0.1)
    torch.testing.assert_close(got, torch.tensor([[0.02, 0.02, 0.92, 0.02, 0.02]]))
    # The same as torch's own option, which works on labels only.
    z = torch.tensor(CLEAN)
    ours = losses.cross_entropy(z, losses.smooth(torch.tensor(LABELS), 5, 0.1).double())
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(z, torch.tensor(LABELS), label_smoothing=0.1))


def test_identical_logits_leave_the_clean_term_alone() -> None:
    z, y = torch.tensor(CLEAN), torch.tensor(LABELS)
    assert float(losses.trades(z, z, y, BETA)) == pytest.approx(float(losses.cross_entropy(z, y)))
    assert float(losses.score(z, z, y, BETA)) == pytest.approx(float(losses.squared(z, y)))


def test_confident_logits_stay_finite() -> None:
    z = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0])
    for loss in (losses.trades(z, -z, y, BETA), losses.mart(z, -z, y, BETA), losses.score(z, -z, y, BETA)):
        (gradient,) = torch.autograd.grad(loss, z)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
