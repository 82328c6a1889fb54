"""Adaptive stopping: which runs of a sweep go on and which are ended early, by the validation that their logs tell.

Asynchronous successive halving (ASHA; Li et al., MLSys 2020, arXiv 1810.05934, algorithm 2): a run trains to a rung and
pauses; where a worker is free, a run goes on that is among the best 1/η of those that have reached its rung, from the
highest rung down, else one is begun. What is compared is the best robust validation accuracy so far. Ours: a rung is a
share of a recipe's own epochs; once no other run can reach a rung, its best run goes on in any case and the others that
wait there are ended. Everything follows from the runs' folders, so that several drivers decide alike. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from robudget.errors import InputError
from robudget.recipe import Recipe
from robudget.store import ENDED_EARLY, RunFolder, Store

MOST_RUNGS = 3  # the first at 1/η³ of the epochs: earlier validations tell little


@dataclass(frozen=True)
class Adaptive:
    """What ends a run early: `eta`, of so many runs one goes on at each rung (0: no halving); `collapse`: that the
    collapse watch fires (catastrophic overfitting), where the recipe has no action of its own against it."""

    eta: int = 0
    collapse: bool = False

    def __post_init__(self) -> None:
        if self.eta < 0 or self.eta == 1:
            raise InputError(f"--halving {self.eta} (allowed: 2 or more; 0 = not)")

    def __bool__(self) -> bool:
        return bool(self.eta or self.collapse)


@dataclass(frozen=True)
class Standing:
    """A run among others: its `results`, one for each rung that it has reached, in fractions; whether it `waits` at the
    last of them, and whether it is `over`: done, failed or ended early."""

    results: tuple[float, ...] = ()
    waits: bool = False
    over: bool = False


@dataclass(frozen=True)
class Place:
    """Where a run stands at its rung: the `rank`-th, from 1, of `of`, of which `go_on`."""

    rank: int
    of: int
    go_on: int


def judge(runs: Mapping[int, Standing], eta: int) -> tuple[list[int], dict[int, Place]]:
    """Waiting runs that may go on, the highest rung and the best first; and those that never will, with why. Equal
    results rank by number."""
    more = False  # may others still reach this rung?
    up: list[list[int]] = []
    never: dict[int, Place] = {}
    for rung in range(max((len(run.results) for run in runs.values()), default=0)):
        ranked = sorted(
            (i for i, run in runs.items() if len(run.results) > rung), key=lambda i: (-runs[i].results[rung], i)
        )
        more = more or any(not run.over and not run.waits and len(run.results) <= rung for run in runs.values())
        go_on = len(ranked) // eta or (0 if more else 1)
        waiting = [(at, i) for at, i in enumerate(ranked) if runs[i].waits and len(runs[i].results) == rung + 1]
        up.append([i for at, i in waiting if at < go_on])
        if not more:
            never |= {i: Place(at + 1, len(ranked), go_on) for at, i in waiting if at >= go_on}
        more = more or bool(up[-1])  # these will reach the next one
    return [i for runs_up in reversed(up) for i in runs_up], never


def rungs(recipes: Sequence[Recipe], eta: int) -> list[tuple[int, ...]]:
    """The rungs of each recipe, as epochs: η⁻³, η⁻² and η⁻¹ of its validations, or fewer where these are too few; none
    of a recipe without an adversary, which is not compared. Raises InputError where no rung is possible."""
    compared = [recipe for recipe in recipes if recipe.adversarial]
    least = min((recipe.epochs // recipe.validation.every for recipe in compared), default=1)
    count = min(MOST_RUNGS, int(math.log(max(least, 1)) / math.log(eta) + 1e-9))
    if compared and not count:
        raise InputError(
            f"--halving {eta}: a run of this sweep is validated {least} times only (allowed: {eta} times or more)"
        )
    return [
        tuple(
            recipe.validation.every * round(recipe.epochs // recipe.validation.every / eta**k)
            for k in range(count, 0, -1)
        )
        if recipe.adversarial
        else ()
        for recipe in recipes
    ]


class Halving:
    """The standings of a sweep's runs, read from the store; `to_do` are those that the sweep may start."""

    def __init__(self, rule: Adaptive, recipes: Sequence[Recipe], home: Store, to_do: Collection[int]) -> None:
        self.rule, self._recipes, self._home, self._to_do = rule, recipes, home, frozenset(to_do)
        self._rungs = rungs(recipes, rule.eta) if rule.eta else [()] * len(recipes)
        self._epochs = [0] * len(recipes)
        self._standings: dict[int, Standing] = {}
        self._go: list[int] = []
        self._judged = False
        for index in range(len(recipes)):
            self.look(index)

    def look(self, index: int) -> str | None:
        """Read how far a run is; why it is to be ended at once, None where it is not."""
        recipe, folder = self._recipes[index], self._home.folder(self._recipes[index])
        partial = folder.partial()
        validations = _validations(folder) if self._rungs[index] or partial is not None else {}
        last = self._epochs[index] = max(validations, default=0)
        results = tuple(
            max((validations[epoch] for epoch in validations if epoch <= rung), default=0.0)
            for rung in self._rungs[index]
            if rung <= last
        )
        status = partial["status"] if partial is not None else ""
        why = None
        collapsed_at = partial["training"]["collapsed_at"] if partial is not None else ()
        if collapsed_at and status == "paused" and self.collapse(index):
            first = collapsed_at[0]
            why = f"ended early at epoch {last} of {recipe.epochs}: catastrophic overfitting at epoch {first}"
        at_rung = bool(results) and self._rungs[index][len(results) - 1] == last
        waits = status == "paused" and at_rung and why is None and index in self._to_do
        self._stands(index, Standing(results, waits, folder.done or status == ENDED_EARLY))
        return why

    @property
    def undecided(self) -> bool:
        """Has a standing changed since the last judgement, or may a run go on?"""
        return bool(self.rule.eta) and (not self._judged or bool(self._go))

    def waits(self, index: int) -> bool:
        return self._standings[index].waits

    def failed(self, index: int) -> None:
        """Nothing more will come of it."""
        standing = self._standings[index]
        self._stands(index, Standing(standing.results, over=True))

    def until(self, index: int) -> int:
        """The epoch at which a run that goes on pauses next, 0 for none. One that was ended by a kill at the end of a
        rung's epoch pauses there."""
        ahead = [rung for rung in self._rungs[index] if rung >= self._epochs[index]]
        past = self._home.folder(self._recipes[index]).partial() is not None  # it has paused there
        return next((rung for rung in ahead if rung > self._epochs[index] or not past), 0)

    def collapse(self, index: int) -> bool:
        """Does a collapse end this run?"""
        recipe = self._recipes[index]
        return self.rule.collapse and recipe.adversarial and recipe.collapse.action == "warn"

    def judge(self) -> dict[int, str]:
        """Why each run that is to be ended is, where a standing has changed since the last call."""
        if self._judged or not self.rule.eta:
            return {}
        self._judged, self._go = True, []
        why: dict[int, str] = {}
        for scope in sorted({self._scope(index) for index in self._standings}):
            mine = {i: s for i, s in self._standings.items() if self._scope(i) == scope and self._rungs[i]}
            go, never = judge(mine, self.rule.eta)
            self._go += go
            for index, place in never.items():
                value = self._standings[index].results[-1]
                why[index] = (
                    f"ended early at epoch {self._epochs[index]} of {self._recipes[index].epochs}: validation "
                    f"{100 * value:.1f}% robust is rank {place.rank} of {place.of} there, and {place.go_on} go on"
                )
        return why

    def next_up(self) -> int | None:
        """A waiting run that may go on, and now does."""
        if not self._go:
            return None
        index = self._go.pop(0)
        self._standings[index] = Standing(self._standings[index].results)  # by itself it changes no judgement
        return index

    def _stands(self, index: int, standing: Standing) -> None:
        if self._standings.get(index) != standing:
            self._standings[index], self._judged = standing, False

    def _scope(self, index: int) -> tuple[str, str]:
        """Runs on other data or against another threat are not compared."""
        recipe = self._recipes[index]
        return recipe.data.name, str(recipe.threat.threat())


def _validations(folder: RunFolder) -> dict[int, float]:
    """Robust validation accuracy by epoch, as the log has it; an epoch without validation counts as 0."""
    return {entry["epoch"]: entry.get("val_robust") or 0.0 for entry in folder.events("epoch")}
