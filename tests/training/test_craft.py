"""Crafting: closed forms on linear models, bounds, restored modes, and what bfloat16 does to it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.geometry import GEOMETRY, within
from robudget.backend.folding import Folded
from robudget.backend.precision import Precision
from robudget.models import build
from robudget.recipe import Recipe
from robudget.threat import Threat
from robudget.training.craft import (
    Adversary,
    adversary_of,
    craft,
    cross_entropy,
    divergence,
    input_gradient,
    start_of,
)
from robudget.training.craft_mode import CraftMode
from robudget.training.distributed import World

FLOAT32 = Precision("float32", torch.device("cpu"))


class Linear(nn.Module):
    """Two classes, margin w·x: the worst case in any ball is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        margin = (x * self.w).sum((1, 2, 3))
        return torch.stack([margin, -margin], dim=1)


def attack(model: nn.Module, x: Tensor, y: Tensor, adversary: Adversary, seed: int = 0) -> Tensor:
    with CraftMode(model, FLOAT32)(x) as (victim, autocast):
        generator = torch.Generator().manual_seed(seed)
        return craft(victim, x, cross_entropy(y), adversary, generator=generator, autocast=autocast)


def middle(n: int = 5) -> Tensor:
    return 0.3 + 0.4 * torch.rand(n, 2, 3, 3, generator=torch.Generator().manual_seed(2))


def test_linf_finds_the_worst_corner_of_a_linear_model() -> None:
    model, x = Linear(), middle()
    found = attack(model, x, torch.zeros(5, dtype=torch.long), Adversary(Threat("linf", 0.1), 10, 0.05))
    torch.testing.assert_close(found, x - 0.1 * model.w.detach().sign().expand_as(x))


