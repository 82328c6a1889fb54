"""Survivors of a low-precision evaluation attacked again in float32: how many, and what that says of the rest.

They are taken in order of worst margin, nearest to misclassified first, in growing blocks, until 5% of them are done
and the last block had none that fell (ours). Pure data: imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from robudget.accuracy import hypergeometric_most, spent_error

FIRST_SHARE, FIRST_LEAST = 0.02, 2  # of the survivors, images: the first block
GROWTH = 1.5  # from one block to the next
ENOUGH_SHARE = 0.05  # of the survivors
LEVEL = 0.95  # of the bound on the rest, one-sided


def block_size(block: int, survivors: int) -> int:
    """How many images the `block`-th (from 0) holds, if there are so many left."""
    return max(FIRST_LEAST, math.ceil(FIRST_SHARE * GROWTH**block * survivors))


def enough(survivors: int, blocks: Sequence[int], fell: Sequence[int]) -> bool:
    """May the confirmation stop after blocks of these sizes, of which so many images fell?"""
    return bool(blocks) and sum(blocks) >= ENOUGH_SHARE * survivors and fell[-1] == 0


def images_if_none_falls(survivors: int) -> int:
    """How many survivors are attacked again where float32 changes nothing."""
    blocks: list[int] = []
    while sum(blocks) < survivors and not enough(survivors, blocks, [0] * len(blocks)):
        blocks.append(min(block_size(len(blocks), survivors), survivors - sum(blocks)))
    return sum(blocks)


@dataclass(frozen=True)
class Part:
    """One evaluation's confirmation, or a shard's: `attacked` of its `survivors` again, of which `fell` fell. `look`:
    the how-manieth place at which it might have stopped, from 0, it stopped at."""

    survivors: int
    attacked: int
    fell: int
    look: int = 0

    def at_most(self, error: float) -> int:
        """How many of those not attacked would fall, at most."""
        error = spent_error(self.look, error)
        return hypergeometric_most(self.fell, self.attacked, self.survivors, error) - self.fell

    @classmethod
    def of(cls, survivors: int, blocks: Sequence[int], fell: Sequence[int]) -> Part:
        done = [sum(blocks[: i + 1]) for i in range(len(blocks))]
        looks = sum(images >= ENOUGH_SHARE * survivors for images in done)
        return cls(survivors, sum(blocks), sum(fell), max(looks - 1, 0))


@dataclass(frozen=True)
class Blocks:
    """Survivors that were attacked once more, block by block; a part for each shard."""

    parts: tuple[Part, ...]

    @property
    def survivors(self) -> int:
        return sum(part.survivors for part in self.parts)

    @property
    def attacked(self) -> int:
        return sum(part.attacked for part in self.parts)

    @property
    def fell(self) -> int:
        return sum(part.fell for part in self.parts)

    @property
    def rest(self) -> int:
        """Survivors that were not attacked again."""
        return self.survivors - self.attacked

    @property
    def at_most(self) -> int:
        """How many of the rest would fall, at most, at `LEVEL`."""
        return self.bound(1 - LEVEL)

    def bound(self, error: float) -> int:
        """How many of the rest would fall, at most, but for a probability of `error`."""
        # Every shard's bound gets its share of the error, so that the sum holds.
        return sum(part.at_most(error / len(self.parts)) for part in self.parts)

    def __add__(self, other: Self) -> Self:
        return type(self)((*self.parts, *other.parts))

    def to_dict(self) -> dict[str, Any]:
        names = ("survivors", "attacked", "fell", "rest", "at_most")
        return {name: getattr(self, name) for name in names} | {
            "level": LEVEL,
            "parts": [asdict(part) for part in self.parts],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        names = {f.name for f in fields(Part)}
        return cls(tuple(Part(**{k: v for k, v in part.items() if k in names}) for part in data["parts"]))


@dataclass(frozen=True)
class Confirmation(Blocks):
    """What attacking survivors again in float32 showed.

    The bound on how many of those not attacked again would fall in float32 is exact (hypergeometric, one-sided,
    `LEVEL`, for every place at which the blocks may stop) if the images attacked again are at least as likely to fall
    as images drawn at random: they are those nearest to misclassified, which makes that plausible and does not prove
    it.
    """

    def __str__(self) -> str:
        fell = "none fell" if not self.fell else f"{self.fell} fell"
        if not self.survivors:
            return "no image survived, so there was nothing to attack again in float32"
        if not self.attacked:
            return f"none of the {self.survivors} survivors was attacked again in float32 (confirm = none)"
        if not self.rest:
            return f"all {self.survivors} survivors attacked again in float32, {fell}"
        return (
            f"{self.attacked} of {self.survivors} survivors attacked again in float32, those nearest to misclassified, "
            f"{fell}; at most {self.at_most} of the other {self.rest} would ({100 * LEVEL:.0f}%, exact if the nearest "
            "are at least as likely to fall as images drawn at random)"
        )
