"""Each member of the ensemble alone, in low precision, is as strong as in float32: an ensemble's agreement would not
show that one of its members is broken. Counted before the confirmation in float32, which would hide it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.ensemble import Member
from robudget.backend.folding import crafting_copy
from robudget.evaluation.evaluator import evaluate
from robudget.threat import Threat

MEMBERS = {
    "apgd-ce": Member("apgd-ce", steps=20),
    "apgd-t": Member("apgd-t", steps=15, targets=3),
    "fab-t": Member("fab-t", steps=15, targets=3),
    "square": Member("square", steps=250),
}
THREATS = {"linf": Threat("linf", 0.055), "l2": Threat("l2", 0.3)}


class Masked(nn.Module):
    """Inputs rounded to 16 levels, logits scaled by a thousand: no gradient, and a saturated loss."""

    def __init__(self, model: nn.Module, levels: int, scale: float) -> None:
        super().__init__()
        self.model, self.levels, self.scale = model, levels, scale

    def forward(self, x: Tensor) -> Tensor:
        seen = (x * self.levels).round() / self.levels if self.levels else x
        return self.scale * self.model(seen)


def broken(model: nn.Module, images: tuple[Tensor, Tensor], member: Member, threat: Threat, precision: str) -> float:
    """The share of the images that the attack's own stage broke."""
    verdicts = evaluate(
        model,
        *images,
        threat,
        attacks=[member],
        precision=precision,  # type: ignore[arg-type]
        checks=False,
        batch_size=128,
    )
    stage = next(item for item in verdicts.spent if item.attack == member.name)
    assert verdicts.about["precision"] == precision
    return stage.broken / verdicts.n


CASES = [("trained", name, norm) for name in MEMBERS for norm in THREATS]
CASES += [("scaled", name, "linf") for name in MEMBERS] + [("quantised", "square", "linf")]


@pytest.mark.parametrize(("kind", "name", "norm"), CASES)
def test_low_precision_breaks_as_many_as_float32(small, crowd, kind, name, norm):
    model = {"trained": small, "scaled": Masked(small, 0, 1e3), "quantised": Masked(small, 15, 1.0)}[kind].eval()
    threat = THREATS[norm]
    if name == "square":
        threat = Threat(threat.norm, threat.eps * 2)
    full, low = (broken(model, crowd, MEMBERS[name], threat, p) for p in ("float32", "bfloat16"))
    if not (kind == "scaled" and name == "apgd-ce"):  # cross-entropy saturates there; 2% still holds
        assert 0.1 < full < 0.95
    assert abs(full - low) <= 0.02


def test_low_precision_is_low(small, crowd):
    """What was compared above did compute in bfloat16."""
    x = crowd[0][:32]
    with torch.no_grad():
        full, low = small(x), crafting_copy(small, x, "bfloat16")(x).float()
    error = float((low - full).norm() / full.norm())
    assert 1e-4 < error < 0.03
