"""How well the laws do what they say: python bench/laws.py WHAT [--repeats 200] [--resamples 500]

coverage   intervals against known truth, per form and per way in which recipes fall short of it
effects    intervals of matched pairs, 3 to 100 of them, and of effects by regime, against planted ones
costs      intervals of what a recipe that was not run would cost
frontier   the frontier without bins (and quantile regression), 20 to 1,000 runs at 4 to 100 levels of compute
merged     the frontier of 1,000 to 4,000 runs, those that lie alike merged, beside that of all, each for itself
next       the runs that `plan --next` chooses, beside random and cheapest-first ones for as much money
seeds      coverage of 90% intervals for recipes not in the table, where each in it has 1, 2 or 4 seeds
predictor  20 random 70:30 splits of the paper's runs, every choice of model made inside the training part
speed      2,000 resamples, a whole fit of the paper's runs, and of 100,000 made-up ones
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from robudget.analysis import analyse
from robudget.laws import fit_frontier, fit_law, frontier_posterior
from robudget.laws.fit import auto_bins
from robudget.laws.forms import BEND_WIDTH_LN, FORMS
from robudget.laws.least_squares import r_squared
from robudget.meter.conventions import exact_factor
from robudget.planning.answer import Measured, Option
from robudget.planning.cost_model import CostModel
from robudget.planning.next_runs import next_runs
from robudget.prediction import Predictor, effects
from robudget.prediction.paper_predictor import PaperGBR
from robudget.prediction.regressors import MODELS
from robudget.tables import read_table

PAPER = Path(__file__).resolve().parents[2] / "shared" / "data" / "paper_runs.csv"
X_REF = 1e19
# Natural parameters of the truth, with x in units of X_REF, and what a target of 60% costs by it.
TRUTH: dict[str, dict[str, float]] = {
    "power": {"C": 57, "alpha": 0.03},
    "saturating": {"E": 62, "A": 3, "alpha": 0.4},
    "shifted": {"E": 62, "A": 4, "alpha": 0.8, "x0": 0.25},
    "m4": {"E": 62, "A": 0.02, "alpha": 0.5, "gamma": 1.2},
    "broken": {"C": 58.5, "alpha": 0.06, "alpha2": 0.01, "xb": 0.6},
}
# How far a recipe lies below the truth, in points, and how noisy its evaluation is.
SHORT = {
    # every shortfall is possible, small ones are the likeliest
    "exponential": lambda rng, n: (rng.exponential(4, n), 0.2),
    # half of the recipes lack something worth ten points
    "bimodal": lambda rng, n: (np.where(rng.random(n) < 0.5, 0, 10) + rng.exponential(0.7, n), 0.2),
    # a few recipes in a hundred are as good as can be, most are far from it
    "sparse": lambda rng, n: (
        np.where(rng.random(n) < 0.15, abs(rng.normal(0, 0.3, n)), rng.exponential(6, n)),
        0.2,
    ),
    # recipes are equally good and their evaluation on 10,000 images is all the scatter there is
    "noise": lambda rng, n: (np.where(rng.random(n) < 0.3, 0, 8), 0.5),
}


def true_accuracy(form: str, x: np.ndarray) -> np.ndarray:
    """The truth at x FLOPs, in percent; for M4 solved by bisection."""
    p, v = TRUTH[form], np.asarray(x, dtype=np.float64) / X_REF
    if form == "power":
        return p["C"] * v ** p["alpha"]
    if form == "saturating":
        return p["E"] - p["A"] * v ** -p["alpha"]
    if form == "shifted":
        return p["E"] - p["A"] * (v + p["x0"]) ** -p["alpha"]
    if form == "broken":
        bend = BEND_WIDTH_LN * np.logaddexp(0, np.log(v / p["xb"]) / BEND_WIDTH_LN)
        return p["C"] * v ** p["alpha"] * np.exp((p["alpha2"] - p["alpha"]) * bend)
    low, high = np.zeros_like(v), np.full_like(v, p["E"])
    for _ in range(80):
        y = (low + high) / 2
        short = (p["E"] - y) / y ** p["gamma"] > p["A"] * v ** -p["alpha"]
        low, high = np.where(short, y, low), np.where(short, high, y)
    return (low + high) / 2


def true_cost(form: str, target: float) -> float:
    """The x at which the truth reaches the target; inf where it never does."""
    grid = np.geomspace(1e10, 1e40, 400_001)
    above = true_accuracy(form, grid) >= target
    return float(grid[above.argmax()]) if above.any() else float("inf")


def table(form: str, seed: int, short: str = "sparse", n: int = 320) -> pd.DataFrame:
    """Runs whose best recipes follow a law that is known, over two and a half decades of compute."""
    rng = np.random.default_rng(seed)
    x = 10 ** rng.uniform(17.5, 20, n)
    below, noise = SHORT[short](rng, n)
    accuracy = np.clip(true_accuracy(form, x) - below + rng.normal(0, noise, n), 0, 100)
    return pd.DataFrame(
        {
            "train_flops_exact": x,
            "aa_acc": accuracy,
            "clean_acc": 88.0,
            "loss": "at",
            "collapsed": False,
            "n_eval": 2400 / noise**2,  # at 60%, so many images have that noise
        }
    )


def covered(form: str, seed: int, short: str, resamples: int, level: float = 0.95, n: int = 320) -> dict[str, bool]:
    """For one table: which true numbers lie in their intervals. Predictions are at the end of the data,
    costs half a decade beyond it."""
    law = fit_law(table(form, seed, short, n), form=form, resamples=resamples, level=level)
    truth = TRUTH[form]
    out = {}
    for name in ("alpha", "alpha2"):
        if name in truth:
            low, high = law.intervals[name]
            out[name] = bool(low <= truth[name] <= high)
    if "E" in truth:
        low, high = law.ceiling_interval
        out["ceiling"] = bool(low <= truth["E"] <= high)
    target = float(true_accuracy(form, np.array([10**20.3]))[0])
    reach = law.cost_at(target)
    out["cost at target"] = bool(reach.low <= true_cost(form, target) <= reach.high)
    low, high = (float(v[0]) for v in law.band(np.array([1e20])))
    out["prediction"] = bool(low <= float(true_accuracy(form, np.array([1e20]))[0]) <= high)
    return out


def coverage(repeats: int, resamples: int, only: list[str], shorts: list[str], n: int) -> None:
    print(
        f"coverage of nominal 95% intervals, {repeats} tables of {n} runs each ({auto_bins(n)} bins), "
        f"{resamples} resamples"
    )
    for form in only or TRUTH:
        for short in shorts or SHORT:
            hits = pd.DataFrame([covered(form, seed, short, resamples, n=n) for seed in range(repeats)])
            shares = ", ".join(f"{name} {share:.3f}" for name, share in hits.mean().items())
            print(f"  {form:11} {short:12} {shares}", flush=True)


# What a run's accuracy has of its own, in points, and what a pair's effect has beyond the planted mean of 1.
PAIR_NOISE = {
    "normal": lambda rng, n: (rng.normal(0, 1, n), 0.0),
    "heavy tails": lambda rng, n: (rng.standard_t(3, n), 0.0),
    "inefficiency": lambda rng, n: (-rng.exponential(1, n), 0.0),
    "sparse": lambda rng, n: (-np.where(rng.random(n) < 0.2, 6.0, 0.2) * rng.random(n), 0.0),
    "effect varies": lambda rng, n: (rng.normal(0, 0.3, n), rng.normal(0, 1, n)),
    "effect fails in 1 of 5": lambda rng, n: (rng.normal(0, 0.3, n), np.where(rng.random(n) < 0.2, -2.4, 0.6)),
}


def matched(pairs: int, noise: str, seed: int) -> pd.DataFrame:
    """`pairs` pairs of runs that differ in EMA, worth 1 point, and ten runs without a partner."""
    rng = np.random.default_rng(seed)
    each = np.arange(pairs + 10)
    frame = pd.DataFrame({"ema": False, "batch_size": 64 * (each + 1), "loss": "at", "clean_acc": 80.0})
    frame = pd.concat([frame, frame.iloc[:pairs].assign(ema=True)], ignore_index=True)
    own, extra = PAIR_NOISE[noise](rng, len(frame))
    return frame.assign(aa_acc=50 + 0.02 * frame.batch_size / 64 + (1 + extra) * frame.ema + own)


def factorial(seed: int, interaction: float) -> pd.DataFrame:
    """All 96 combinations of five choices. EMA is worth 1 point, and `interaction` more with synthetic data."""
    rng = np.random.default_rng(seed)
    levels = {"loss": ["at", "trades"], "steps": [2, 5, 10], "ema": [False, True], "synthetic": [False, True],
              "activation": ["relu", "silu"], "epochs": [100, 400]}  # fmt: skip
    frame = pd.DataFrame(list(product(*levels.values())), columns=list(levels)).assign(clean_acc=80.0)
    mean = 45 + 0.3 * frame.steps + frame.ema * (1 + interaction * frame.synthetic) + 4 * frame.synthetic
    return frame.assign(aa_acc=mean + rng.normal(0, 1, len(frame)))


def effect_intervals(repeats: int) -> None:
    print(
        f"nominal 95% t intervals of matched pairs: share of {repeats} tables in which the planted effect lies inside"
    )
    for noise in PAIR_NOISE:
        shares = []
        for pairs in (3, 4, 6, 10, 20, 50, 100):
            hits = 0
            for seed in range(repeats):
                (one,) = effects(matched(pairs, noise, seed), ["ema", "batch_size"], resamples=20).of("ema")
                hits += one.low <= 1 <= one.high
            shares.append(f"{pairs}: {hits / repeats:.3f}")
        print(f"  {noise:22} {', '.join(shares)}", flush=True)
    for interaction in (0.0, 1.0, 2.0, -3.0):
        found = [effects(factorial(seed, interaction), resamples=20) for seed in range(repeats // 4)]
        emas = [table.of("ema")[0] for table in found]
        split = [part for e in emas for r in e.regimes if r.by == "synthetic" for part in r.effects]
        inside = [e.low <= 1 + interaction * e.where[0][1] <= e.high for e in split]
        planted = {"ema", "synthetic"}
        others = [[i for i in table.interactions if {i.first, i.second} != planted] for table in found]
        false = [i.excludes_zero for table in others for i in table]
        stands = [any(i.stands for i in table) for table in others]
        print(
            f"  EMA {interaction:+g} with synthetic data, {len(found)} factorial tables: given by level in "
            f"{len(split) / 2 / len(found):.3f}, level intervals then cover {np.mean(inside):.3f}; other interactions "
            f"exclude 0 in {np.mean(false):.3f}, some stands after Holm in {np.mean(stands):.3f}",
            flush=True,
        )


def metered(rng: np.random.Generator, n: int) -> pd.DataFrame:
    """`n` runs of 4 models, 2 losses, 5 step counts and 2 activations, whose energy scatters by 15%."""
    levels = product([1e6, 4e6, 2e7, 1e8], ["at", "trades"], [1, 2, 5, 7, 10], ["relu", "silu"])
    runs = pd.DataFrame(list(levels) * 4, columns=["parameters", "loss", "steps", "activation"]).assign(images_seen=1e6)
    runs = runs.iloc[rng.permutation(len(runs))[:n]].reset_index(drop=True)
    guess = runs.parameters * np.array([exact_factor(*e) for e in zip(runs.loss, runs.steps, strict=True)])
    guess *= np.where(runs.activation == "silu", 1.2, 1.0) * (runs.parameters / 1e6) ** -0.1
    return runs.assign(train_energy_kwh=1e-15 * guess * np.exp(rng.normal(0, 0.15, n)))


def costs(repeats: int) -> None:
    print(f"nominal 90% intervals of the cost of new runs, {repeats} tables a row")
    for n in (6, 10, 14, 20, 40, 80, 320):
        hits = told = 0
        for seed in range(repeats):
            rng = np.random.default_rng(seed)
            model, new = CostModel.fit(metered(rng, n), "train_energy_kwh"), metered(rng, 40)
            assert model is not None
            spread = model.spread(new, 0.9)
            known = ~np.isnan(spread)
            off = np.abs(np.log(model.predict(new) / new["train_energy_kwh"].to_numpy()))
            hits, told = hits + int((off <= spread)[known].sum()), told + int(known.sum())
        share = f"{hits / told:.3f}" if told else "none"
        print(f"  {n:3} runs: covered {share}, an interval for {told / 40 / repeats:.2f} of the recipes", flush=True)


# Inefficiencies in points: four kinds as the issue names them, and three whose density at the frontier is 0 or small.
INEFFICIENCY = {
    "half-normal": lambda rng, n: abs(rng.normal(0, 5, n)),
    "exponential": lambda rng, n: rng.exponential(4, n),
    "clusters": lambda rng, n: np.where(rng.random(n) < 0.5, 0, 10) + rng.exponential(0.7, n),
    "uniform": lambda rng, n: rng.uniform(0, 15, n),
    "gamma 2": lambda rng, n: rng.gamma(2, 2, n),
    "gamma 3": lambda rng, n: rng.gamma(3, 1.5, n),
    "normal": lambda rng, n: abs(rng.normal(5, 2.5, n)),
}
SIZES = ((20, 4), (60, 8), (320, 19), (1_000, 100))  # runs, levels of x
BEYOND_DECADES = 0.5  # where the price is asked for
QUANTILE = 0.9


def frontier_table(kind: str, runs: int, levels: int, seed: int) -> pd.DataFrame:
    """Runs whose frontier is the power law of TRUTH; evaluated on 10,000 images."""
    rng = np.random.default_rng(seed)
    x = np.geomspace(10**17.5, 1e20, levels)[rng.integers(levels, size=runs)]
    accuracy = true_accuracy("power", x) - INEFFICIENCY[kind](rng, runs) + rng.normal(0, 0.5, runs)
    return pd.DataFrame(
        {"train_flops_exact": x, "aa_acc": accuracy.clip(0, 100), "clean_acc": 88.0, "loss": "at", "collapsed": False,
         "n_eval": 10_000}
    )  # fmt: skip


def frontier_covered(
    kind: str, runs: int, levels: int, seed: int, level: float = 0.95, beside: bool = False
) -> dict[str, float]:
    """For one table: whether the true exponent, frontier at the costliest run and price beyond it lie in their
    intervals, whether the band has no upper end, and widths; the same for α by quantile regression `beside` it."""
    frame = frontier_table(kind, runs, levels, seed)
    law = fit_frontier(frame, level=level, test=False)
    top = law.x_range[1]
    (low,), (high,) = (law.band(np.array([top]))[i] for i in (0, 1))
    cost = top * 10**BEYOND_DECADES
    ends = law.interval(law.costs(float(true_accuracy("power", np.array([cost]))[0])))[::2]
    least = law.x_range[0] if law.open else ends[0]  # as `price`
    alpha = TRUTH["power"]["alpha"]
    out = {
        "α": law.alpha_interval[0] <= alpha <= law.alpha_interval[1],
        "band at the top": low <= float(true_accuracy("power", np.array([top]))[0]) <= high,
        "price": least <= cost * (1 + 1e-9) and cost <= ends[1] * (1 + 1e-9),
        "open": law.open,
        "width of α": float(np.subtract(*law.alpha_interval[::-1])),
        "width of a closed band": np.nan if law.open else high - low,
    }
    if beside:
        lower, upper = quantile_regression(np.log(frame.train_flops_exact), np.log(frame.aa_acc.clip(1)), seed)
        out |= {"α by quantile regression": lower <= alpha <= upper, "its width": upper - lower}
    return out


def quantile_regression(u: np.ndarray, v: np.ndarray, seed: int, resamples: int = 200) -> tuple[float, float]:
    """The slope's 95% interval of the QUANTILE of v (n,) over u (n,), percentiles of bootstrap tables; by iterated
    weighted least squares, all tables at once."""
    u, v = (np.asarray(values, dtype=np.float64) - np.mean(values) for values in (u, v))
    drawn = np.random.default_rng(seed).multinomial(len(u), np.full(len(u), 1 / len(u)), resamples)
    first, slope, floor = np.full(resamples, np.quantile(v, QUANTILE)), np.zeros(resamples), 0.05
    for _ in range(60):
        residual = v - first[:, None] - slope[:, None] * u
        weight = drawn * np.where(residual > 0, QUANTILE, 1 - QUANTILE) / np.maximum(abs(residual), floor)
        s, su, suu, sv, suv = ((weight * z).sum(axis=1) for z in (1, u, u * u, v, u * v))
        slope = (s * suv - su * sv) / (s * suu - su**2 + 1e-12)
        first, floor = (sv - slope * su) / s, max(0.8 * floor, 1e-4)
    low, high = np.quantile(slope, [0.025, 0.975])
    return float(low), float(high)


def frontier(repeats: int, kinds: list[str], most_runs: int, fewest_runs: int, beside: bool) -> None:
    print(f"coverage of nominal 95% intervals, {repeats} tables each; quantile regression at {QUANTILE}")
    for runs, levels in SIZES:
        if not fewest_runs <= runs <= most_runs:
            continue
        for kind in kinds or INEFFICIENCY:
            hits = [frontier_covered(kind, runs, levels, seed, beside=beside) for seed in range(repeats)]
            rows = pd.DataFrame(hits).astype(float)
            shares = ", ".join(f"{name} {rows[name].mean():.3f}" for name in rows if "width" not in name)
            widths = ", ".join(f"{name} {rows[name].median():.4f}" for name in rows if "width" in name)
            print(f"  {runs:5} runs {levels:3} levels {kind:11} {shares}; median {widths}", flush=True)


def merged(repeats: int, kinds: list[str]) -> None:
    """Differences are in widths of the interval of all runs; CPU seconds of the posteriors alone."""
    print(f"the frontier of merged runs beside that of all, {repeats} tables each: median (largest) difference")
    everything = frontier_posterior.MOST_RUNS
    os.environ["ROBUDGET_REMEMBER"] = "no"
    for runs, kind in product((1_000, 4_000), kinds or INEFFICIENCY):
        off: dict[str, list[float]] = {}
        for seed in range(repeats):
            frame, laws = frontier_table(kind, runs, 100, seed), []
            for most in (10**9, everything):
                frontier_posterior.MOST_RUNS = most
                begun = time.process_time()
                laws.append(fit_frontier(frame, test=False))
                off.setdefault(f"seconds, {'merged' if most == everything else 'all'}", []).append(
                    time.process_time() - begun
                )
            top = np.array([laws[0].x_range[1]])
            ends = [(*law.alpha_interval, law.alpha) for law in laws]
            levels = [np.array(law.interval(law.values(top)))[[0, 2, 1], 0] for law in laws]
            for name, (whole, less) in {"α": ends, "the level at the top": levels}.items():
                wide = whole[1] - whole[0]
                off.setdefault(f"{name}, value", []).append(abs(less[2] - whole[2]) / wide)
                off.setdefault(f"{name}, width", []).append(abs((less[1] - less[0]) / wide - 1))
        words = ", ".join(f"{name} {np.median(values):.3f} ({max(values):.3f})" for name, values in off.items())
        print(f"  {runs:5} runs {kind:11} {words}", flush=True)


def recipes() -> pd.DataFrame:
    """96 recipes with what they cost, for `study`."""
    levels = product([1e6, 4e6, 2e7, 1e8], [2, 5, 10], ["at", "trades"], ["relu", "silu"], [False, True])
    frame = pd.DataFrame(list(levels), columns=["parameters", "steps", "loss", "activation", "ema"])
    passes = np.array([exact_factor(*e) for e in zip(frame["loss"], frame["steps"], strict=True)])
    frame = frame.assign(train_flops_exact=1e8 * frame["parameters"] * passes, n_eval=10_000, clean_acc=85.0)
    return frame.assign(cost_usd=1e-17 * frame["train_flops_exact"])


def study(rows: pd.DataFrame, own: pd.Series, rng: np.random.Generator) -> pd.DataFrame:
    """Runs of some of the `recipes`: 45·x^0.02, 2 points for TRADES, 1 for SiLU, what the recipe has of its `own` and
    the noise of 10,000 test images."""
    x = rows["train_flops_exact"] / 1e17
    mean = 45 * x**0.02 + 2.0 * (rows["loss"] == "trades") + 1.0 * (rows["activation"] == "silu") + own[rows.index]
    noisy = mean + rng.normal(0, 0.5, len(rows))
    return rows.assign(aa_acc=noisy, run_id=[f"r{i}" for i in rows.index])


def following(strategy: str, table: pd.DataFrame, question: str, money: float, rng: np.random.Generator) -> list[int]:
    """The recipes that a strategy runs next for at most so much money."""
    every = recipes()
    if strategy == "design":
        ran = table["run_id"].value_counts()
        options = [
            Option(row, 50, 49, 51, 0.0, np.nan, {c: row[c] for c in ("train_flops_exact", "cost_usd")}, {},
                   Measured(("r",) * int(ran[f"r{i}"]), 50, 49, 51, {}) if f"r{i}" in ran else None, (), ())
            for i, row in enumerate(every.to_dict("records"))
        ]  # fmt: skip
        found = next_runs(table, options, every, "cost_usd", 6, question=question)
        return [options.index(run.option) for run in found.runs]
    if strategy == "random":
        order = list(rng.permutation(every.index))
    else:
        fresh = [f"r{i}" not in set(table["run_id"]) for i in every.index]
        order = list(every[fresh].sort_values("cost_usd", kind="stable").index)
    out: list[int] = []
    for i in order:
        if every["cost_usd"][i] <= money:
            out.append(int(i))
            money -= every["cost_usd"][i]
    return out


def next_ones(repeats: int) -> None:
    print(
        f"half widths after runs for the same money (the design's 6 runs), 30 of 96 recipes run first; {repeats} tables"
    )
    every = recipes()
    for question in ("exponent", "loss"):
        rows: list[dict[str, float]] = []
        for seed in range(repeats):
            rng = np.random.default_rng(seed)
            own = pd.Series(rng.normal(0, 0.7, len(every)))
            table = study(every.iloc[np.sort(rng.choice(len(every), 30, replace=False))], own, rng)
            chosen = following("design", table, question, np.inf, rng)
            money = float(every["cost_usd"][chosen].sum())
            row = {}
            for strategy in ("before", "design", "random", "cheapest"):
                more = [] if strategy == "before" else chosen
                if strategy in ("random", "cheapest"):
                    more = following(strategy, table, question, money, rng)
                runs = pd.concat([table, study(every.iloc[more], own, rng)]) if more else table
                if question == "loss":
                    pairs = effects(runs, resamples=0).of("loss")  # none: fewer than three pairs
                    row[strategy] = (pairs[0].high - pairs[0].low) / 2 if pairs else np.nan
                else:
                    low, high = fit_frontier(runs.reset_index(drop=True), "train_flops_exact").alpha_interval
                    row[strategy] = (high - low) / 2
                    slope = np.polyfit(np.log(runs["train_flops_exact"]), np.log(runs["aa_acc"]), 1, cov=True)
                    row[f"{strategy}, regression"] = float(np.sqrt(slope[1][0, 0])) * 2
                row[f"{strategy}, runs"] = len(more)
            rows.append(row)
        kept = pd.DataFrame(rows).dropna()
        means, error = kept.mean(), kept.std() / np.sqrt(len(kept))
        print(f"  {question}: " + ", ".join(f"{k} {v:.4g} ± {error[k]:.2g}" for k, v in means.items()), flush=True)


def seeds_table(recipes: int, seeds: int, draw: int, effect: float = 3.0, noise: float = 0.3) -> pd.DataFrame:
    """Distinct recipes with an accuracy of their own that no choice explains (standard deviation `effect`), each
    trained with so many seeds (`noise`). The first `recipes` are known; 50 more, of one run each, are new."""
    rng = np.random.default_rng(draw)
    grid = list(product((1e7, 3e7, 1e8, 3e8), (2, 5, 7, 10), (False, True), ("at", "trades"), (False, True)))
    rows = []
    for i, j in enumerate(rng.permutation(len(grid))[: recipes + 50]):
        parameters, steps, synthetic, loss, ema = grid[j]
        centre = 50 + rng.normal(0, effect)
        for seed in range(seeds if i < recipes else 1):
            rows.append(
                {
                    "parameters": parameters, "steps": steps, "synthetic": synthetic, "loss": loss, "ema": ema,
                    "seed": seed, "aa_acc": centre + rng.normal(0, noise), "clean_acc": 85.0, "collapsed": False,
                    "new": i >= recipes,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def seeds(repeats: int, recipes: int = 25) -> None:
    print(f"90% intervals for new recipes: {repeats} tables of {recipes} recipes, 50 new recipes each")
    for count in (1, 2, 4):
        inside, widths, r2, noise = [], [], [], []
        for draw in range(repeats):
            frame = seeds_table(recipes, count, draw)
            model = Predictor.fit(frame[~frame.new], groups=())
            new = frame[frame.new]
            for p, truth in zip(model.predict(new.drop(columns="aa_acc")), new.aa_acc, strict=True):
                inside.append(p.low <= truth <= p.high)
                widths.append(p.high - p.low)
            r2.append(model.score().r2)
            noise.append(model.seed_noise.sd)
        per_table = np.array(inside).reshape(repeats, -1).mean(axis=1)
        error = per_table.std(ddof=1) / np.sqrt(repeats)
        print(
            f"  {count} seeds each: coverage {per_table.mean():.3f} ± {error:.3f}, "
            f"median width {np.median(widths):.2f}, R² printed {np.mean(r2):.2f} (truth: about 0), "
            f"seeds scatter by {np.mean(noise):.2f} (truth: 0.30)",
            flush=True,
        )


def predictor(seeds: int) -> None:
    frame = read_table(PAPER)
    rows: list[dict[str, float]] = []
    each_run: list[pd.DataFrame] = []
    for seed in range(seeds):
        gbr = PaperGBR.fit(frame, seed=seed)
        test = frame.iloc[gbr.rows]
        train = frame.drop(index=test.index).reset_index(drop=True)
        model = Predictor.fit(train)
        outcomes = model.fitted.outcomes(model.features.matrix(test))
        predictions = model.predict(test)
        truth, predicted = gbr.truth, np.array([p.aa_acc for p in predictions])
        inside = np.array([p.low - 1e-9 <= t <= p.high + 1e-9 for p, t in zip(predictions, truth, strict=True)])
        auc = roc_auc_score(test["collapsed"], outcomes.p_collapse)
        each_run.append(test[["synthetic", "loss", "ema", "steps", "collapsed"]].assign(inside=inside))
        each = {m: _r2_mae(truth, outcomes.by_model[m]) for m in MODELS}
        r2, mae = _r2_mae(truth, predicted)
        rows.append(
            {"R² paper's GBR": gbr.r2, "MAE paper's GBR": gbr.mae, "R²": r2, "MAE": mae, "AUC": float(auc)}
            | {"coverage": float(inside.mean()), "width": float(np.mean([q.high - q.low for q in predictions]))}
            | {f"chose {m}": float(model.model == m) for m in MODELS}
            | {f"MAE {m}": each[m][1] for m in MODELS}
            | {f"R² {m}": each[m][0] for m in MODELS}
        )
    splits, runs = pd.DataFrame(rows), pd.concat(each_run)
    print(f"{seeds} random 70:30 splits of {len(frame)} runs: mean ± standard deviation over splits")
    for name in splits:
        print(f"  {name:18} {splits[name].mean():8.4f} ± {splits[name].std():.4f}")
    ratio = splits["MAE"] / splits["MAE paper's GBR"]
    print(f"  ratio of MAE, default to the paper's: {ratio.mean():.3f}")
    print("coverage by group (left-out runs of all splits)")
    for names in (["synthetic"], ["collapsed"], ["synthetic", "ema"], ["synthetic", "ema", "loss", "collapsed"]):
        by = runs.groupby(names).inside.agg(["mean", "size"])
        for level, (share, n) in by[by["size"] >= 20].sort_values("mean").head(8).iterrows():
            print(f"  {' × '.join(names):38} {level!s:32} {share:.3f} (n = {n:.0f})")
    print("left out whole (fitted on all other runs):")
    for score in Predictor.fit(frame).scores:
        numbers = f"R² {score.r2:6.3f}  MAE {score.mae:6.2f}  AUC {score.collapse_auc:.3f}"
        print(f"  {score.design:14} {score.model:8} {numbers}")


def _r2_mae(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    return r_squared(predicted - truth, truth), float(np.abs(predicted - truth).mean())


def large(n: int = 100_000) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(16, 21, n)
    frame = pd.DataFrame(
        {
            "run_id": np.arange(n).astype(str), "status": "done", "dataset": "made up", "norm": "linf", "eps": 8 / 255,
            "train_flops_exact": x, "parameters": 10 ** rng.uniform(6, 9, n), "steps": rng.choice([1, 2, 5, 7, 10], n),
            "loss": rng.choice(["at", "trades"], n), "synthetic": rng.random(n) < 0.5, "ema": rng.random(n) < 0.5,
            "activation": rng.choice(["relu", "silu"], n), "epochs": rng.choice([100, 200, 400], n), "clean_acc": 85.0,
        }
    )  # fmt: skip
    collapsed = (frame.steps == 1) & (rng.random(n) < 0.7)
    survivor = 57 + 5 * frame.synthetic - 4 * (x / 1e19) ** -0.3 - rng.exponential(4, n)
    frame["aa_acc"] = np.where(collapsed, rng.exponential(1, n), survivor).clip(0, 100)
    frame["train_energy_kwh"] = x * 1e-17 * np.exp(rng.normal(0, 0.2, n))
    frame["cost_usd"], frame["co2_kg"] = frame.train_energy_kwh * 0.19, frame.train_energy_kwh * 0.57
    return frame


def speed() -> None:
    frame = read_table(PAPER)
    fit_law(frame, resamples=10)
    for form in FORMS:
        begun = time.perf_counter()
        fit_law(frame, form=form, resamples=2_000)
        seconds = time.perf_counter() - begun
        print(f"  2,000 resamples of {len(frame)} runs, {form:11} {seconds:6.2f} s ({3 / seconds:.1f}× within 3 s)")
    begun = time.perf_counter()
    analyse(frame)
    seconds = time.perf_counter() - begun
    print(f"  everything about {len(frame)} runs        {seconds:6.2f} s ({10 / seconds:.1f}× within 10 s)")
    begun = time.perf_counter()
    analyse(large())
    seconds, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"  everything about 100,000 runs      {seconds:6.2f} s ({60 / seconds:.1f}× within 60 s), peak {peak:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subjects = ["coverage", "effects", "costs", "frontier", "merged", "next", "predictor", "seeds", "speed"]
    parser.add_argument("what", choices=subjects)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--form", action="append", default=[], choices=list(TRUTH))
    parser.add_argument("--short", action="append", default=[], choices=list(SHORT))
    parser.add_argument("--kind", action="append", default=[], choices=list(INEFFICIENCY))
    parser.add_argument("--runs", type=int, default=320, help="of a table, for coverage; few runs have few bins")
    parser.add_argument("--quantile-regression", action="store_true")
    parser.add_argument("--most-runs", type=int, default=1_000)
    parser.add_argument("--fewest-runs", type=int, default=20)
    options = parser.parse_args()
    if options.what == "coverage":
        coverage(options.repeats, options.resamples, options.form, options.short, options.runs)
    elif options.what == "effects":
        effect_intervals(options.repeats)
    elif options.what == "costs":
        costs(options.repeats)
    elif options.what == "frontier":
        frontier(options.repeats, options.kind, options.most_runs, options.fewest_runs, options.quantile_regression)
    elif options.what == "merged":
        merged(options.repeats, options.kind)
    elif options.what == "next":
        next_ones(options.repeats)
    elif options.what == "predictor":
        predictor(options.seeds)
    elif options.what == "seeds":
        seeds(options.repeats)
    else:
        speed()


if __name__ == "__main__":
    main()
