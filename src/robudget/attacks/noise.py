"""Counter-based noise: Philox4x32-10 (Salmon et al., SC 2011) in integer tensor operations.

An attack's noise is a function of (seed, image, attack, target, restart, iteration) and of nothing else, so it is
bit-identical under any batching, sharding, device count or resume. Words are uint32 values held in int64 tensors,
because torch has no unsigned arithmetic everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robudget.attacks.ensemble import ATTACKS

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

# What else draws noise has a number that no attack has.
STREAMS = ATTACKS | {"elastic": 17, "jpeg": 18, "gabor": 19} | {"check": 9, "audit": 10}


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of counter (int64 tensors that broadcast, values < 2³²) and two of key → four words."""
    # The first multiplication broadcasts, so the small counters stay small until they have to grow.
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        # The signed product wraps, but its bits are those of the unsigned one.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((right >> 32) & _MASK) ^ b ^ k0,
            right & _MASK,
            ((left >> 32) & _MASK) ^ d ^ k1,
            left & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return a, b, c, d


@dataclass(frozen=True)
class Stream:
    """The noise of some rows of one attack. `index`, `target` and `restart` are int64 tensors (R,).

    `index` is an image's row in the full split (not in the batch); `target` is the rank of the target class (0 where
    there is none). Every method returns one line per row, and a line depends on that row alone.
    """

    seed: int
    attack: str
    index: Tensor
    target: Tensor
    restart: Tensor

    def words(self, iteration: Tensor | int, count: int) -> Tensor:
        """(R, count) random words in [0, 2³²), for one iteration (a number, or one per row)."""
        device = self.index.device
        blocks = torch.arange(-(-count // 4), device=device)
        if not isinstance(iteration, Tensor):
            iteration = torch.tensor(iteration, device=device)
        return self._philox(blocks, iteration.expand(self.index.shape).unsqueeze(1), 1)[:, :count]

    def block(self, first: Tensor, iterations: int, count: int) -> Tensor:
        """(iterations, R, count) words for iterations first, first + 1, …: one call for a whole block of iterations."""
        device = self.index.device
        blocks = torch.arange(-(-count // 4), device=device)
        steps = torch.arange(iterations, device=device).view(-1, 1, 1) + first.unsqueeze(1)
        return self._philox(blocks, steps, 2)[:, :, :count]

    def _philox(self, blocks: Tensor, iteration: Tensor, lead: int) -> Tensor:
        key = (self.seed & _MASK, (self.seed >> 32) & _MASK)
        name = (STREAMS[self.attack] << 24) | (self.target << 12) | self.restart
        words = philox((blocks, iteration, self.index.unsqueeze(1), name.unsqueeze(1)), key)
        return torch.stack(words, dim=-1).flatten(lead)

    def uniform(self, iteration: Tensor | int, shape: tuple[int, ...]) -> Tensor:
        """(R, *shape) float32 uniform on (−1, 1), symmetric, never exactly 0."""
        words = self.words(iteration, math.prod(shape))
        return symmetric(words).view(-1, *shape)

    def gaussian(self, iteration: Tensor | int, shape: tuple[int, ...]) -> Tensor:
        """(R, *shape) float32 standard normal, by Box–Muller in float64: its last bits are rounded away."""
        count = math.prod(shape)
        words = self.words(iteration, 2 * (-(-count // 2)))
        pairs = unit(words).double().view(words.shape[0], -1, 2)
        radius = (-2 * pairs[..., 0].log()).sqrt()
        angle = 2 * math.pi * pairs[..., 1]
        both = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
        return both.flatten(1)[:, :count].float().view(-1, *shape)


def unit(words: Tensor) -> Tensor:
    """Words → float32 uniform on (0, 1): 23 bits and a half, so neither end is reached."""
    return ((words >> 9).float() + 0.5) * 2.0**-23


def symmetric(words: Tensor) -> Tensor:
    """Words → float32 uniform on (−1, 1)."""
    return 2 * unit(words) - 1


def below(words: Tensor, n: Tensor | int) -> Tensor:
    """Words → integers uniform on {0, …, n − 1} (n < 2³¹); 0 where n is 0."""
    return (words * n) >> 32


@dataclass(frozen=True)
class Noise:
    """What a caller passes to an attack: the seed, and each image's row in the full split (None: 0, 1, 2, …)."""

    seed: int = 0
    index: Tensor | None = None

    def stream(self, attack: str, position: Tensor, target: Tensor, restart: Tensor) -> Stream:
        """The stream of the rows that attack images `position` of the caller's x."""
        index = position if self.index is None else self.index.to(position.device)[position]
        return Stream(self.seed, attack, index, target, restart)
