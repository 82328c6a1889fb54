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


@dataclass(frozen=True, slots=True)
class Spend:
    """Wall seconds of a run, its energy, hours × GPUs, and the FLOP (exact) of what it stands on; NaN where it is not
    known."""

    seconds: float = 0.0
    kwh: float = 0.0
    gpu_hours: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Spend) -> Spend:
        return Spend(
            self.seconds + other.seconds,
            self.kwh + other.kwh,
            self.gpu_hours + other.gpu_hours,
            self.flops + other.flops,
        )

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
        self._recipes, self._weights, self._home = recipes, weights, home
        self.done: dict[int, Spend] = {}
        self.begun: dict[int, Spend] = {}  # not done
        self._of_done: Spend | None = Spend()  # the sum of `done`; None: to be added up again
        self._measured: list[tuple[float, Spend, int]] = []  # finished runs: work, what it took, bytes of memory
        mine = {home.folder(recipe).path for recipe in recipes}
        others = (folder for folder in home.folders() if folder.path not in mine) if home.root.is_dir() else ()
        self._read_others(others)
        for index in range(len(recipes)):
            self.look(index)

    def look(self, index: int) -> None:
        """Read what a run has spent."""
        folder = self._home.folder(self._recipes[index])
        try:
            if folder.done:
                self._enter(index, folder.record())
            elif (folder.path / "log.jsonl").exists():
                self.begun[index] = Spend.so_far(folder)
        except (RobudgetError, OSError, KeyError, TypeError):
            return  # a record of another version says nothing here

    def _enter(self, index: int, record: Mapping[str, Any]) -> None:
        spend = Spend.of_record(record)
        self.begun.pop(index, None)
        if index in self.done:  # evaluated again
            self._of_done = None
        else:
            insort(self._measured, (self._weights[index], spend, _memory(record)), key=_WORK)
            self._of_done = None if self._of_done is None else self._of_done + spend
        self.done[index] = spend

    def _near(self, index: int) -> list[tuple[float, Spend, int]]:
        """The finished runs nearest in work; none where there are none."""
        work = self._weights[index]
        at = bisect(self._measured, work, key=_WORK)
        around = self._measured[max(0, at - NEIGHBOURS) : at + NEIGHBOURS]
        return sorted(around, key=lambda item: abs(math.log(item[0] / work)))[:NEIGHBOURS]

    def forecast(self, index: int) -> Spend | None:
        """What a whole run will take, by the finished runs nearest in work, in proportion to it; None where there are
        none."""
        if not (near := self._near(index)):
            return None
        total = sum((spend for _, spend, _ in near), Spend())
        return total.times(self._weights[index] / sum(work for work, *_ in near))

    def memory(self, index: int) -> int:
        """Bytes of the host that a run's process will take: the most of the runs nearest in work; 0 where nothing is
        known."""
        return max((memory for *_, memory in self._near(index)), default=0)

    def spent(self) -> Spend:
        if self._of_done is None:
            self._of_done = sum(self.done.values(), Spend())
        return sum(self.begun.values(), self._of_done)

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

    def _read_others(self, folders: Iterable[RunFolder]) -> None:
        for folder in folders:
            if len(self._measured) == OTHERS:
                return
            try:
                if folder.done:
                    record = folder.record()
                    entry = (weight(folder.recipe), Spend.of_record(record), _memory(record))
                    insort(self._measured, entry, key=_WORK)
            except (RobudgetError, OSError, KeyError, TypeError):
                continue


def _memory(record: Mapping[str, Any]) -> int:
    """Bytes at its highest of the process that made a run; 0 in records of earlier versions."""
    return int(record["environment"].get("memory_bytes", 0))
