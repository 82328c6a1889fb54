"""What an update minimises, as functions of logits; `robudget/losses.py` names the losses.

Every function takes float32 logits (N, classes) and `target`, either int64 labels (N,) or probabilities (N, classes)
as CutMix, label smoothing and soft labels make them, and returns a scalar: the mean over the batch. None of them sees a
model or an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def smooth(target: Tensor, classes: int, smoothing: float) -> Tensor:
    """(1 − s)·target + s/classes as probabilities (N, classes) (Szegedy et al. 2016, section 7)."""
    probabilities = F.one_hot(target, classes).float() if target.ndim == 1 else target
    return probabilities * (1 - smoothing) + smoothing / classes if smoothing else probabilities


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of clean images: standard training; of adversarial ones: Madry et al. 2018, equation 2.1."""
    return F.cross_entropy(logits, target)


def kl(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """KL(softmax(logits) ‖ softmax(logits_adv))."""
    log_p, log_q = F.log_softmax(logits, dim=1), F.log_softmax(logits_adv, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def trades(logits: Tensor, logits_adv: Tensor, target: Tensor, beta: float) -> Tensor:
    """CE(clean) + β·KL(clean ‖ adversarial) (Zhang et al. 2019, equation 5 with 1/λ = β)."""
    return F.cross_entropy(logits, target) + beta * kl(logits, logits_adv)


def mart(logits: Tensor, logits_adv: Tensor, target: Tensor, beta: float) -> Tensor:
    """BCE(adversarial) + β·KL(clean ‖ adversarial)·(1 − p_clean(y)) (Wang et al. 2020, equations 7 and 8).

    BCE is the boosted cross-entropy −log p_adv(y) − log(1 − max_{k≠y} p_adv(k)). For a soft target, y is its largest
    class in the margin and in the weight, and the first term is the soft cross-entropy.
    """
    labels = target if target.ndim == 1 else target.argmax(1)
    hard = F.one_hot(labels, logits.shape[1]).bool()
    log_p, log_p_adv = F.log_softmax(logits, dim=1), F.log_softmax(logits_adv, dim=1)
    runner_up = log_p_adv.masked_fill(hard, -torch.inf).amax(1)
    boosted = F.cross_entropy(logits_adv, target) - torch.log1p(-runner_up.exp().clamp(max=1 - 1e-6)).mean()
    per_image = (log_p.exp() * (log_p - log_p_adv)).sum(1)
    doubt = 1 - log_p.gather(1, labels[:, None]).squeeze(1).exp()
    return boosted + beta * (per_image * doubt).mean()


IKL_ALPHA = 4.0  # weight of the soft cross-entropy; β of the classes' distances is 20 in the paper's runs
IKL_TEMPERATURE = 4.0  # of the probabilities whose means by class weigh the distances


def ikl(logits: Tensor, logits_adv: Tensor, target: Tensor, beta: float, weights: Tensor) -> Tensor:
    """CE(clean) + α·CE(softmax(clean), adversarial) + β·wMSE (Cui et al. 2024, arXiv 2305.13948; as released, γ = 1).

    wMSE is ¼·Σⱼₖ wⱼwₖ·((oⱼ − oₖ) − (o'ⱼ − o'ₖ))² of clean logits o and adversarial o': half the variance of o − o' over
    the classes under the `weights` (N, classes), a row for each image that sums to 1. The clean side of the soft
    cross-entropy is a constant, of the distances it is not.
    """
    soft = -(F.softmax(logits.detach(), dim=1) * F.log_softmax(logits_adv, dim=1)).sum(1).mean()
    gap = logits - logits_adv
    mean = (weights * gap).sum(1, keepdim=True)
    distances = 0.5 * (weights * (gap - mean).square()).sum(1).mean()
    return F.cross_entropy(logits, target) + IKL_ALPHA * soft + beta * distances


def squared(logits: Tensor, target: Tensor) -> Tensor:
    """‖softmax(logits) − target‖²: the squared error in place of cross-entropy (LSE; Pang et al. 2022, section 4)."""
    return (F.softmax(logits, dim=1) - smooth(target, logits.shape[1], 0.0)).square().sum(1).mean()


def score(logits: Tensor, logits_adv: Tensor, target: Tensor, beta: float) -> Tensor:
    """‖p(clean) − target‖² + β·‖p(clean) − p(adversarial)‖² (SCORE; Pang et al. 2022): TRADES with a true metric."""
    gap = F.softmax(logits, dim=1) - F.softmax(logits_adv, dim=1)
    return squared(logits, target) + beta * gap.square().sum(1).mean()


# By the recipe's `loss` and `metric`, the formula of clean and adversarial logits (and of the classes' weights where
# the loss has them); by `metric`, that of one of the two.
PAIRED: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("trades", "kl"): trades,
    ("trades", "squared"): score,
    ("mart", "kl"): mart,
    ("ikl", "kl"): ikl,
}
SINGLE = {"kl": cross_entropy, "squared": squared}
