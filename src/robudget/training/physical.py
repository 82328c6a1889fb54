"""The physical batch: how many images one pass of a training takes at once, with the same result."""

from __future__ import annotations

from dataclasses import dataclass

EVERY = slice(None)


@dataclass
class Physical:
    """How many images one pass takes at once, 0 = the whole batch; lowered where the memory does not hold more."""

    images: int = 0

    def parts(self, n: int) -> list[slice]:
        """Of a batch of n."""
        if not self.splits(n):
            return [EVERY]
        return [slice(first, first + self.images) for first in range(0, n, self.images)]

    def splits(self, n: int) -> bool:
        return 0 < self.images < n
