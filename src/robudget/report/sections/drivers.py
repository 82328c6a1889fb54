"""What drives robustness: matched pairs, the predictor and what it relies on, and figures 1b, 1c, 2 and partial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robudget.analysis import Analysis
from robudget.columns import COSTS, column
from robudget.formats import fixed, interval, known, number, percent, word
from robudget.planning.allocation import allocation
from robudget.prediction.effects import Effect, Effects
from robudget.prediction.paper_predictor import PaperGBR
from robudget.prediction.predictor import Predictor
from robudget.report import style
from robudget.report.figure_files import Drawing
from robudget.report.sections import judges
from robudget.report.style import BLUE, COLUMN, INK, MANY, MUTED, ORANGE, PAGE, PAPER, VERMILLION
from robudget.report.table import fill
from robudget.report.words import Cell, Section, Table, capital, change, points
from robudget.tables.usable import level_of, numbers_of

MOST_EFFECTS, MOST_INTERACTIONS = 24, 8  # shown
MOST_PANELS = 5  # choices of a partial dependence


def section(rows: pd.DataFrame, analysis: Analysis | None) -> Section:
    title, lead = "What drives robustness", ""
    effects, predictor = (analysis.effects, analysis.predictor) if analysis is not None else (None, None)
    tables: list[Table] = []
    if effects is None and predictor is None:
        lead = "There are too few runs, or too few choices that vary, to say what each choice changes."
    if effects is not None:
        lead = effects_lead(effects)
        tables += [
            effects_table(effects),
            *allocation_tables(analysis),
            spreads_table(effects),
            interactions_table(effects),
        ]
    if predictor is not None:
        tables += [importances_table(predictor), scores_table(predictor)]
    if analysis is not None and analysis.small_runs is not None:
        tables.append(judges.table(analysis.small_runs))
    return Section("drivers", "What matters", title, lead, [("1b", "1c", "2", "partial"), *tables])


def drawings(rows: pd.DataFrame, analysis: Analysis | None) -> Iterator[Drawing]:
    gbr, predictor = (analysis.gbr, analysis.predictor) if analysis is not None else (None, None)
    if analysis is not None and gbr is not None:
        yield Drawing("1b", "Predicted before training", lambda: prediction_figure(gbr, fill(analysis.table)))
    if predictor is not None:
        yield Drawing("1c", "What the predictor relies on", lambda: importance_figure(predictor))
    yield Drawing("2", "The effect of each choice", lambda: effects_figure(rows))
    if predictor is not None:
        yield Drawing("partial", "What each choice does to the prediction", lambda: partial_figure(predictor))


# -- tables -----------------------------------------------------------------------------------------------------------


def effects_lead(effects: Effects) -> str:
    """The largest effect with what came along, and the effects of either sign by the level of another choice."""
    sentences = []
    for e in effects.effects[:1]:
        along = f" (always with {e.came_with()})" if e.came_with() else ""
        sentences.append(
            f"The largest matched-pair effect is {e.change()}{along}: {fixed(e.gain, signed=True)} points "
            f"{interval(e.low, e.high)} over {e.n_pairs} pairs of runs that differ in nothing else."
        )
    for e in effects.effects:
        for regime in e.regimes:
            if regime.by in e.reversed_by:
                parts = [f"{fixed(p.gain, signed=True)} {interval(p.low, p.high)} at {p.condition()}"
                         for p in regime.effects]  # fmt: skip
                sentences.append(f"{capital(e.change())} has either sign: {', '.join(parts)}.")
    return " ".join(sentences)


def effects_table(effects: Effects) -> Table:
    def row(choice: str, e: Effect, stands: bool, came_with: str) -> Sequence[Cell]:
        return (
            choice,
            (fixed(e.gain, 2, signed=True), interval(e.low, e.high, 2)),
            "yes" if stands else "no",
            fixed(e.sd, 2),
            percent(100 * e.better, 0),
            str(e.n_pairs),
            points(100 * e.collapse),
            came_with,
        )

    rows = []
    for e in effects.effects[:MOST_EFFECTS]:
        rows.append(row(e.change(), e, e.stands, e.came_with() or "–"))
        rows += [row(f"– at {part.condition()}", part, r.stands, "") for r in e.regimes for part in r.effects]
    return Table(
        "What each choice changes",
        f"Pairs of runs that differ in one choice only; {effects.level:.0%} t intervals over pairs; below an effect, "
        "the same at each level of every choice that it interacts with",
        ["choice", "#gain (points)", "after Holm", "#sd of gains", "#pairs that gain", "#pairs", "#P(collapse)",
         "always came with"],
        rows,
        note="Gains are over pairs in which neither run collapsed; the change of P(collapse) is over all pairs. Where "
        f"levels are given, read them and not their mean. {capital(effects.comparisons())}; of a row "
        "at one level, it says whether the interaction does.",
    )  # fmt: skip


def allocation_tables(analysis: Analysis | None) -> list[Table]:
    """Where the next unit of compute should go from the best run; nothing where its regime has too few pairs."""
    if analysis is None or not len(analysis.table):
        return []
    best = analysis.table.iloc[int(np.nanargmax(numbers_of(analysis.table, "aa_acc")))]
    spent = analysis.x if analysis.x in COSTS else "train_flops_exact"
    choices = {str(name): level_of(value) for name, value in best.items() if not pd.isna(value)}
    found = allocation(analysis.table, choices, spent) if spent in analysis.table else None
    if found is None:
        return []

    def row(choice: str, e: Effect, per_doubling: str, here: str) -> Sequence[Cell]:
        cost = number(e.cost_ratio) if known(e.cost_ratio) else "–"
        return (
            choice,
            (fixed(e.gain, 2, signed=True), interval(e.low, e.high, 2)),
            cost,
            per_doubling,
            str(e.n_pairs),
            here,
        )

    rows = []
    for m in found.moves:
        per_doubling = fixed(m.per_doubling, 2, signed=True) if known(m.per_doubling) else "–"
        rows.append(row(m.effect.change(), m.effect, per_doubling, "yes" if m.from_here else ""))
        standing = [part for r in m.effect.regimes if r.stands for part in r.effects]
        rows += [row(f"– at {part.condition()}", part, "–", "") for part in standing]
    return [Table(
        "Where the next unit of compute should go",
        f"Matched pairs with {found.regime}; most points per doubling of {column(spent).phrase} first",
        ["change", "#points", "#times the cost", "#points per doubling", "#pairs", "from the best run"],
        rows,
        note=" ".join(found.sentences()).replace("from here", "from the best run"),
    )]  # fmt: skip


def spreads_table(effects: Effects) -> Table:
    rows = [
        (
            change(s.feature, s.before, s.after),
            fixed(s.sd_before, 2),
            fixed(s.sd_after, 2),
            (fixed(s.ratio, 2), interval(s.low, s.high, 2)),
            f"{s.n_before}, {s.n_after}",
            "left out" if s.survivors else "included",
        )
        for s in effects.spreads
    ]
    return Table(
        "Does a choice shrink the spread of the others?",
        "Standard deviation of AutoAttack accuracy over all other choices, in points",
        ["choice", "#sd before", "#sd after", "#ratio", "#runs", "collapsed runs"],
        rows,
        folded=True,
    )


def interactions_table(effects: Effects) -> Table:
    rows = [
        (
            change(i.first, i.before, i.after),
            change(i.second, i.lower, i.upper),
            (fixed(i.gain, 2, signed=True), interval(i.low, i.high, 2)),
            "yes" if i.stands else "no",
            str(i.n),
        )
        for i in effects.interactions[:MOST_INTERACTIONS]
    ]
    return Table(
        "Interactions",
        "By how many points the gain of the first change is larger after the second one than before it",
        ["first", "second", "#extra gain (points)", "after Holm", "#quadruples"],
        rows,
        folded=True,
    )


def importances_table(predictor: Predictor) -> Table:
    rows = [
        (
            column(i.feature).phrase,
            percent(100 * i.by_model),
            (fixed(i.by_permutation, 2), interval(i.low, i.high, 2)),
            _alias_names(i.aliases),
        )
        for i in predictor.importances
    ]
    return Table(
        "What the predictor relies on",
        f"{predictor.n_runs} runs, {predictor.n_collapsed} of them collapsed",
        ["choice", "#share in the trees", "#error added when shuffled (points)", "varies only with"],
        rows,
        note=" ".join(f"{capital(w)}." for w in predictor.warnings),
        folded=True,
    )


def scores_table(predictor: Predictor) -> Table:
    rows = [
        (
            _design(s.design),
            s.model + (" (chosen)" if s.model == predictor.model else ""),
            fixed(s.r2, 2),
            fixed(s.mae, 2),
            fixed(s.rmse, 2),
            fixed(s.collapse_auc, 3),
            str(s.n),
            fixed(s.r2_survivors, 2),
            fixed(s.mae_survivors, 2),
        )
        for s in predictor.scores
    ]
    return Table(
        "How good is the predictor?",
        "Recipes predicted by models not fitted on them: at random, and with every level of a choice left out in turn. "
        f"{capital(predictor.one_split.text)}, alone, gives R² {fixed(predictor.one_split.r2, 2)}",
        ["left out", "model", "#R²", "#mean error (points)", "#root mean square", "#AUC of P(collapse)", "#runs",
         "#R² without collapse", "#mean error without collapse"],
        rows,
        folded=True,
    )  # fmt: skip


def _design(name: str) -> str:
    """What a split left out, from its name: `random` or `by steps`."""
    return f"each {column(name.removeprefix('by ')).phrase}" if name.startswith("by ") else "at random"


def _alias_names(aliases: Sequence[str]) -> str:
    return ", ".join(column(a).phrase for a in aliases) or "–"


# -- figures ----------------------------------------------------------------------------------------------------------


def prediction_figure(fit: PaperGBR, table: pd.DataFrame) -> tuple[Figure, str]:
    """Figure 1b: the paper's gradient boosting on the runs it did not see."""
    figure, ax = style.new(COLUMN, 2.75)
    collapsed = table["collapsed"].to_numpy(dtype=bool)[fit.rows]
    ends = float(min(fit.truth.min(), fit.predicted.min())), float(max(fit.truth.max(), fit.predicted.max()))
    room = 0.05 * (ends[1] - ends[0] or 1.0)
    span = np.array([ends[0] - room, ends[1] + room])
    ax.plot(span, span, color=MUTED, lw=0.7, ls=(0, (3, 2)), zorder=0)
    for mask, colour, marker in ((~collapsed, BLUE, "o"), (collapsed, VERMILLION, "X")):
        ax.scatter(
            fit.truth[mask], fit.predicted[mask], s=13, marker=marker, c=colour, linewidths=0.3, edgecolors=PAPER,
            alpha=0.85,
        )  # fmt: skip
    ax.set(xlim=span, ylim=span, aspect="equal")
    ax.set_xlabel("AutoAttack accuracy (%), measured")
    ax.set_ylabel("predicted (%)")
    ax.set_yticks([t for t in ax.get_xticks() if span[0] <= t <= span[1]])
    ax.set(xlim=span, ylim=span)
    style.grid(ax, "both")
    keys = [
        [style.key("o", BLUE, "held-out run", 3.8)],
        [Line2D([], [], color=MUTED, lw=0.7, ls=(0, (3, 2)), label="exact")],
    ]
    if collapsed.any():
        keys.insert(1, [style.key("X", VERMILLION, "collapsed", 3.8)])
    style.legend_above(figure, keys)
    caption = (
        f"Gradient boosting as in the paper (50 estimators, depth 5), fitted on {fit.n_train} runs and shown on the "
        f"{fit.n_test} held out (70:30 split, seed {fit.seed}): R² = {fixed(fit.r2, 2)}, mean absolute "
        f"error {fixed(fit.mae, 2)} points. It is one split of many."
    )
    return figure, caption


