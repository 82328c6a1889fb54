"""Attacks outside the norms: elastic, JPEG and Gabor (Kang et al. 2019, on robustness against unforeseen adversaries).

Each distorts an image by parameters of its own, here u in [−1, 1] times the strength ε, that PGD with signed steps
raises the loss by (arXiv 1908.08016, Section 3; units and constants as in the authors' code, so that their calibrated
strengths hold). The gradient reaches the parameters through the model's gradient of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, interpolate, pad

from robudget.attacks.driver import Rows, State, initial
from robudget.attacks.noise import Stream
from robudget.attacks.victim import Victim, margin, objective
from robudget.errors import InputError, unknown
from robudget.threat import parse_number

LARGE_PIXELS = 128  # images at least so large are taken for ImageNet's


class Distortion(Protocol):
    """A family of distortions of images (R, C, H, W). `strengths`: the default ε for small and for large images, the
    third of the authors' six (as hard, to a model trained against it, as L∞ 4/255)."""

    strengths: tuple[float, float]

    def parameters(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        """The shape of u for one image."""

    def fixed(self, stream: Stream, shape: tuple[int, int, int]) -> Tensor:
        """(R, …) what is random about the attack and is not optimised; (R, 0) where nothing is."""

    def allowed(self, fixed: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
        """(R, …) bool: parameters that may differ from 0; None: all."""

    def __call__(self, x: Tensor, u: Tensor, fixed: Tensor, eps: float) -> Tensor:
        """x distorted by ε·u and moved into [0, 1]; differentiable in u; x itself where ε = 0."""


def _nothing(stream: Stream) -> Tensor:
    return torch.zeros(len(stream.index), 0, device=stream.index.device)


class Elastic:
    """A flow of at most ε pixels along each axis at each pixel, smoothed by a Gaussian, by which the image is warped.

    The Gaussian has a deviation of 3 pixels in an image of 224, in proportion to the size, and ends at 4 deviations.
    """

    strengths = (0.5, 2.0)

    def parameters(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (2, *shape[1:])

    def fixed(self, stream: Stream, shape: tuple[int, int, int]) -> Tensor:
        return _nothing(stream)

    def allowed(self, fixed: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
        return None

    def flow(self, u: Tensor, eps: float) -> Tensor:
        """(R, 2, H, W) in pixels; no entry above ε, since smoothing averages."""
        deviation = 3 * u.shape[-1] / 224
        reach = math.ceil(4 * deviation)
        reach = min(reach, min(u.shape[-2:]) - 1)
        at = torch.arange(-reach, reach + 1, device=u.device, dtype=u.dtype)
        line = torch.exp(-((at / deviation) ** 2) / 2)
        line = line / line.sum()
        wide = pad(eps * u, (reach,) * 4, mode="reflect").flatten(0, 1).unsqueeze(1)
        smooth = conv2d(conv2d(wide, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return smooth.view_as(u)

    def __call__(self, x: Tensor, u: Tensor, fixed: Tensor, eps: float) -> Tensor:
        h, w = x.shape[-2:]
        y_axis = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(1, h, 1).expand(len(x), h, w)
        x_axis = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).view(1, 1, w).expand(len(x), h, w)
        flow = self.flow(u, eps)
        grid = torch.stack((x_axis + flow[:, 0] * 2 / (w - 1), y_axis + flow[:, 1] * 2 / (h - 1)), dim=-1)
        return grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True).clamp(0, 1)


# The tables of quantisation of JPEG's Annex K, of brightness and of colour.
_BRIGHTNESS = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_COLOUR = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))


class Jpeg:
    """The quantised coefficients of an image's JPEG code (4:2:0) change by at most ε/2.

    The decoder is linear, so the change is decoded and added to the image; the code's own loss, which would change the
    image at ε = 0 too, is left out (ours).
    """

    strengths = (0.125, 0.25)

    def parameters(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        c, h, w = shape
        high, wide = -(-h // 16) * 16, -(-w // 16) * 16
        return (high * wide * 3 // 2 if c == 3 else high * wide,)

    def fixed(self, stream: Stream, shape: tuple[int, int, int]) -> Tensor:
        return _nothing(stream)

    def allowed(self, fixed: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
        return None

    def __call__(self, x: Tensor, u: Tensor, fixed: Tensor, eps: float) -> Tensor:
        c, h, w = x.shape[1:]
        high, wide = -(-h // 16) * 16, -(-w // 16) * 16
        table = torch.tensor(_BRIGHTNESS, device=x.device, dtype=x.dtype)
        y = self._plane(u[:, : high * wide] * (eps / 2), table, high, wide)
        if c != 3:
            change = y.unsqueeze(1)
        else:
            colour = torch.full((8, 8), 99.0, device=x.device, dtype=x.dtype)
            colour[:4, :4] = torch.tensor(_COLOUR, device=x.device, dtype=x.dtype)
            blue, red = (
                interpolate(self._plane(part * (eps / 2), colour, high // 2, wide // 2).unsqueeze(1), scale_factor=2.0)
                for part in u[:, high * wide :].chunk(2, dim=1)
            )
            blue, red = blue.squeeze(1), red.squeeze(1)
            change = torch.stack((y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue), dim=1)
        return (x + change[..., :h, :w] / 255).clamp(0, 1)

    @staticmethod
    def _plane(coefficients: Tensor, table: Tensor, h: int, w: int) -> Tensor:
        """(R, h·w) quantised coefficients, block by block → (R, h, w) pixels of 255: inverse DCT of 8×8 blocks."""
        at = torch.arange(8, device=table.device, dtype=table.dtype)
        basis = torch.cos((2 * at.view(8, 1) + 1) * at * math.pi / 16) / 2  # pixel, frequency
        basis[:, 0] /= math.sqrt(2)
        blocks = coefficients.view(-1, h // 8, w // 8, 8, 8) * table
        pixels = torch.einsum("rijuv,xu,yv->rixjy", blocks, basis, basis)
        return pixels.reshape(-1, h, w)


class Gabor:
    """Noise of oriented waves: a sparse map of impulses, convolved with one random Gabor kernel an image, spread over
    [0, 1] and added times ε/255. The impulses (one pixel in 14) are optimised; kernel and places are random."""

    strengths = (25.0, 25.0)
    density = 1 / 14

    @staticmethod
    def _side(shape: tuple[int, int, int]) -> int:
        """Of the kernel: 23 pixels, or what a smaller image has room for."""
        least = min(shape[1:])
        return min(23, least if least % 2 else least - 1)

    def parameters(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (1, *shape[1:])

    def fixed(self, stream: Stream, shape: tuple[int, int, int]) -> Tensor:
        """(R, kernel and places, flat)."""
        side = self._side(shape)
        one, two, three, four = ((1 + stream.uniform(1, (4,))) / 2).unbind(1)
        turns = (one * 10).floor().clamp(max=9) + 1
        deviation, waves, angle = 0.1 + 0.3 * two, 3 + (23 / 4 - 3) * three, math.pi * four
        line = torch.linspace(-0.5, 0.5, side, device=one.device)
        kernel = torch.zeros(len(one), side, side, device=one.device)
        for turn in range(10):
            theta = (angle + math.pi * turn / turns).view(-1, 1, 1)
            along = line.view(1, 1, -1) * theta.cos() + line.view(1, -1, 1) * theta.sin()
            across = line.view(1, -1, 1) * theta.cos() - line.view(1, 1, -1) * theta.sin()
            bell = torch.exp(-(along**2 + across**2) / (2 * (deviation.view(-1, 1, 1) + 1e-3) ** 2))
            wave = torch.cos(2 * math.pi * waves.view(-1, 1, 1) * along)
            kernel += bell * wave * (turn < turns).view(-1, 1, 1)
        places = (1 + stream.uniform(2, self.parameters(shape))) / 2 < self.density
        return torch.cat((kernel.flatten(1), places.flatten(1).to(kernel.dtype)), dim=1)

    def allowed(self, fixed: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
        side = self._side(shape)
        return fixed[:, side * side :].view(-1, *self.parameters(shape)) > 0

    def noise(self, u: Tensor, fixed: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """(R, 1, H, W) in [0, 1]."""
        side = self._side(shape)
        kernel = fixed[:, : side * side].view(-1, 1, side, side)
        waves = conv2d(u.transpose(0, 1), kernel, padding=side // 2, groups=len(u)).transpose(0, 1)
        away = waves - waves.mean((1, 2, 3), keepdim=True).detach()
        # Small waves are raised to nearly the size of large ones; the factor is no part of the gradient.
        share = away.detach().abs()
        share = share / share.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        raised = away * (1.001 / (0.001 + share))
        low, high = (end(raised.detach(), (1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
        return (raised - low) / (high - low).clamp(min=1e-12)

    def __call__(self, x: Tensor, u: Tensor, fixed: Tensor, eps: float) -> Tensor:
        c, h, w = x.shape[1:]
        return (x + eps / 255 * self.noise(u, fixed, (c, h, w))).clamp(0, 1)


DISTORTIONS: dict[str, Callable[[], Distortion]] = {"elastic": Elastic, "jpeg": Jpeg, "gabor": Gabor}


@dataclass(frozen=True)
class UnseenAttack:
    """One of them with its strength (None: the default for the size of the images), its steps, and the size of a step
    as a share of ε (None: 1/√steps, the authors')."""

    name: str
    eps: float | None = None
    steps: int = 100
    step_size: float | None = None

    def __post_init__(self) -> None:
        if self.name not in DISTORTIONS:
            raise unknown("unseen attack", self.name, DISTORTIONS)
        if self.eps is not None and not self.eps >= 0:
            raise InputError(f"{self.name}: eps = {self.eps} (allowed: at least 0)")
        if self.steps < 0:
            raise InputError(f"{self.name}: steps = {self.steps} (allowed: at least 0)")
        if self.step_size is not None and not self.step_size > 0:
            raise InputError(f"{self.name}: step_size = {self.step_size} (allowed: more than 0)")

    @classmethod
    def parse(cls, text: str) -> UnseenAttack:
        """`gabor` or `elastic:eps=1,steps=50`. Raises InputError."""
        name, _, rest = text.partition(":")
        settings: dict[str, Any] = {}
        for item in rest.split(",") if rest else ():
            field, _, value = item.partition("=")
            if field not in ("eps", "steps", "step_size"):
                raise unknown(f"setting of {name}", field, ("eps", "steps", "step_size"))
            try:
                settings[field] = int(value) if field == "steps" else parse_number(value)
            except ValueError:
                raise InputError(f"{name}: {field} = {value!r} (allowed: a number)") from None
        return cls(name, **settings)

    def strength(self, shape: tuple[int, int, int]) -> float:
        """ε for images of this shape (C, H, W)."""
        if self.eps is not None:
            return self.eps
        return DISTORTIONS[self.name]().strengths[min(shape[1:]) >= LARGE_PIXELS]

    def __str__(self) -> str:
        changed = [f"{f.name}={value}" for f in fields(self)[1:] if (value := getattr(self, f.name)) != f.default]
        return self.name + (":" + ",".join(changed) if changed else "")


@dataclass
class UnseenState(State):
    u: Tensor
    fixed: Tensor


class Unseen:
    """The state machine: PGD over u from a random start; a row spends steps + 1 evaluations."""

    stride = 1

    def __init__(self, victim: Victim, attack: UnseenAttack, shape: tuple[int, int, int]) -> None:
        self.victim, self.name, self.steps, self.shape = victim, attack.name, attack.steps, shape
        self.eps = attack.strength(shape)
        self.step_size = attack.step_size or 1 / math.sqrt(max(attack.steps, 1))
        self.distortion = DISTORTIONS[attack.name]()
        self._objective = objective("ce")

    @property
    def calls(self) -> int:
        return self.steps + 1

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> UnseenState:
        base = initial(rows, x, y, stream.index)
        fixed = self.distortion.fixed(stream, self.shape)
        u = self._within(stream.uniform(0, self.distortion.parameters(self.shape)), fixed)
        return UnseenState(**base, u=u, fixed=fixed)

    def step(self, s: UnseenState) -> None:
        with torch.enable_grad():
            u = s.u.detach().requires_grad_()
            x = self.distortion(s.x0, u, s.fixed, self.eps)
        s.x = x.detach()
        logits, _, to_image = self.victim.gradient(s.x, self._objective, s.y, s.target)
        (grad,) = torch.autograd.grad(x, u, to_image)
        s.claim(logits.argmax(1) != s.y, s.x, margin(logits, s.y))
        s.it += 1
        s.done |= s.it > self.steps
        s.u = self._within(s.u + self.step_size * grad.sign(), s.fixed)

    def _within(self, u: Tensor, fixed: Tensor) -> Tensor:
        allowed = self.distortion.allowed(fixed, self.shape)
        return u.clamp(-1, 1) if allowed is None else u.clamp(-1, 1) * allowed
