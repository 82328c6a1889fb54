"""Where a sweep is: what is to be done, what is in work and how far, what is done and what failed. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from robudget.forecast.passes import weight
from robudget.recipe import Recipe
from robudget.store import Store


@dataclass
class Status:
    """A run in work: `phase` and `note` as `runner.Progress` has them, `fraction` of it done."""

    phase: str = "starting"
    fraction: float = 0.0
    note: str = ""


@dataclass
class SweepState:
    """Runs are named by their index into `recipes`. `to_do` were not done at the start; of these, `running` are in
    work, `finished`, `failed` and `ended_early` hold the summary, the error or the reason of the others;
    `ended_before` that of the runs that were ended early before the start, and stay so."""

    recipes: Sequence[Recipe]
    weights: Sequence[float]
    to_do: list[int]
    running: dict[int, Status] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    ended_early: dict[int, str] = field(default_factory=dict)
    ended_before: dict[int, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    retries: int = 0  # attempts that were made again
    ended: str | None = None  # why no further runs are started although some are left
    left_out: list[int] = field(default_factory=list)  # not done and, by a limit, not to be done now
    elsewhere: dict[int, str] = field(default_factory=dict)  # waited for, since the process that is named works on it

    @classmethod
    def begin(cls, recipes: Sequence[Recipe], store: Store, *, adaptive: bool = False) -> SweepState:
        """Looks in the store for what is done; longest first. What was ended early is to do unless `adaptive`."""
        weights = [weight(recipe) for recipe in recipes]
        to_do = [i for i, recipe in enumerate(recipes) if not store.folder(recipe).has(recipe)]
        before: dict[int, str] = {}
        if adaptive:
            reasons = ((i, store.folder(recipes[i]).ended_early) for i in to_do)
            before = {i: why for i, why in reasons if why is not None}
            to_do = [i for i in to_do if i not in before]
        return cls(recipes, weights, sorted(to_do, key=lambda i: -weights[i]), ended_before=before)

    @property
    def done(self) -> int:
        """Runs that need no more work, those done before the start included."""
        begun = len(self.to_do) + len(self.left_out) + len(self.ended_before)
        return len(self.recipes) - begun + len(self.finished)

    @property
    def early(self) -> int:
        """Runs that were ended early, now or before the start."""
        return len(self.ended_early) + len(self.ended_before)

    def finish(self, index: int, summary: str) -> None:
        self.running.pop(index, None)
        self.finished[index] = summary

    def end_early(self, index: int, why: str) -> None:
        self.running.pop(index, None)
        self.ended_early[index] = why

    def fail(self, index: int, error: str) -> None:
        self.running.pop(index, None)
        self.failed[index] = error

    @property
    def seconds_left(self) -> float | None:
        """By the share of the work done since the start; None until 2% of it is."""
        total = sum(self.weights[i] for i in self.to_do)
        ended = sum(self.weights[i] for i in (*self.finished, *self.failed, *self.ended_early))
        done = ended + sum(self.weights[i] * status.fraction for i, status in self.running.items())
        if done <= 0.02 * total:
            return None
        return (time.monotonic() - self.started) * (total - done) / done