def importance_figure(predictor: Predictor) -> tuple[Figure, str]:
    """Figure 1c: each feature's importance, by the trees themselves (share) and by permutation (points, interval)."""
    items = sorted(predictor.importances, key=lambda i: i.by_model)
    figure, (left, right) = style.new(COLUMN, 0.75 + 0.2 * len(items), 1, 2, sharey=True)
    at = np.arange(len(items))
    left.barh(at, [i.by_model for i in items], height=0.62, color=BLUE)
    middle = np.array([i.by_permutation for i in items])
    ends = np.array([[i.low, i.high] for i in items]).T
    bars = np.clip(np.vstack([middle - ends[0], ends[1] - middle]), 0, None)
    right.errorbar(middle, at, xerr=bars, fmt="D", ms=3.4, color=ORANGE, ecolor=ORANGE, elinewidth=0.9)
    right.axvline(0, color=MUTED, lw=0.6)
    left.set_yticks(at, [column(i.feature).phrase for i in items])
    left.set_xlabel("share in the trees")
    right.set_xlabel("error added when\nshuffled (points)")
    for ax in (left, right):
        ax.tick_params(axis="y", length=0)
        style.grid(ax, "x")
    left.set_xlim(left=0)
    caption = (
        f"{predictor.n_runs} runs. Left: the trees' own importances, which sum to 1. Right: mean absolute error added "
        f"on runs not fitted on when a choice is shuffled among them, with its 95% interval (bootstrap over runs)."
    )
    aliases = [
        f"{column(i.feature).phrase} cannot be separated from {' and '.join(column(a).phrase for a in i.aliases)}"
        for i in items
        if i.aliases
    ]
    return figure, caption + (f" In this table {'; '.join(aliases)}." if aliases else "")


