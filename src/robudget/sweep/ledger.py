"""What a sweep has spent and what its runs will cost: learnt from the finished runs of the store. Imports no torch."""

from __future__ import annotations

import math
import re
from bisect import bisect, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from operator import itemgetter
from typing import Any, Self

from robudget.errors import InputError, RobudgetError, unknown
from robudget.forecast.passes import weight
from robudget.meter.prices import Prices, bill
from robudget.recipe import Recipe
from robudget.store import RunFolder, Store

_WORK = itemgetter(0)
NEIGHBOURS = 3  # finished runs nearest in work, whose cost per work a forecast takes
OTHERS = 300  # finished runs of other studies in the store, at most, that are read for forecasts
UNITS = {"usd": "usd", "$": "usd", "kwh": "kwh", "gpu-h": "gpu_hours", "gpuh": "gpu_hours", "gpu-hours": "gpu_hours"}


@dataclass(frozen=True)
class Spend:
    """Wall seconds of a run, its energy, hours × GPUs, and the FLOP (exact) of what it stands on; NaN where it is not
    known."""

    seconds: float = 0.0
    kwh: float = 0.0
    gpu_hours: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Spend) -> Spend:
        return Spend(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> Spend:
        return Spend(*(factor * mine for mine in astuple(self)))

    def usd(self, prices: Prices) -> float:
        """Electricity, and rent of GPUs where the prices have one."""
        cost = bill(self.kwh, 3600 * self.gpu_hours, prices, gpus=1)
        return cost.cost_usd + (cost.rent_usd or 0.0)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Of a run's run.json: training and evaluation, killed attempts included."""
        stages, where = (record["training"], record["evaluation"]), record["environment"]
        seconds = sum(stage["seconds"] for stage in stages)
        kwh = [stage["energy"]["kwh"] for stage in stages]
        gpus = where.get("processes", 1) if where.get("device") == "cuda" else 0
        flops = sum(stage.get("flops_exact", math.nan) for stage in stages)
        return cls(seconds, math.nan if None in kwh else sum(kwh), gpus * seconds / 3600, flops)

    @classmethod
    def so_far(cls, folder: RunFolder) -> Self:
        """Of a run that has begun: what its log has of the attempts that ended. Its FLOP are known where it has paused
        or was ended early."""
        windows = [e for e in folder.events("energy") if e.get("window") in ("training", "evaluation")]
        seconds = sum(event.get("seconds") or 0.0 for event in windows)
        kwh = sum(math.nan if (kwh := event.get("kwh")) is None else kwh for event in windows)
        partial = folder.partial()
        flops = partial["training"]["flops_exact"] if partial is not None else math.nan
        return cls(seconds, kwh, folder.gpus * seconds / 3600, flops)


@dataclass(frozen=True)
class Budget:
    """`amount` in `unit` ("usd", "kwh" or "gpu_hours"); `text` as it was written."""

    text: str
    unit: str
    amount: float
    prices: Prices = field(default_factory=Prices)

    @classmethod
    def parse(cls, text: str, prices: Prices | None = None) -> Self:
        """`10usd`, `$10`, `50gpu-h`, `5kWh`. Raises InputError, with the nearest unit."""
        match = re.fullmatch(r"\s*(\$?)\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z$][A-Za-z$-]*)?\s*", text)
        try:
            amount = float(match[2]) if match is not None else 0.0
        except ValueError:
            amount = 0.0
        if match is None or amount <= 0 or not (match[1] or match[3]):
            raise InputError(f"budget = {text!r} (allowed: a number above 0 and a unit, e.g. 10usd, 50gpu-h, 5kWh)")
        if (unit := (match[3] or match[1]).lower()) not in UNITS:
            raise unknown("unit of a sweep's budget", match[3], UNITS)
        return cls(text.strip(), UNITS[unit], amount, prices or Prices())

    def of(self, spend: Spend) -> float:
        return spend.usd(self.prices) if self.unit == "usd" else float(getattr(spend, self.unit))


class Ledger:
    """Spend by run of a sweep, and forecasts of the runs that are not done."""

    def __init__(self, recipes: Sequence[Recipe], weights: Sequence[float], home: Store) -> None:
        self._weights = weights
        self._folders = [home.folder(recipe) for recipe in recipes]
        self.done: dict[int, Spend] = {}
        self.begun: dict[int, Spend] = {}  # not done
        for index in range(len(recipes)):
            self.look(index)
        mine = {folder.path for folder in self._folders}
        others = (folder for folder in home.folders() if folder.path not in mine) if home.root.is_dir() else ()
        measured = [*self._of_others(others), *((weights[i], spend) for i, spend in self.done.items())]
        self._measured = sorted(measured, key=_WORK)  # (work, what it took)

    def look(self, index: int) -> None:
        """Read what a run has spent."""
        folder = self._folders[index]
        try:
            if folder.done:
                self.done[index] = Spend.of_record(folder.record())
                self.begun.pop(index, None)
            elif (folder.path / "log.jsonl").exists():
                self.begun[index] = Spend.so_far(folder)
        except (RobudgetError, OSError, KeyError, TypeError):
            return  # a record of another version says nothing here

    def finished(self, index: int) -> None:
        self.look(index)
        if index in self.done:
            insort(self._measured, (self._weights[index], self.done[index]), key=_WORK)

    def forecast(self, index: int) -> Spend | None:
        """What a whole run will take, by the finished runs nearest in work, in proportion to it; None where there are
        none."""
        work = self._weights[index]
        at = bisect(self._measured, work, key=_WORK)
        around = self._measured[max(0, at - NEIGHBOURS) : at + NEIGHBOURS]
        near = sorted(around, key=lambda item: abs(math.log(item[0] / work)))[:NEIGHBOURS]
        if not near:
            return None
        total = sum((spend for _, spend in near), Spend())
        return total.times(work / sum(each for each, _ in near))

    def spent(self) -> Spend:
        return sum((*self.done.values(), *self.begun.values()), Spend())

    def left(self, indices: Iterable[int]) -> Spend | None:
        """What these runs will still take; None where nothing is known."""
        total = Spend()
        for index in indices:
            if (spend := self.forecast(index)) is None:
                return None
            total += spend
        return total

    def saved(self, indices: Iterable[int]) -> Spend | None:
        """What runs that were ended early would still have taken; None where nothing is known."""
        total = Spend()
        for index in indices:
            self.look(index)
            if (whole := self.forecast(index)) is None:
                return None
            total += whole + self.begun.get(index, Spend()).times(-1)
        return total

    def fits(self, budget: Budget, index: int, running: Iterable[int]) -> bool:
        """Would the run, started beside those in work, stay within the budget? As long as no run of the store is
        finished nothing can be forecast, and one runs at a time."""
        beside, next_run = [self.forecast(i) for i in running], self.forecast(index)
        spent = budget.of(self.spent())
        if next_run is None:
            return not beside and not spent >= budget.amount
        in_work = sum((budget.of(spend) for spend in beside if spend is not None), 0.0)
        before = budget.of(self.begun.get(index, Spend()))
        return not spent + in_work + max(0.0, budget.of(next_run) - before) > budget.amount

    @staticmethod
    def _of_others(folders: Iterable[RunFolder]) -> list[tuple[float, Spend]]:
        measured: list[tuple[float, Spend]] = []
        for folder in folders:
            if len(measured) == OTHERS:
                break
            try:
                if folder.done:
                    measured.append((weight(folder.recipe), Spend.of_record(folder.record())))
            except (RobudgetError, OSError, KeyError, TypeError):
                continue
        return measured
