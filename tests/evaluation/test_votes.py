"""Randomised models: verdicts by repeated passes, against models whose error probability is known in closed form."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.ensemble import Member
from robudget.errors import InputError
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.examples import replay
from robudget.evaluation.specification import Specification
from robudget.evaluation.state import Progress
from robudget.evaluation.verdicts import Verdicts, merge, page
from robudget.evaluation.votes import DECISIVE, TRIAL
from robudget.threat import Threat

EPS, SIGMA = 0.06, 0.1
THREAT = Threat("linf", EPS)
ATTACK = [Member("apgd-ce", steps=30, eot=2)]
NORMAL = NormalDist()


class Additive(nn.Module):
    """Two classes, logits ±(w·(x + σn) + b)/2 with Gaussian n: at x it errs with probability Φ(−m/(σ‖w‖)), m the margin
    w·x + b of class 0; within L∞ ε the margin falls by ε‖w‖₁ and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.linspace(-1, 1, 16).view(1, 4, 4)
        self.sigma = SIGMA

    def forward(self, x: Tensor) -> Tensor:
        z = ((x - 0.5 + self.sigma * torch.randn_like(x)) * self.w).flatten(1).sum(1)
        return torch.stack((z, -z), dim=1) / 2


def with_error(probabilities: list[float], model: Additive) -> Tensor:
    """Images of class 0 whose error probability at the worst point of the ball is as given."""
    w = model.w
    size, reach = float(w.norm()), EPS * float(w.abs().sum())
    margins = torch.tensor([reach - SIGMA * size * NORMAL.inv_cdf(p) for p in probabilities])
    return 0.5 + margins.view(-1, 1, 1, 1) * w / size**2


def judged(model, x: Tensor, **changes) -> Verdicts:
    given = {"attacks": ATTACK, "votes": 100, "checks": False, "examples": True, "batch_size": 32} | changes
    return evaluate(model, x, torch.zeros(len(x), dtype=torch.int64), THREAT, **given)


def test_an_image_falls_where_the_worst_error_probability_is_above_a_half():
    model = Additive().eval()
    low, high = [0.05, 0.1, 0.2, 0.3, 0.35], [0.68, 0.75, 0.85, 0.95]
    worst = [p for p in (*low, *high) for _ in range(6)]
    x = with_error(worst, model)
    found = judged(model, x)
    assert found.robust.tolist() == [p < 0.5 for p in worst]
    assert found.clean.all()
    # By single passes a lucky one ends images at which the model seldom errs.
    once = judged(model, x, votes=1)
    assert (~once.robust[:30]).sum() >= 8
    # What single passes do on the examples found is as the closed form says, within four binomial deviations.
    clean, right = found.right_in_passes
    shift = EPS * float(model.w.abs().sum()) / (SIGMA * float(model.w.norm()))
    unattacked = [NORMAL.cdf(NORMAL.inv_cdf(p) - shift) for p in worst]
    n = 100 * len(worst)
    assert abs(clean - (1 - np.mean(unattacked))) < 4 * math.sqrt(0.25 / n)
    assert abs(right - (1 - np.mean(worst))) < 4 * math.sqrt(0.25 / n) + 0.01
    # (Where it seldom errs, an attack may claim nothing; the image itself then stands for the strongest example.)
    error, p = found.frame["worst_error"].to_numpy()[18:], np.array(worst[18:])
    assert (np.abs(error - p) < 4.5 * np.sqrt(p * (1 - p) / 100) + 0.02).all()
    text = " ".join(page(found).split())
    assert "counts as misclassified where more than half of 100 passes err" in text
    assert f"{100 * right:.2f}% on the strongest examples found" in text


def test_examples_kept_are_of_images_that_fell_and_the_account_adds_up():
    model = Additive().eval()
    x = with_error([0.2] * 5 + [0.8] * 7, model)
    found = judged(model, x)
    assert found.examples is not None
    assert found.examples.index.tolist() == list(range(5, 12))
    shares = [replay(model, found.examples).fooled for _ in range(40)]
    assert (np.mean(shares, axis=0) > 0.5).all()
    assert [(item.attack, item.broken) for item in found.spent] == [("clean", 0), ("apgd-ce", 7), ("votes", 0)]
    assert found.spent[0].forward == 100 * 16  # padded to tiles
    assert found.spent[2].images == found.votes["tried"]
    assert found.votes["stand"] == 7
    assert (found.frame.loc[5:, "when"] > 0).all()
    assert (found.frame.loc[:4, "when"] == 0).all()
    assert judged(model, x, examples=False).examples is None