def partial_figure(predictor: Predictor) -> tuple[Figure, str]:
    """Partial dependence: the mean prediction and P(collapse) with one choice set to each of its levels, for the most
    important choices."""
    names = [i.feature for i in predictor.importances[:MOST_PANELS]]
    figure, axes = style.new(PAGE, 2.1, 1, len(names), sharey=True, squeeze=False)
    top = 0.0
    for ax, name in zip(axes[0], names, strict=True):
        partial = predictor.partial(name)
        at, risk = np.arange(len(partial.values)), 100 * np.array(partial.p_collapse)
        top = max(top, float(risk.max()))
        ax.plot(at, partial.aa_acc, color=BLUE, marker="o", ms=3.4, lw=1.1)
        ax.plot(at, risk, color=VERMILLION, marker="X", ms=3.6, lw=1.0, ls=(0, (4, 2)))
        ticks = [column(name).level(value) for value in partial.values]
        crowded = sum(map(len, ticks)) > 18
        ax.set_xticks(at, ticks, rotation=40 if crowded else 0, ha="right" if crowded else "center")
        ax.set_xlim(-0.4, len(at) - 0.6)
        ax.set_title(column(name).phrase)
        style.grid(ax)
    axes[0][0].set_ylabel("percent")
    axes[0][0].set_ylim(-3, 103 if top > 70 else None)
    style.legend_above(
        figure,
        [
            [Line2D([], [], color=BLUE, marker="o", ms=3.4, lw=1.1, label="predicted AutoAttack accuracy (%)")],
            [Line2D([], [], color=VERMILLION, marker="X", ms=3.6, lw=1, ls=(0, (4, 2)), label="P(collapse) (%)")],
        ],
    )
    caption = (
        f"Partial dependence of the default predictor ({predictor.model}, fitted on {predictor.n_runs} runs, "
        f"{predictor.n_collapsed} of them collapsed): mean over the table with one choice set to each level; the "
        f"{len(names)} choices that matter most by permutation. It averages over all combinations, unlikely ones too."
    )
    return figure, caption


