"""Where the next unit of compute should go: what size, steps, length, data and loss buy from a recipe, at what price.

What a choice buys depends on others, so the runs that are compared are those in the recipe's regime: at the recipe's
level of every choice on which the gain of size, steps or length depends (an interaction that stands after Holm's
correction), and at step counts at which no run collapsed, if the recipe's own is one of them. Among these, gains are
means of matched pairs (prediction/effects.py), and prices are those of the same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robudget.columns import column
from robudget.errors import InputError
from robudget.files import fields
from robudget.formats import fixed, interval, known, number
from robudget.prediction.effects import Effect, Effects, Level, effects
from robudget.tables.usable import collapsed_rows, level_of, numbers_of, standard_rows

SAME_COST = 1.02  # a ratio of costs below which a change costs nothing more


@dataclass(frozen=True)
class Move:
    """A change of one choice, as `effect` found it in the regime. `from_here` says whether it begins at the recipe's
    own level, `spends` whether it changes what training computes; `per_doubling` are the points that each doubling of
    the cost buys along it (NaN where it costs no more)."""

    effect: Effect
    from_here: bool
    spends: bool
    per_doubling: float

    def words(self) -> str:
        """`model wrn-28-10 → wrn-70-16 +2.3 points [2.1, 2.4] at 7.4 times the cost`."""
        e = self.effect
        along = f" (always with {e.came_with()})" if e.came_with() else ""
        cost = ""
        if known(e.cost_ratio):
            more = max(e.cost_ratio, 1 / e.cost_ratio) > SAME_COST
            cost = f" at {number(e.cost_ratio, 2)} times the cost" if more else " at the same cost"
        doubt = "" if e.excludes_zero else " (no gain is not excluded)"
        return f"{e.change()}{along} {fixed(e.gain, signed=True)} points {interval(e.low, e.high)}{doubt}{cost}"


@dataclass(frozen=True)
class Allocation:
    """What each change bought among the `n_runs` runs of the regime, `moves` ordered by points per doubling of the cost
    in `column`. `held` are the levels that these runs share with the recipe, and `steps` the step counts they have, at
    none of which a run collapsed (empty: all)."""

    column: str
    held: tuple[Level, ...]
    steps: tuple[int, ...]
    moves: tuple[Move, ...]
    n_runs: int
    found: Effects

    @property
    def regime(self) -> str:
        """`synthetic data yes and attack steps 5, 7, 10 (at which no run collapsed)`."""
        parts = [f"{column(name).phrase} {column(name).level(value)}" for name, value in self.held]
        if self.steps:
            steps = ", ".join(str(k) for k in self.steps)
            parts.append(f"{column('steps').phrase} {steps} (at which no run collapsed)")
        return " and ".join(parts) or "all choices"

    def sentences(self) -> tuple[str, ...]:
        """What spends compute, by points per doubling of the cost: the next step from the recipe's own level of each
        choice, and each choice's whole range."""
        lines = []
        next_steps = self._one_each([m for m in self.moves if m.from_here], -1)
        if next_steps:
            lines.append(f"The next steps from here, with {self.regime}: {'; '.join(m.words() for m in next_steps)}.")
        whole = self._one_each(self.moves, 1)
        if whole:
            lines.append(f"Over the whole range of these {self.n_runs} runs: {'; '.join(m.words() for m in whole)}.")
        return tuple(lines)

    def _one_each(self, moves: Sequence[Move], sign: int) -> list[Move]:
        """Of every choice that spends compute the widest change (sign 1) or the narrowest (−1)."""
        out: dict[str, Move] = {}
        for move in (m for m in moves if m.spends):
            held = out.get(move.effect.feature)
            if held is None or sign * _width(move.effect) > sign * _width(held.effect):
                out[move.effect.feature] = move
        return [m for m in moves if m in out.values()]

    def to_dict(self) -> dict[str, Any]:
        return {"sentences": list(self.sentences()), "regime": self.regime} | {
            name: value for name, value in fields(self).items() if name != "found"
        }


def allocation(table: pd.DataFrame, choices: Mapping[str, Any], cost: str) -> Allocation | None:
    """What each change buys from the recipe with these `choices` (feature → value; others are ignored), and its price
    in the column `cost`; None where the table has too few runs to pair."""
    runs = table[~standard_rows(table)]
    try:
        everywhere = effects(runs, resamples=0)
    except InputError:
        return None
    steps = _without_collapse(runs, choices)
    if steps:
        runs = runs[np.isin(numbers_of(runs, "steps"), steps)]
    held = _held(everywhere, choices)
    inside = runs
    for name, value in held:
        inside = inside[_equal(inside[name], value)]
    try:
        found = effects(inside, resamples=0, cost=cost)
        outside = effects(runs, resamples=0, cost=cost) if held else found
    except InputError:
        return None
    moves = [_move(e, choices) for e in found.effects]
    # What is held has no pairs within its own regime: its gain is that at the recipe's levels of what it depends on.
    for name, _ in held:
        for e in outside.of(name):
            at_recipe = [p for r in e.regimes if r.stands for p in r.effects if _has(choices, p.where)]
            moves.append(_move(min(at_recipe, key=lambda p: p.n_pairs, default=e), choices))
    moves.sort(key=lambda m: -m.per_doubling if known(m.per_doubling) else -math.inf)
    return Allocation(cost, held, steps, tuple(moves), len(inside), found)


def _move(e: Effect, choices: Mapping[str, Any]) -> Move:
    doublings = math.log2(e.cost_ratio) if known(e.cost_ratio) else math.nan
    per_doubling = e.gain / doublings if known(doublings) and doublings > math.log2(SAME_COST) else math.nan
    own = [(e.feature, e.before), *((name, before) for name, before, _ in e.along)]
    from_here = any(name in choices and choices[name] == before for name, before in own)
    spends = column(e.feature).spends or any(column(name).spends for name in e.aliases)
    return Move(e, from_here, spends, per_doubling)


def _width(e: Effect) -> float:
    return math.log(e.after / e.before) if _positive(e.before) and _positive(e.after) else 0.0


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _has(choices: Mapping[str, Any], where: tuple[Level, ...]) -> bool:
    return all(choices.get(name) == value for name, value in where)


def _held(everywhere: Effects, choices: Mapping[str, Any]) -> tuple[Level, ...]:
    """The recipe's level of every choice on which the gain of one that spends compute depends."""
    names = []
    for i in everywhere.interactions:
        for one, other in ((i.first, i.second), (i.second, i.first)):
            if i.stands and column(one).spends and not column(other).spends and other in choices:
                names.append(other)
    return tuple((name, choices[name]) for name in dict.fromkeys(names))


def _without_collapse(runs: pd.DataFrame, choices: Mapping[str, Any]) -> tuple[int, ...]:
    if "steps" not in runs or "steps" not in choices:
        return ()
    steps, collapsed = numbers_of(runs, "steps"), collapsed_rows(runs)
    safe = tuple(int(k) for k in np.unique(steps[~np.isnan(steps)]) if not collapsed[steps == k].any())
    return safe if choices["steps"] in safe and collapsed.any() else ()


def _equal(values: pd.Series[Any], level: Any) -> Any:
    return np.array([not pd.isna(v) and level_of(v) == level for v in values], dtype=bool)
