"""Small models whose worst case is known, and one that was really trained."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Logits Wx + b of the flattened image."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


class Small(nn.Module):
    """Two convolutions with BatchNorm and a head: 4 classes of 1×8×8 images."""

    def __init__(self, classes: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 16, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def blobs(n: int, classes: int, seed: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Images of noisy class prototypes: learnable, not trivial."""
    g = torch.Generator().manual_seed(seed)
    prototypes = torch.rand(classes, channels, 8, 8, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=g)
    noise = torch.randn(n, channels, 8, 8, generator=g)
    return (0.5 + 0.35 * (prototypes[y] - 0.5) + 0.12 * noise).clamp(0, 1), y


def train(model: nn.Module, classes: int, channels: int = 1) -> nn.Module:
    x, y = blobs(512, classes, 1, channels)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks on a shared machine: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small() -> nn.Module:
    """A trained `Small` with 6 classes and one channel."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return train(Small(6), 6)


@pytest.fixture(scope="session")
def images() -> tuple[Tensor, Tensor]:
    return blobs(60, 6, 7)