def effects_figure(table: pd.DataFrame) -> tuple[Figure, str] | None:
    """Figure 2: accuracy split by loss × EMA (panels), model size (along x) and synthetic data (colour). None without
    an adversarially trained run."""
    rows = table[(table["loss"] != "standard") & table["aa_acc"].notna()]
    if rows.empty:
        return None
    rows = rows.assign(size=model_sizes(rows), syn=rows["synthetic"].map(word))
    facets = [c for c in ("loss", "ema") if rows[c].map(word).nunique() > 1] or ["loss"]
    groups = list(rows.groupby([rows[c].map(word) for c in facets], sort=True))
    order = list(rows.groupby("size")["parameters"].median().sort_values(kind="stable").index)
    figure, axes = style.new(PAGE, 2.5, 1, len(groups), sharey=True, squeeze=False)
    coded = style.encode("synthetic", rows["synthetic"])
    for ax, (key, group) in zip(axes[0], groups, strict=True):
        _strips(ax, group, order, coded, raster=len(rows) > MANY)
        ax.set_title(_facet(facets, [str(part) for part in key]))
        crowded = len(order) * max(map(len, order)) >= 110 / len(groups)
        ax.set_xticks(range(len(order)), order, rotation=35 if crowded else 0)
        ax.set_xlim(-0.6, len(order) - 0.4)
        style.grid(ax)
    axes[0][0].set_ylabel(column("aa_acc").axis)
    style.accuracy_axis(axes[0][0])
    wide = rows["model"].str.startswith("wrn-").all()
    figure.supxlabel(f"{'WideResNet (depth-width)' if wide else 'model'}, by parameters", fontsize=7)
    names = {"yes": "with synthetic data", "no": "real data only"}
    handles = [[style.key(marker, colour, names.get(name, name))] for name, (colour, marker) in coded.items()]
    handles.append([Line2D([], [], color=INK, lw=1.4, label="median of 3 or more, collapsed left out")])
    if rows["collapsed"].any():
        handles.append([style.key("x", MUTED, "collapsed")])
    style.legend_above(figure, handles)
    caption = (
        f"{len(rows)} adversarially trained runs split by {', '.join(column(c).phrase for c in facets)}, model size "
        f"and synthetic data; each point is a run, horizontal position within a group has no meaning; "
        f"{int(rows['collapsed'].sum())} collapsed runs are crosses."
    )
    return figure, caption


