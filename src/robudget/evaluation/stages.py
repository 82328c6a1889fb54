"""The stages of an evaluation, what each will cost, and how far the whole is: progress with the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from robudget.attacks.ensemble import Member
from robudget.evaluation.verdicts import Spent

# Of the survivors of a low-precision evaluation, the nearest are attacked again in float32.
CONFIRM_SHARE, CONFIRM_LEAST = 0.1, 16
TELL_EVERY = 0.2  # seconds, at least, between two reports of progress


def confirmed(standing: int) -> int:
    """How many of so many survivors are attacked again in float32."""
    return min(max(CONFIRM_LEAST, math.ceil(standing * CONFIRM_SHARE)), standing)


@dataclass(frozen=True)
class Progress:
    """Where an evaluation is: `fraction` of its estimated work; `robust` so far, a fraction of all images."""

    attack: str
    images_done: int
    images: int
    robust: float
    fraction: float
    seconds_left: float | None


@dataclass(frozen=True)
class Stage:
    """One attack of the run; `cost`: passes of a surviving image; `precise`: in float32; `round_`: 0 the ensemble, 1
    the nearest again, 2 all again."""

    name: str
    member: Member
    cost: int
    precise: bool
    round_: int = 0

    def again(self, round_: int) -> Stage:
        """This attack in float32, as a stage of the confirmation."""
        name = f"{self.member.name}@float32" + ("-all" if round_ == 2 else "")
        return replace(self, name=name, precise=True, round_=round_)


class Pace:
    """Tells `progress`, a few times a second, how much of the estimated work is done and how long the rest will take.

    `stages` are those of the ensemble, on `images` images.
    """

    def __init__(self, stages: Sequence[Stage], images: int, progress: Callable[[Progress], None] | None) -> None:
        self.costs = {stage.member.name: stage.cost for stage in stages}
        self.low = not all(stage.precise for stage in stages)
        self.images, self.progress = images, progress
        self.began = self.told = time.monotonic()
        self.start_fraction: float | None = None

    @property
    def due(self) -> bool:
        """Is it time to `tell` again? (A stage's end may always be told.)"""
        return self.progress is not None and time.monotonic() - self.told > TELL_EVERY

    def tell(
        self,
        stage: Stage,
        later: Sequence[Stage],
        past: Sequence[Spent],
        *,
        images_done: int,
        images: int,
        part: float,
        standing: int,
    ) -> None:
        """`stage` is done for `images_done` of its `images`, to the fraction `part` of its work; `standing` of all
        images are robust so far; `later` stages are to come, `past` ones are done."""
        if self.progress is None:
            return
        self.told = time.monotonic()
        behind = sum(self.costs.get(item.attack.partition("@")[0], 0.0) * item.images for item in past if item.done)
        work = behind + stage.cost * images * part
        ahead = sum(item.cost for item in later) * (min(images, standing) if stage.round_ else standing)
        if self.low and not stage.round_:
            ahead += sum(self.costs.values()) * confirmed(standing)
        whole = behind + stage.cost * images + ahead
        fraction = work / whole if whole else 1.0
        self.start_fraction = fraction if self.start_fraction is None else self.start_fraction
        won = fraction - self.start_fraction
        left = (self.told - self.began) * (1 - fraction) / won if won > 0 else None
        self.progress(Progress(stage.name, images_done, images, standing / self.images, fraction, left))
