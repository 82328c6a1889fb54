"""Elastic, JPEG and Gabor: nothing at strength zero, never beyond their budgets, and gradients that beat chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Tensor, nn

from robudget.attacks.noise import Noise
from robudget.attacks.unseen import _BRIGHTNESS, DISTORTIONS, Elastic, Gabor, Jpeg, UnseenAttack
from robudget.errors import InputError
from robudget.evaluation.measurement import Setting
from robudget.evaluation.unseen import merge_unseen, unseen

SHAPES = [(1, 8, 8), (3, 32, 32), (3, 24, 40)]
STRONG = {"elastic": "elastic:eps=0.6", "jpeg": "jpeg:eps=0.6", "gabor": "gabor:eps=60"}


def drawn(name: str, shape: tuple[int, int, int], n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Images in the middle of [0, 1], parameters at random in their box, and what is fixed."""
    rows = torch.arange(n)
    stream = Noise(0).stream(name, rows, torch.zeros_like(rows), torch.zeros_like(rows))
    distortion = DISTORTIONS[name]()
    fixed = distortion.fixed(stream, shape)
    u = stream.uniform(0, distortion.parameters(shape))
    allowed = distortion.allowed(fixed, shape)
    x = 0.5 + 0.1 * (torch.rand(n, *shape, generator=torch.Generator().manual_seed(0)) - 0.5)
    return x, u if allowed is None else u * allowed, fixed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DISTORTIONS)
def test_strength_zero_is_the_image_and_every_image_stays_one(name: str, shape: tuple[int, int, int]) -> None:
    x, u, fixed = drawn(name, shape)
    distortion = DISTORTIONS[name]()
    assert torch.allclose(distortion(x, u, fixed, 0.0), x, atol=1e-5)
    far = distortion(x, u, fixed, 100.0)
    assert far.shape == x.shape
    assert 0 <= float(far.min()) <= float(far.max()) <= 1
    assert bool((far != x).any())


def test_elastic_moves_no_pixel_further_than_its_strength() -> None:
    _, u, _ = drawn("elastic", (3, 32, 32))
    assert float(Elastic().flow(u.sign(), 0.7).abs().max()) <= 0.7 * (1 + 1e-6)
    constant = Elastic().flow(torch.ones(1, 2, 32, 32), 0.7)
    assert torch.allclose(constant, torch.full_like(constant, 0.7))
    # A flow of a whole pixel to the right is a shift.
    x = torch.rand(1, 1, 16, 16)
    flow = torch.stack((torch.ones(16, 16), torch.zeros(16, 16)))[None]
    assert torch.allclose(Elastic()(x, flow, torch.zeros(1, 0), 1.0)[..., :-1], x[..., 1:], atol=1e-5)


@pytest.mark.parametrize("size", [16, 32])
def test_jpeg_changes_each_quantised_coefficient_by_half_its_strength_at_most(size: int) -> None:
    """Coded again by scipy's DCT, block by block."""
    x, u, fixed = drawn("jpeg", (1, size, size))
    eps = 0.3
    change = 255 * (Jpeg()(x, u.sign(), fixed, eps) - x)[:, 0].double().numpy()
    blocks = change.reshape(-1, size // 8, 8, size // 8, 8).swapaxes(2, 3)
    coefficients = dctn(blocks, axes=(-2, -1), norm="ortho") / np.array(_BRIGHTNESS)
    assert np.allclose(np.abs(coefficients), eps / 2, atol=1e-4)


def test_jpeg_of_colours_is_in_the_code_of_colours() -> None:
    """The change of brightness is that of a grey image; the change of colour is smooth over 2×2 pixels."""
    x, u, fixed = drawn("jpeg", (3, 32, 32))
    change = 255 * (Jpeg()(x, u, fixed, 0.1) - x)
    red, green, blue = change.unbind(1)
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    grey = 255 * (Jpeg()(x[:, :1], u[:, : 32 * 32], fixed, 0.1) - x[:, :1])[:, 0]
    assert torch.allclose(brightness, grey, atol=1e-2)
    colour = blue - brightness
    assert torch.allclose(colour[:, ::2, ::2], colour[:, 1::2, 1::2], atol=1e-2)


def test_gabor_adds_at_most_its_strength_and_only_where_impulses_may_be() -> None:
    x, u, fixed = drawn("gabor", (3, 32, 32))
    added = Gabor()(x, u, fixed, 25.0) - x
    assert float(added.min()) >= -1e-6
    assert float(added.max()) == pytest.approx(25 / 255, abs=1e-5)
    assert torch.allclose(added[:, 0], added[:, 1], atol=1e-6)
    places = Gabor().allowed(fixed, (3, 32, 32))
    assert places is not None
    assert float(places.float().mean()) == pytest.approx(1 / 14, abs=0.03)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_the_gradient_breaks_more_than_chance(name: str, small: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    chance, found = (
        unseen(small, x, y, attacks=[f"{STRONG[name]},steps={steps}"], setting=Setting(precision="float32"))
        for steps in (0, 20)
    )
    assert found.accuracy(name) < chance.accuracy(name) - 0.05
    assert chance.accuracy(name) <= float(chance.frame["clean"].mean())
    # An image that falls to the start falls to the whole attack.
    assert not (found.frame[name] & ~chance.frame[name]).any()


def test_no_image_depends_on_its_neighbours(small: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    whole = unseen(small, x, y, attacks=["gabor:eps=60,steps=5", "elastic:steps=3"])
    parts = [
        unseen(
            small, x[part], y[part], attacks=["gabor:eps=60,steps=5", "elastic:steps=3"], index=torch.arange(60)[part]
        )
        for part in (slice(0, 21), slice(21, 60))
    ]
    merged = merge_unseen(parts)
    assert (merged.frame == whole.frame).all().all()
    assert merged.results()["attacks"] == whole.results()["attacks"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("elastik", "did you mean 'elastic'"),
        ("jpeg:esp=1", "did you mean 'eps'"),
        ("jpeg:steps=x", "a number"),
        ("gabor:eps=-1", "at least 0"),
        ("gabor:steps=-1", "at least 0"),
    ],
)
def test_attacks_as_they_are_written(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        UnseenAttack.parse(text)
    assert UnseenAttack.parse("elastic:eps=1,steps=50") == UnseenAttack("elastic", 1.0, 50)
    assert UnseenAttack("elastic").strength((3, 32, 32)) == 0.5
    assert UnseenAttack("elastic").strength((3, 224, 224)) == 2.0
