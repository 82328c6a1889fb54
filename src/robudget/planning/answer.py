"""What a plan says: recipes with their costs, and the answer in a sentence, with what it stands on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from robudget.columns import column
from robudget.files import fields
from robudget.formats import interval, known, number, percent
from robudget.laws.price import Price
from robudget.planning.allocation import Allocation
from robudget.planning.cost_model import Budget, Span
from robudget.prediction.predictor import Predictor


@dataclass(frozen=True)
class Measured:
    """The runs of one recipe: `run_ids`, their mean `aa_acc` in percent with the 95% interval of its test images (NaN:
    unknown), and the mean `bill` per cost column."""

    run_ids: tuple[str, ...]
    aa_acc: float
    low: float
    high: float
    bill: dict[str, float]

    def words(self) -> str:
        """`measured 59.80% [58.8, 60.8] (95%) as paper-115`."""
        ends = f" {interval(self.low, self.high)} (95%)" if known(self.low) else ""
        runs = self.run_ids[0] if len(self.run_ids) == 1 else f"the mean of {len(self.run_ids)} runs"
        return f"measured {percent(self.aa_acc, 2)}{ends} as {runs}"


@dataclass(frozen=True)
class Option:
    """One recipe: its `choices` (feature → value), predicted accuracy in percent with interval, and its cost in all
    units.

    `costs` maps the table's cost columns to whole-run totals (NaN: unknown), its mean bill where the recipe was run,
    and `cost_intervals` to the 90% intervals for a new run, from the scatter of the runs (NaN: nothing says how wide).
    `p_reach` is the probability of reaching the plan's target (NaN for a budget). `measured` are the runs of this very
    recipe; `nearest` the real runs most like it: (run_id, aa_acc, distance). `outside` names the choices beyond what
    the table has tried and `unseen` those at a level that no run has: no run supports them.
    """

    choices: dict[str, Any]
    aa_acc: float
    low: float
    high: float
    p_collapse: float
    p_reach: float
    costs: dict[str, float]
    cost_intervals: dict[str, tuple[float, float]]
    measured: Measured | None
    nearest: tuple[tuple[str, float, float], ...]
    outside: tuple[str, ...]
    unseen: tuple[str, ...] = ()

    @property
    def ran(self) -> str | None:
        """The first run of this very recipe."""
        return self.measured.run_ids[0] if self.measured else None

    @property
    def untried(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.outside, *self.unseen)))

    def name(self) -> str:
        """`wrn-34-20, synthetic data, SiLU, AT, attack steps 5, no EMA`."""
        return ", ".join(_choice(name, value) for name, value in self.choices.items() if value is not None)

    def predicted(self, level: float) -> str:
        """`predicted 59.6% [58.9, 60.4] (90%)`, with the risk of collapse where there is one to speak of."""
        risk = f", P(collapse) {self.p_collapse:.0%}" if self.p_collapse >= 0.05 else ""
        return f"predicted {percent(self.aa_acc)} {interval(self.low, self.high)} ({level:.0%}{risk})"

    def to_dict(self) -> dict[str, Any]:
        return fields(self) | {"ran": self.ran}


@dataclass(frozen=True)
class Lever:
    """Changing one choice of the best option: `gain` in points and `cost_ratio` in the plan's column (1 = free).

    `spends` says whether the choice buys compute (size, steps, epochs) or something else (data, loss, activation)."""

    feature: str
    value: Any
    gain: float
    cost_ratio: float
    p_collapse: float
    spends: bool


@dataclass(frozen=True)
class Plan:
    """`options`: first the answer, then the other recipes that fit, those with an untried choice last (by accuracy
    within a budget, by cost for a target); empty if nothing fits.

    `column` is the cost the plan counts in. Within a budget the first option is the cheapest within `margin` points of
    `most_accurate`, the one of the highest predicted accuracy; for a target it is the cheapest predicted to reach it,
    or measured to have done so. `best` is the first option, or, where none reaches the target, `most_accurate`.
    `cheapest` is the cheapest recipe that is not predicted to collapse (of all, where each is). `next_point` is the
    cheapest recipe predicted a point better than `best`, if any, and `marginal` what it costs more, in all units.

    `top_run` is the run of the highest accuracy, `lowest` the least accuracy of a run that did not collapse, and
    `reached` counts the runs at or above the target. `price` is what the law of the best runs says of the target, or of
    one more point than the best run's: what it costs by compute alone (None where the table holds no law). `allocation`
    is what more compute bought from `best` in its regime. `levers` are single changes to the best option, the most
    points first, and `instead` says in a sentence what helps more than compute.
    """

    budget: Budget | None
    target: float | None
    column: str
    options: tuple[Option, ...]
    most_accurate: Option | None
    margin: float
    best: Option | None
    cheapest: Option | None
    next_point: Option | None
    marginal: dict[str, Span]
    top_run: tuple[str, float]
    lowest: float
    reached: int
    n_runs: int
    price: Price | None
    allocation: Allocation | None
    levers: tuple[Lever, ...]
    instead: str
    n_candidates: int
    warnings: tuple[str, ...] = ()
    predictor: Predictor = field(repr=False, kw_only=True)

    def sentence(self) -> str:
        """The answer, with its interval."""
        if self.budget is not None:
            return self._within_budget(self.budget)
        return self._to_target(self.target or 0.0)

    def support(self) -> tuple[str, ...]:
        """What the answer stands on, a sentence each."""
        lines = [*self._ties(), *self._doubts(), self._law(), self._money()]
        return tuple(line for line in lines if line)

    def to_dict(self) -> dict[str, Any]:
        return {"answer": self.sentence(), "support": list(self.support())} | fields(self)

    # -- the words ----------------------------------------------------------------------------------------------------

    def _within_budget(self, budget: Budget) -> str:
        if self.best is None:
            if self.cheapest is None:
                return f"What these recipes cost in {column(self.column).phrase} is unknown: nothing is known to fit."
            return (
                f"No recipe of these choices fits {budget.text}: the cheapest that is not predicted to collapse is "
                f"{self._described(self.cheapest)}. A smaller model, fewer attack steps or fewer epochs than any run "
                f"of the table would have to be tried."
            )
        return f"For {budget.text} train {self._described(self.best)}."

    def _to_target(self, target: float) -> str:
        goal = _exact(target)
        if self.options:
            first = self.options[0]
            chance = f"; P(at least {goal}) {first.p_reach:.0%}"
            if first.aa_acc >= target:
                return f"For {goal} train {self._described(first)}{chance}."
            return (
                f"{goal} was reached by {_runs(self.reached)}, at the least cost by {self._described(first)}{chance}, "
                f"as the best of {self.n_runs} runs is partly a lucky one."
            )
        top, accuracy = self.top_run
        nearest = self.most_accurate
        closest = f"; the nearest recipe is {self._described(nearest)}" if nearest else ""
        if self.reached:
            return (
                f"{goal} was reached by {_runs(self.reached)} (the best, {top}: {percent(accuracy, 2)}), none of which "
                f"is a recipe that this plan may choose, and no other is predicted to{closest}."
            )
        return (
            f"No run reached {goal} (the best of {self.n_runs}, {top}: {percent(accuracy, 2)}), and no recipe made of "
            f"these choices is predicted to{closest}."
        )

    def _described(self, option: Option) -> str:
        level = self.predictor.level
        price = self._price(option)
        if option.measured is not None:
            return f"{option.name()}: {option.measured.words()} for {price}; another run is {option.predicted(level)}"
        text = f"{option.name()}: {option.predicted(level)} for {price}"
        levels = _and([column(name).phrase for name in option.untried])
        return f"{text}; no run has this value of {levels}, so nothing supports it" if levels else text

    def _price(self, option: Option) -> str:
        low, high = option.cost_intervals.get(self.column, (math.nan, math.nan))
        one = column(self.column)
        text = one.write(option.costs[self.column])
        if option.measured is None and known(low) and one.write(low) != one.write(high):
            text += f" [{one.write(low)} to {one.write(high)}]"
        return text + (" of electricity" if self.column == "cost_usd" else "")

    def _ties(self) -> list[str]:
        """Why the first is not the most accurate, or that it is."""
        best, top = self.best, self.most_accurate
        if self.budget is None or best is None or top is None:
            return []
        if best is top:
            return [f"No cheaper recipe is predicted within one standard error ({self.margin:.2g} points) of it."]
        factor = number(top.costs[self.column] / best.costs[self.column], 2)
        return [
            f"It is the cheapest within one standard error ({self.margin:.2g} points) of the most accurate that fits, "
            f"{top.name()}: {top.predicted(self.predictor.level)} for {self._price(top)}, {factor} times as much."
        ]

    def _doubts(self) -> list[str]:
        lines = []
        best = self.best
        if best is not None and best.measured is None and best.nearest and not best.untried:
            run, accuracy, _ = best.nearest[0]
            lines.append(f"This recipe was never run; the nearest run, {run}, has {percent(accuracy)}.")
        if best is not None and not known(best.cost_intervals[self.column][0]):
            lines.append(
                f"How far its {column(self.column).phrase} may be off is unknown: the runs never varied alone what it "
                "changes, or are no more than the cost model needs."
            )
        if self.target is not None and self.options and self.target <= self.lowest:
            lines.append(f"Every run that did not collapse reached it (the lowest: {percent(self.lowest, 2)}).")
        if self.target is not None and self.options and self.top_run[1] < self.target:
            top, accuracy = self.top_run
            lines.append(f"No run has reached it yet: the best, {top}, has {percent(accuracy, 2)}.")
        return lines

    def _law(self) -> str:
        """What the law of the best runs says, and why it and the predictor differ where they do."""
        price = self.price
        if price is None:
            return ""
        text = price.sentence(also=self.column)
        if self.target is None or self.options or not price.reachable or self.best is None:
            what = "One point more than the best run, by" if self.target is None else "By"
            return f"{what} compute alone (the law of the best runs): {text}."
        to = f"to {10**price.decades:.2g} times the costliest run's compute" if price.decades else "among these runs"
        return (
            f"The law of the best runs and the predictor differ, as they answer different questions: the law extends "
            f"the trend of the best runs {to} ({text}), while the predictor speaks of recipes made of the table's "
            f"choices and never says more than the best run's {percent(self.top_run[1])}: it gives its most accurate "
            f"recipe {self.best.p_reach:.0%} to reach the target."
        )

    def _money(self) -> str:
        best = self.best
        if best is None or "cost_usd" not in best.costs or not known(best.costs["cost_usd"]):
            return ""
        hours, rent = best.costs.get("gpu_hours", math.nan), best.costs.get("rent_usd", math.nan)
        if known(rent):
            return f"Dollars are electricity; renting the GPUs for it costs {column('rent_usd').write(rent)} more."
        if known(hours):
            taken = column("gpu_hours").write(hours)
            return (
                f"Dollars are electricity alone; rent is not in them ({taken} for this recipe: --prices with "
                f"usd_per_gpu_hour adds it)."
            )
        return "Dollars are electricity alone: no rent, no hardware."


def _exact(target: float) -> str:
    return f"{target:g}%"


def _runs(n: int) -> str:
    return "1 run" if n == 1 else f"{n} runs"


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _choice(name: str, value: object) -> str:
    choice = column(name)
    if isinstance(value, bool):
        return choice.phrase if value else f"no {choice.phrase}"
    return choice.level(value) if choice.scale == "category" else f"{choice.phrase} {choice.level(value)}"