def test_l2_finds_the_worst_point_of_a_linear_model() -> None:
    model, x = Linear(), middle()
    found = attack(model, x, torch.zeros(5, dtype=torch.long), Adversary(Threat("l2", 0.2), 40, 0.05))
    w = model.w.detach()
    torch.testing.assert_close(found, (x - 0.2 * w / w.norm()).clamp(0, 1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_always_in_the_ball_and_the_box(norm: str, start: str) -> None:
    model = build("wrn-10-1", classes=4, image_size=8, base=2)
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 0, 1  # at the walls
    threat = Threat(norm, {"linf": 0.1, "l2": 0.5, "l1": 3.0}[norm])  # type: ignore[arg-type]
    before = x.clone()
    found = attack(model, x, torch.tensor([0, 1, 2, 3, 0, 1]), Adversary(threat, 3, threat.eps / 2, start=start))
    assert within(found, x, threat.eps, threat.norm).all()
    assert torch.equal(x, before)
    assert not torch.equal(found, x)


def test_in_place_steps_are_the_geometrys_to_the_last_bit() -> None:
    model, threat = build("wrn-10-1", classes=4, image_size=8, base=2), Threat("linf", 0.1)
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    found = attack(model, x, y, Adversary(threat, 4, 0.03), seed=3)
    geometry = GEOMETRY["linf"]
    slow = geometry.inside(x, threat.eps, torch.Generator().manual_seed(3))
    with CraftMode(model, FLOAT32)(x):
        for _ in range(4):
            gradient = input_gradient(model, slow, cross_entropy(y), nullcontext)
            slow = geometry.project(slow + 0.03 * geometry.steepest(gradient), x, threat.eps)
    assert torch.equal(found, slow)


def test_trades_raises_the_divergence() -> None:
    torch.manual_seed(0)
    model = build("wrn-10-1", classes=4, image_size=8, base=4).eval()
    x = torch.rand(8, 3, 8, 8)
    with torch.no_grad():
        clean = model(x)
    objective = divergence(clean)
    assert float(objective(clean)) == pytest.approx(0, abs=1e-5)
    adversary = Adversary(Threat("linf", 0.1), 5, 0.03, start="gaussian")
    with CraftMode(model, FLOAT32)(x):
        found = craft(model, x, objective, adversary, generator=torch.Generator(), autocast=nullcontext)
        assert float(objective(model(found))) > float(objective(model(start_of(x, adversary, None, World()))))


def modes(model: nn.Module) -> list[tuple[bool, bool]]:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return [(m.training, True) for m in model.modules()] + [(m.track_running_stats, m.training) for m in norms]


@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
def test_everything_is_put_back_even_on_an_exception(batchnorm: str) -> None:
    model = build("wrn-10-1", classes=4, image_size=8, base=2)
    model.blocks[0].eval()  # type: ignore[union-attr, index, operator]
    model.head.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = modes(model), [p.requires_grad for p in model.parameters()]
    mode = CraftMode(model, FLOAT32, batchnorm)

    def fail_inside() -> None:
        with mode(torch.rand(2, 3, 8, 8)):
            assert not any(p.requires_grad for p in model.parameters())
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_inside()
    assert before == (modes(model), [p.requires_grad for p in model.parameters()])


def test_batch_mode_normalises_by_the_batch_and_leaves_the_statistics() -> None:
    torch.manual_seed(0)
    model = build("wrn-10-1", classes=4, image_size=8, base=2)
    x = torch.rand(16, 3, 8, 8)
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(), CraftMode(model, FLOAT32, "batch")(x):
        crafting = model(x)
    assert all(torch.equal(v, statistics[k]) for k, v in model.state_dict().items())
    with torch.no_grad(), CraftMode(model, FLOAT32)(x):
        evaluating = model(x)
    with torch.no_grad():
        training = model.train()(x)
    torch.testing.assert_close(crafting, training)
    assert not torch.allclose(crafting, evaluating)


def test_the_cheap_ones_are_their_papers() -> None:
    base = Recipe().with_({"craft.steps": 1, "threat.eps": 0.1})
    wong = adversary_of(base.with_({"loss": "fgsm-rs"}))
    assert (wong.steps, wong.step_size, wong.reach, wong.bounded) == (1, pytest.approx(0.125), 1.0, True)
    jorge = adversary_of(base.with_({"loss": "n-fgsm"}))
    assert (jorge.steps, jorge.step_size, jorge.reach, jorge.bounded) == (1, pytest.approx(0.1), 2.0, False)
    paper = adversary_of(Recipe().with_({"craft.steps": 10}))
    assert paper.step_size == pytest.approx(1.5 * 8 / 255 / 10)


def test_n_fgsm_leaves_the_ball_but_not_the_box() -> None:
    model, x = Linear(), middle()
    adversary = Adversary(Threat("linf", 0.1), 1, 0.1, reach=2.0, bounded=False)
    found = attack(model, x, torch.zeros(5, dtype=torch.long), adversary)
    distance = (found - x).abs().amax()
    assert 0.1 < float(distance) <= 0.3 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


def test_many_processes_draw_what_one_would() -> None:
    x = torch.rand(8, 1, 4, 4)
    for start in ("uniform", "gaussian"):
        adversary = Adversary(Threat("linf", 0.1), 1, 0.1, start=start)
        whole = start_of(x, adversary, torch.Generator().manual_seed(4), World())
        for rank in range(2):
            world = World(rank, 2)
            mine = start_of(x[world.mine], adversary, torch.Generator().manual_seed(4), world)
            assert torch.equal(mine, whole[world.mine])


def test_bfloat16_crafting_is_nearly_as_strong() -> None:
    torch.manual_seed(0)
    model = build("wrn-16-1", classes=10, image_size=16, base=8)
    x, y = torch.rand(32, 3, 16, 16), torch.randint(0, 10, (32,))
    gains = {}
    for name in ("float32", "bfloat16"):
        precision = Precision(name, torch.device("cpu"))  # type: ignore[arg-type]
        with CraftMode(model, precision)(x) as (victim, autocast):
            assert isinstance(victim, Folded) == (name == "bfloat16")
            adversary = Adversary(Threat("linf", 0.05), 5, 0.02, start="none")
            found = craft(victim, x, cross_entropy(y), adversary, generator=None, autocast=autocast)
            assert found.dtype == torch.float32
            assert within(found, x, 0.05, "linf").all()
            with torch.no_grad():
                gains[name] = float(cross_entropy(y)(model(found)) - cross_entropy(y)(model(x)))
    assert gains["bfloat16"] > 0.97 * gains["float32"] > 0
