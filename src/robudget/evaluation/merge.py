"""Shards of one evaluation put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from robudget.errors import InputError
from robudget.evaluation.examples import Examples
from robudget.evaluation.verdicts import Finding, Spent, Verdicts

# What has to be equal for two shards to be parts of one evaluation.
SAME = ("weights", "version", "attacks", "members", "seed", "precision", "batch_size")
_COUNTS = ("images", "broken", "refuted", "seconds", "forward", "backward")


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
            if key == "weights" and all(str(p.about.get(key)).startswith("function") for p in (part, first)):
                continue  # a plain function is known by its answers to the images only, and those differ
            if part.about.get(key) != first.about.get(key):
                values = f"{first.about.get(key)!r} and {part.about.get(key)!r}"
                raise InputError(f"the shards are of different evaluations: {key} = {values}")
    frame = pd.concat([part.frame for part in parts]).sort_values("index", kind="stable").reset_index(drop=True)
    twice = frame["index"][frame["index"].duplicated()]
    if len(twice):
        raise InputError(f"{len(twice)} images are in more than one shard (row {twice.iloc[0]} among them)")
    about = {**first.about, "shards": len(parts)}
    return Verdicts(frame, first.threat, _spent(parts), _findings(parts), about, _examples(parts))


def _examples(parts: Sequence[Verdicts]) -> Examples | None:
    """Those of all parts, where all have kept theirs."""
    kept = [part.examples for part in parts if part.examples is not None]
    if len(kept) < len(parts):
        return None
    index = np.concatenate([item.index for item in kept])
    order = np.argsort(index, kind="stable")
    label, x_adv = (np.concatenate([getattr(item, name) for item in kept])[order] for name in ("label", "x_adv"))
    return Examples(index[order], label, x_adv, parts[0].threat)


def _spent(parts: Sequence[Verdicts]) -> list[Spent]:
    total: dict[str, list[Spent]] = {}
    for part in parts:
        for item in part.spent:
            total.setdefault(item.attack, []).append(item)
    return [_together(name, items) for name, items in total.items()]


def _together(name: str, items: list[Spent]) -> Spent:
    whole = Spent(name, done=True)
    for item in items:
        for key in _COUNTS:
            setattr(whole, key, getattr(whole, key) + getattr(item, key))
        if item.energy_how is not None:
            whole.add_energy(math.nan if item.energy_kwh is None else item.energy_kwh, item.energy_how)
    if any(item.energy_how is None for item in items):
        whole.energy_kwh = whole.energy_how = None
    known = [item.flops for item in items if item.flops is not None]
    whole.flops = sum(known) if len(known) == len(items) else None
    return whole


def _findings(parts: Sequence[Verdicts]) -> list[Finding]:
    """Each finding once, as the first shard that made it tells it."""
    return list({finding.name: finding for part in reversed(parts) for finding in part.findings}.values())
