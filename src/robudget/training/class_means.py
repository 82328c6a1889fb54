"""What the model said of each class in the epoch before: the weights of IKL's distances (Cui et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from robudget.training.distributed import World
from robudget.training.losses import IKL_TEMPERATURE


@dataclass
class ClassMeans:
    """`weights` (classes, classes): of each class the mean probabilities of its clean images over the epoch before, all
    equal in the first. `sums`: this epoch's so far, over all processes."""

    weights: Tensor
    sums: Tensor

    @classmethod
    def begin(cls, classes: int, device: torch.device) -> ClassMeans:
        shape = (classes, classes)
        return cls(torch.full(shape, 1 / classes, device=device), torch.zeros(shape, device=device))

    def add(self, logits: Tensor, labels: Tensor, world: World) -> None:
        """Clean logits (N, classes) of this process's images."""
        probabilities = F.softmax(logits / IKL_TEMPERATURE, dim=1)
        self.sums += world.total(torch.zeros_like(self.sums).index_add_(0, labels, probabilities))

    def turn(self) -> None:
        """An epoch has ended. A class without an image in it keeps its weights."""
        totals = self.sums.sum(1, keepdim=True)
        self.weights = torch.where(totals > 0, self.sums / totals.clamp(min=1e-30), self.weights)
        self.sums = torch.zeros_like(self.sums)
