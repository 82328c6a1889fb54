"""A prediction as text for a terminal: the run itself where there is one, the prediction, and what it stands on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from robudget.cli.view.console import TextTable, notes, titled
from robudget.columns import COLUMNS, MAIN_COSTS, column
from robudget.formats import fixed, percent
from robudget.prediction import PaperGBR, Prediction, Predictor
from robudget.prediction.conformal import Coverage
from robudget.prediction.repeats import RUN_LEVEL, Ran, SeedNoise
from robudget.prediction.small_runs import SmallRuns
from robudget.tables.usable import level_of


def prediction_text(name: str, prediction: Prediction, predictor: Predictor, gbr: PaperGBR | None = None) -> Group:
    """What `robudget predict` prints: the answer in a sentence, what it stands on, then, with the paper's predictor
    `gbr`, the nearest real runs, what the intervals hold, by group, and how good that one is."""
    p = prediction
    lines = _lines(name, p, predictor)
    parts: list[RenderableType] = [Text(lines[0], style="bold"), *(Text(line) for line in lines[1:])]
    parts += notes(_doubts(p, predictor))
    if gbr is None:
        return Group(*parts)
    rows = [
        {"nearest real runs": run, "robust %": fixed(accuracy), "distance": fixed(distance, 2)}
        for run, accuracy, distance in p.nearest
    ]
    parts += [Text(""), TextTable(rows, left=("nearest real runs",))]
    parts += titled(
        f"Runs inside {p.level:.0%} intervals that were made without their recipe",
        [_covered_row(c) for c in predictor.coverage],
        ("runs",),
    )
    return Group(*parts, Text(""), Text(_papers(gbr)))


def _covered_row(c: Coverage) -> dict[str, str]:
    return {
        "runs": group_name(c),
        "inside": percent(100 * c.covered, 0),
        "of more such recipes": f"{percent(100 * c.low, 0)} to {percent(100 * c.high, 0)}",
        "n": str(c.n),
        f"{c.level:.0%} as said?": c.verdict,
    }


def _alike(c: Coverage) -> str:
    """What is known of the interval among recipes like the one that is asked about."""
    inside = round(c.covered * c.n)
    text = (
        f"Of the {c.n} runs nearest to it {inside} lie in intervals that were made without their recipe, which leaves "
        f"{percent(100 * c.low, 0)} to {percent(100 * c.high, 0)} for recipes like this one"
    )
    if c.high < c.level:
        return f"{text}: this interval covers too little, take it as wider"
    return f"{text}: its {c.level:.0%} are of new recipes on average" if c.low < c.level else text


def _papers(gbr: PaperGBR) -> str:
    leads = ", ".join(f"{column(name).phrase} {share:.0%}" for name, share in gbr.importances.items())
    return (
        f"The paper's predictor (gradient boosting, 70:30, {gbr.n_test} held-out runs): R² {fixed(gbr.r2, 2)}, mean "
        f"error {gbr.mae:.1f} points; its importances: {leads}."
    )


def _lines(name: str, p: Prediction, predictor: Predictor) -> list[str]:
    predicted = f"{p.aa_acc:.1f}% robust accuracy is predicted, {p.level:.0%} interval {p.low:.1f} to {p.high:.1f}"
    risk = f"P(collapse) is {p.p_collapse:.0%}; without collapse {p.survivor:.1f}% is predicted."
    near = [f"{_alike(p.alike)}."] if p.alike else []
    if p.ran is None:
        return [f"{name}: {predicted}.", risk, *near, *stands_on(predictor)]
    return [
        f"{name}: {_ran_sentence(p.ran)}.", *_bill(p.ran), _next_seed(p.ran, predictor.seed_noise),
        f"Second to that, by the predictor fitted to all runs: {predicted}.", risk, *near,
        *stands_on(predictor),
    ]  # fmt: skip


def _ran_sentence(ran: Ran) -> str:
    n = len(ran.runs)
    if n > 1:
        shown = ", ".join(ran.runs[:4]) + (", …" if n > 4 else "")
        text = f"was run with {n} seeds ({shown}), {ran.aa_acc:.1f}% robust on average"
    else:
        text = f"was run ({ran.runs[0]}): {ran.aa_acc:.1f}% robust"
    if math.isfinite(ran.low):
        text += f", {RUN_LEVEL:.0%} interval {ran.low:.1f} to {ran.high:.1f}"
    if ran.n_collapsed:
        text += "; it collapsed" if n == 1 else f"; {ran.n_collapsed} of them collapsed"
    return text


def _bill(ran: Ran) -> list[str]:
    known = [name for name in MAIN_COSTS if math.isfinite(ran.costs.get(name, math.nan))]
    costs = ", ".join(f"{column(name).write(ran.costs[name])} ({column(name).phrase})" for name in known)
    return [f"It cost {costs}{' a run' if len(ran.runs) > 1 else ''}."] if known else []


def _next_seed(ran: Ran, noise: SeedNoise) -> str:
    text = f"Another seed of it would lie in {ran.next_low:.1f} to {ran.next_high:.1f} ({RUN_LEVEL:.0%})"
    return f"{text}: {noise.sentence()}."


def stands_on(predictor: Predictor) -> list[str]:
    """How good the predictor is on recipes that it did not see, survivors apart."""
    counts = f"{predictor.n_runs} runs of {predictor.n_recipes} recipes, {predictor.n_collapsed} of them collapsed"
    score, split = predictor.score(), predictor.one_split
    if score is None:
        return [f"It stands on {counts}."]
    lines = [
        f"It stands on {counts}. Each recipe predicted from the others: R² {fixed(score.r2, 2)}, mean error "
        f"{score.mae:.1f} points; {split.text}, alone, gives R² {fixed(split.r2, 2)}, {split.mae:.1f} points."
    ]
    if predictor.n_collapsed:
        lines.append(
            f"Among the runs that did not collapse: R² {fixed(score.r2_survivors, 2)}, mean error "
            f"{score.mae_survivors:.1f} points."
        )
    return lines


def quality(predictor: Predictor) -> list[str]:
    """How well the predictor does on recipes that it did not see, at random, by group and by interval."""
    scores = []
    for score in predictor.scores:
        if score.model == predictor.model:
            what = "at random" if score.design == "random" else "each " + column(score.design[3:]).phrase
            scores.append(f"{what} R² {fixed(score.r2, 2)}, MAE {score.mae:.1f}")
    covered = "; ".join(f"{group_name(c)} {c.covered:.0%} of {c.n}" for c in predictor.coverage)
    return [
        f"Default predictor ({predictor.model}), recipes left out {'; '.join(scores)}",
        *stands_on(predictor)[1:],
        f"{predictor.one_split.text.capitalize()}, alone: R² {fixed(predictor.one_split.r2, 2)}, MAE "
        f"{predictor.one_split.mae:.1f}",
        f"Its {predictor.level:.0%} intervals, made without the recipe, hold {covered}",
    ]


def small_runs_table(runs: SmallRuns) -> list[RenderableType]:
    """How often cheaper runs rank two choices as the costliest scale does, by their compute."""
    rows = [
        {
            "compute": f"{one.share:.0%}",
            "ranked alike": percent(100 * one.decision_accuracy, 0),
            "95% interval": f"{percent(100 * one.low, 0)} to {percent(100 * one.high, 0)}",
            "pairs": str(one.n_pairs),
            "signal ÷ noise": fixed(one.snr, 0),
            "runs": str(one.n_runs),
            "collapsed": f"{one.collapsed:.0%}",
        }
        for one in runs.levels
    ]
    title = (
        f"Small runs as judges: pairs of {', '.join(column(n).phrase for n in runs.choices)} ranked as with "
        f"{runs.target_text()} (pairs without collapse)"
    )
    noise = f"Noise is {runs.noise.sd:.2g} points between seeds" + (", assumed" if runs.noise.borrowed else "")
    return [*titled(title, rows, ("compute",)), Text(noise)] if rows else []


def _doubts(p: Prediction, predictor: Predictor) -> list[str]:
    out = []
    if p.outside:
        out.append(f"outside the fitted runs in {_phrases(p.outside)}: no run supports the interval")
    between = [name for name in p.unseen if name not in p.outside]
    if between:
        out.append(f"no run of the table has this value of {_phrases(between)}: no run supports the interval")
    for name in p.unseen:
        score = predictor.score(f"by {name}")
        if score is not None:
            out.append(
                f"where a whole value of {column(name).phrase} is left out, its runs are predicted with R² "
                f"{fixed(score.r2, 2)} and a mean error of {score.mae:.1f} points"
            )
    needed = [w for w in predictor.warnings if "too few" in w]
    return out + needed


def _phrases(names: Sequence[str]) -> str:
    return ", ".join(column(name).phrase for name in names)


def group_name(coverage: Coverage) -> str:
    """`with synthetic data`, `loss TRADES`, from the label of a group."""
    name, found, level = coverage.group.partition(" = ")
    if not found:
        return coverage.group
    one = column(name)
    if name in COLUMNS and one.scale == "flag":
        return f"{one.phrase}: {'yes' if level == 'True' else 'no'}"
    return f"{one.phrase} {one.level(level_of(level))}"
