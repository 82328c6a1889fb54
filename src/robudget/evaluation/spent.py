"""The entries of an evaluation's account: what one attack took, and what one check found. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A named warning: what was seen (`evidence`) and what to do about it (`advice`)."""

    name: str
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Spent:
    """What one attack took. `images` entered it, it broke `broken` of them; passes are of images, padding included.

    `forward` and `backward` go through the model, the others through its surrogate, where gradients are taken from one.
    `refuted` claims were made in the attack's own arithmetic and not confirmed in float32. `energy_kwh` (without PUE,
    `energy_how` obtained) is known where the evaluation ran inside a meter, `flops` where the model's were
    counted: None is unknown.
    """

    attack: str
    images: int = 0
    broken: int = 0
    refuted: int = 0
    seconds: float = 0.0
    forward: int = 0
    backward: int = 0
    flops: float | None = None
    energy_kwh: float | None = None
    energy_how: str | None = None
    done: bool = False
    surrogate_forward: int = 0
    surrogate_backward: int = 0

    def __add__(self, other: Spent) -> Spent:
        """Two parts together: attempts, shards, or attacks. Where one part's energy or FLOPs are unknown, so is the
        sum's."""
        parts = [part for part in (self, other) if part.seconds]
        kwh = _sum(part.energy_kwh for part in parts)
        ways = {part.energy_how for part in parts}
        mixed = "unknown" if kwh is None else "estimated"
        counts = ("images", "broken", "refuted", "seconds", *PASSES)
        return Spent(
            self.attack,
            **{name: getattr(self, name) + getattr(other, name) for name in counts},
            flops=_sum(part.flops for part in parts),
            energy_kwh=kwh,
            energy_how=mixed if len(ways) > 1 else next(iter(ways), None),
            done=self.done and other.done,
        )

    @property
    def bill(self) -> dict[str, Any]:
        """What it took, as a summary of the whole has it."""
        names = ("forward", "backward", "flops", "seconds", "energy_kwh", "energy_how")
        return {name: getattr(self, name) for name in names}

    def with_flops(self, forward: float, backward: float, surrogate: tuple[float, float] | None = None) -> Spent:
        """With FLOPs, from those of one image's pass forward and back to the image; `surrogate` has those of the
        surrogate: unknown (None), they leave those of an attack unknown that used it."""
        flops: float | None = self.forward * forward + self.backward * backward
        if self.surrogate_forward and surrogate is not None and flops is not None:
            flops += self.surrogate_forward * surrogate[0] + self.surrogate_backward * surrogate[1]
        elif self.surrogate_forward:
            flops = None
        return replace(self, flops=flops)


PASSES = ("forward", "backward", "surrogate_forward", "surrogate_backward")


def by_attack(items: Iterable[Spent]) -> list[Spent]:
    """The parts of each attack together, in the order in which the attacks first come."""
    spent: dict[str, Spent] = {}
    for item in items:
        spent[item.attack] = spent[item.attack] + item if item.attack in spent else item
    return list(spent.values())


def _sum(values: Iterable[float | None]) -> float | None:
    """None, unknown, where one of the values is or where there are none."""
    items = list(values)
    return None if None in items or not items else sum(value for value in items if value is not None)
