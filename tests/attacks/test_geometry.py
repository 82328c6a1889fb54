"""Projections, starts and directions of each norm against their definitions."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from robudget.attacks.geometry import GEOMETRY, enforce, l1_project, within

NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.1, "l2": 0.8, "l1": 3.0}


def batch(n=16, scale=1.0, seed=0, shape=(3, 5, 4)):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=g)
    x[: n // 2].mul_(2).sub_(0.5).clamp_(0, 1)  # half of the images touch the walls
    return x, x + scale * torch.randn(n, *shape, generator=g)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_lands_inside_and_leaves_inside_points_alone(norm):
    x, far = batch()
    geometry = GEOMETRY[norm]
    out = geometry.project(far, x, EPS[norm])
    assert out.min() >= 0
    assert out.max() <= 1
    assert (geometry.distance(out, x) <= EPS[norm] * (1 + 1e-5)).all()
    again = geometry.project(out, x, EPS[norm] * 1.01)
    assert torch.allclose(again, out, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_takes_a_radius_per_row(norm):
    x, far = batch()
    radii = torch.linspace(0.1, 1, len(x)) * EPS[norm]
    together = GEOMETRY[norm].project(far, x, radii)
    for i in range(len(x)):
        one = GEOMETRY[norm].project(far[i : i + 1], x[i : i + 1], float(radii[i]))
        assert torch.allclose(together[i : i + 1], one, atol=1e-6)


def test_l1_projection_is_the_nearest_point():
    """Against a general solver: nothing of the ball ∩ box is nearer."""
    g = np.random.default_rng(0)
    for _ in range(8):
        x = g.random(6)
        y = x + g.normal(0, 0.8, 6)
        eps = g.uniform(0.2, 1.5)
        ours = l1_project(*(torch.tensor(v[None, :, None, None]) for v in (y, x)), eps).numpy().ravel()
        # Minimise over positive and negative parts, where the L1 ball is linear.
        bounds = [(0, 1 - v) for v in x] + [(0, v) for v in x]
        best = minimize(
            lambda d, x=x, y=y: np.sum((x + d[:6] - d[6:] - y) ** 2),
            np.zeros(12),
            bounds=bounds,
            constraints={"type": "ineq", "fun": lambda d, eps=eps: eps - d.sum()},
        )
        theirs = x + best.x[:6] - best.x[6:]
        assert np.sum((ours - y) ** 2) <= np.sum((theirs - y) ** 2) + 1e-6
        assert np.abs(ours - x).sum() <= eps + 1e-9


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_has_norm_one_and_reaches_the_dual_norm(norm):
    g = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    direction = GEOMETRY[norm].steepest(g)
    assert torch.allclose(GEOMETRY[norm].size(direction), torch.ones(8), atol=1e-5)
    assert torch.allclose((direction * g).flatten(1).sum(1), GEOMETRY[norm].dual(g), rtol=1e-5)
    assert (GEOMETRY[norm].steepest(torch.zeros(2, 3, 4, 4)) == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_in_the_ball(norm):
    x, noise = batch()
    geometry = GEOMETRY[norm]
    start = geometry.surface(x, noise - x, EPS[norm])
    assert within(enforce(start, x, EPS[norm], norm), x, EPS[norm], norm).all()
    middle = torch.full((4, 3, 5, 4), 0.5)
    full = geometry.surface(middle, (noise - x)[:4], EPS[norm])
    assert torch.allclose(geometry.distance(full, middle), torch.full((4,), EPS[norm]), rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_inside_is_uniform_in_the_ball(norm):
    """P(‖δ‖ ≤ r·ε) = r^D for a uniform draw, away from the walls."""
    x = torch.full((4000, 1, 2, 2), 0.5)
    eps = 0.2
    geometry = GEOMETRY[norm]
    draws = geometry.inside(x, eps, torch.Generator().manual_seed(2))
    ratio = geometry.distance(draws, x) / eps
    for r in (0.5, 0.7, 0.9):
        assert float((ratio <= r).float().mean()) == pytest.approx(r**4, abs=0.03)
    assert torch.equal(draws, geometry.inside(x, eps, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [1e-3, 8 / 255, 0.5, 3.0])
def test_seal_makes_the_contract_hold(norm, eps):
    if norm == "linf" and eps > 1:
        return
    x, far = batch(64, scale=2.0)
    rough = GEOMETRY[norm].project(far, x, eps) + 1e-6 * torch.randn_like(x)
    out = enforce(rough, x, eps, norm)
    assert within(out, x, eps, norm).all()
    # It moves by rounding errors only.
    assert float((out - rough).abs().max()) < 1e-4
    if norm == "linf":
        assert (out >= x - eps).all()
        assert (out <= x + eps).all()
    else:
        order = 1 if norm == "l1" else 2
        length = np.linalg.norm((out.double() - x.double()).flatten(1).numpy(), order, axis=1)
        assert length.max() <= eps * (1 + 1e-6)


def test_within_refuses_what_lies_outside():
    x, _ = batch(4)
    assert not within(x + 2, x, 0.5, "linf").any()
    assert not within((x + 0.2).clamp(0, 1), x, 0.01, "linf").any()
    assert not within((x + 0.2).clamp(0, 1), x, 0.01, "l2").any()
    assert within(x, x, 0.0, "l1").all()


def test_sizes():
    v = torch.tensor([[[[3.0, -4.0]]]])
    assert [float(GEOMETRY[n].size(v)) for n in NORMS] == [4, 5, 7]
    assert [float(GEOMETRY[n].dual(v)) for n in NORMS] == [7, 5, 4]
    assert math.isclose(float(GEOMETRY["l2"].distance(v, torch.zeros_like(v))), 5)