def _strips(
    ax: Axes, group: pd.DataFrame, order: list[str], coded: dict[str, tuple[str, str]], *, raster: bool
) -> None:
    """One column of points for each model size and each value of `synthetic`, side by side."""
    shift = {name: (i - (len(coded) - 1) / 2) * 0.4 for i, name in enumerate(coded)}
    for key, cell in group.groupby(["size", "syn"]):
        model_size, syn = (str(part) for part in key)
        colour, marker = coded[syn]
        centre = order.index(model_size) + shift[syn]
        spread = np.linspace(-0.13, 0.13, len(cell)) if len(cell) > 1 else np.zeros(1)
        collapsed = cell["collapsed"].to_numpy(dtype=bool)
        ys = cell["aa_acc"].to_numpy()
        for mask, shape, size, alpha, width in ((collapsed, "x", 8, 0.6, 0.8), (~collapsed, marker, 9, 0.75, 0)):
            ax.scatter(
                centre + spread[mask], ys[mask], s=size, marker=shape, c=colour, alpha=alpha, linewidths=width,
                rasterized=raster,
            )  # fmt: skip
        if (~collapsed).sum() >= 3:  # a median of one or two runs only hides them
            ax.hlines(np.median(ys[~collapsed]), centre - 0.18, centre + 0.18, color=INK, lw=1.4, zorder=4)


def _facet(names: Sequence[str], values: Sequence[str]) -> str:
    """The heading of a panel: `TRADES, no EMA`."""
    parts = []
    for name, value in zip(names, values, strict=True):
        if name == "loss":
            parts.append(column(name).level(value))
        else:
            parts.append({"yes": "", "no": "no "}.get(value, value + " ") + column(name).phrase)
    return ", ".join(parts)


def model_sizes(rows: pd.DataFrame) -> pd.Series:
    """The name of each run's model as short as the table allows, with the stem's width where that varies."""
    names = rows["model"].map(word)
    if names.str.startswith("wrn-").all():
        names = names.str.removeprefix("wrn-")
    if rows.groupby("model")["base"].nunique().max() > 1:
        names = names + " b" + rows["base"].map(word)
    return names