def test_the_clean_accuracy_is_by_the_same_rule():
    """Without attack, at ε = 0: images with an error probability of 0.7 are misclassified, with 0.3 they are not."""
    model = Additive().eval()
    size = SIGMA * float(model.w.norm())
    margins = torch.tensor([-size * NORMAL.inv_cdf(p) for p in [0.3] * 10 + [0.7] * 10])
    x = 0.5 + margins.view(-1, 1, 1, 1) * model.w / float(model.w.norm()) ** 2
    found = evaluate(model, x, torch.zeros(20, dtype=torch.int64), Threat("linf", 0), votes=100, attacks=ATTACK)
    assert found.clean.tolist() == [True] * 10 + [False] * 10
    assert found.robust_accuracy == found.clean_accuracy == 0.5
    assert np.abs(found.frame["clean_error"] - ([0.3] * 10 + [0.7] * 10)).max() < 0.2
    assert (found.frame["clean_margin"] > 0).tolist() == found.clean.tolist()


def test_judged_twice_it_is_the_same_whatever_the_state_of_the_generator():
    model = Additive().eval()
    x = with_error([0.3, 0.45, 0.5, 0.55, 0.7] * 4, model)
    first = judged(model, x)
    torch.manual_seed(5)
    assert judged(model, x).frame.equals(first.frame)
    assert not judged(model, x, seed=1).frame.equals(first.frame)


def test_shards_merge_and_a_stopped_one_goes_on(tmp_path):
    model = Additive().eval()
    x = with_error([0.1, 0.9] * 10, model)
    y = torch.zeros(20, dtype=torch.int64)
    given = {"attacks": ATTACK, "votes": 100, "checks": False}
    parts = [evaluate(model, x[p], y[p], THREAT, index=torch.arange(20)[p], **given) for p in (slice(8), slice(8, 20))]
    merged = merge(parts)
    assert merged.robust.tolist() == [True, False] * 10
    assert merged.votes["passes"] == 100
    assert merged.votes["stand"] == 10
    merged.save(tmp_path / "merged")
    assert Verdicts.load(tmp_path / "merged").right_in_passes == merged.right_in_passes
    with pytest.raises(InputError, match="votes = 100 and None"):
        merge([parts[0], evaluate(model, x[8:], y[8:], THREAT, index=torch.arange(8, 20), **given | {"votes": 1})])

    class Stop(Exception):
        pass

    def stop(now: Progress) -> None:
        raise Stop

    with pytest.raises(Stop):
        evaluate(model, x, y, THREAT, state=tmp_path / "state", progress=stop, **given)
    again = evaluate(model, x, y, THREAT, state=tmp_path / "state", **given)
    assert again.robust.tolist() == [True, False] * 10
    with pytest.raises(InputError, match="votes"):
        evaluate(model, x, y, THREAT, state=tmp_path / "state", **given | {"votes": 50})


def test_a_deterministic_model_keeps_its_verdicts_and_is_told_to_use_standard(small, images):
    once, voted = (
        evaluate(small, *images, Threat("linf", 0.05), attacks=["apgd-ce:steps=10"], votes=votes, checks=votes > 1)
        for votes in (1, 100)
    )
    columns = ["broken_by", "when", "restart", "target", "worst_margin"]
    assert voted.frame[columns].equals(once.frame[columns])
    assert voted.frame["worst_error"].tolist() == (~voted.robust).astype(float).tolist()
    assert [finding.name for finding in voted.findings] == ["deterministic"]


def test_which_evaluations_vote():
    assert Specification(THREAT, "rand").passes == 100
    assert Specification(THREAT, "rand", votes=1).passes == 1
    assert Specification(THREAT).passes == Specification(THREAT, attacks=["apgd-ce:eot=20"]).passes == 1
    assert Specification(THREAT, attacks=["apgd-ce"], votes=30).passes == 30
    for changes, said in (({"votes": 0}, "votes = 0"), ({"version": "quick", "votes": 9}, "with version quick")):
        with pytest.raises(InputError, match=said):
            Specification(THREAT, **changes)


def test_a_claim_at_a_coins_toss_seldom_ends_an_image():
    tail = sum(math.comb(TRIAL, k) for k in range(DECISIVE, TRIAL + 1)) / 2**TRIAL
    assert 1 / 5000 < tail < 1 / 4500
