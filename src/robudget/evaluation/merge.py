"""Shards of one evaluation put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import pandas as pd

from robudget.errors import InputError
from robudget.evaluation.verdicts import Finding, Spent, Verdicts

# What has to be equal for two shards to be parts of one evaluation.
SAME = ("weights", "version", "attacks", "seed", "precision", "batch_size")
_SUMS = tuple(f.name for f in fields(Spent) if f.name not in ("attack", "energy_kwh", "done"))


def merge(parts: Sequence[Verdicts]) -> Verdicts:
    """One `Verdicts` over the images of all `parts`, in the order of their rows; times and passes are added up.

    Raises InputError for no parts, for parts of different evaluations, and for images that are in two of them.
    """
    if not parts:
        raise InputError("nothing to merge")
    first = parts[0]
    for part in parts[1:]:
        if part.threat != first.threat:
            raise InputError(f"the shards are of different threats: {first.threat} and {part.threat}")
        for key in SAME:
            if part.about.get(key) != first.about.get(key):
                values = f"{first.about.get(key)!r} and {part.about.get(key)!r}"
                raise InputError(f"the shards are of different evaluations: {key} = {values}")
    frame = pd.concat([part.frame for part in parts]).sort_values("index", kind="stable").reset_index(drop=True)
    twice = frame["index"][frame["index"].duplicated()]
    if len(twice):
        raise InputError(f"{len(twice)} images are in more than one shard (row {twice.iloc[0]} among them)")
    return Verdicts(frame, first.threat, _spent(parts), _findings(parts), {**first.about, "shards": len(parts)})


def _spent(parts: Sequence[Verdicts]) -> list[Spent]:
    total: dict[str, Spent] = {}
    for part in parts:
        for item in part.spent:
            mine = total.setdefault(item.attack, Spent(item.attack, done=True))
            for name in _SUMS:
                setattr(mine, name, getattr(mine, name) + getattr(item, name))
    return list(total.values())


def _findings(parts: Sequence[Verdicts]) -> list[Finding]:
    """Each finding once, as the first shard that made it tells it."""
    return list({finding.name: finding for part in reversed(parts) for finding in part.findings}.values())
