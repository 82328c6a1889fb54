"""Runs of one recipe stay together, and what seeds, repeats and runs that were made say."""

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.prediction import PaperGBR, Predictor
from robudget.prediction.cross_validation import leave_group_out, recipe_folds
from robudget.prediction.features import Features
from robudget.prediction.repeats import BORROWED_SD, recipe_codes, runs_of, seed_noise


def repeated(recipes: int = 16, seeds: int = 3, sd: float = 0.4) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "run_id": f"r{i}s{s}", "parameters": 1e6 * 2 ** (i % 4), "steps": 2 + i // 4, "seed": s,
            "dataset": "cifar10",
            "aa_acc": 50 + i + rng.normal(0, sd), "clean_acc": 80.0, "collapsed": False, "cost_usd": 2.0 + s,
            "batch": f"b{i % 2}",
        }
        for i in range(recipes)
        for s in range(seeds)
    )  # fmt: skip


def test_a_recipe_is_all_choices_but_the_seed():
    frame = repeated()
    codes = recipe_codes(frame, Features.of(frame))
    assert codes.tolist() == [i for i in range(16) for _ in range(3)]
    both = recipe_codes(frame, Features.of(frame), ["batch"])  # a user's groups join recipes, never part them
    assert set(pd.crosstab(codes, both).gt(0).sum(axis=1)) == {1}
    assert both.max() == 1
    with pytest.raises(InputError, match="no column 'btach' to keep runs together by; did you mean 'batch'"):
        recipe_codes(frame, Features.of(frame), ["btach"])


def test_no_recipe_on_both_sides_of_a_fold():
    codes = np.repeat(np.arange(16), 3)
    folds = recipe_folds(codes, 0, 2)
    assert len(folds) == 10
    for rest, out in folds:
        assert not set(codes[rest]) & set(codes[out])
        assert len(rest) + len(out) == 48
    assert sorted(np.concatenate([out for _, out in folds[:5]])) == list(range(48))


def test_a_group_left_out_takes_its_recipes_along():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 2)), rng.normal(50, 5, 60)
    out = leave_group_out("half", [0] * 30 + [1] * 30, X, y, np.zeros(60, dtype=bool), codes=np.arange(60) % 10)
    assert out is None  # every recipe has runs in both halves: nothing is left to fit on


def test_the_papers_regressor_holds_out_recipes():
    frame = repeated(20, 3)
    held = PaperGBR.fit(frame)
    assert set(frame.iloc[held.rows].groupby(["parameters", "steps"]).size()) == {3}


def test_seed_noise_is_pooled_within_recipes():
    frame = repeated(40, 4, sd=0.5)
    codes = np.repeat(np.arange(40), 4)
    noise = seed_noise(frame.aa_acc.to_numpy(), frame.collapsed.to_numpy(), codes)
    assert noise.sd == pytest.approx(0.5, rel=0.15)  # 120 degrees of freedom
    assert (noise.n_recipes, noise.n_runs, noise.borrowed) == (40, 160, False)
    alone = seed_noise(np.arange(5.0), np.zeros(5, dtype=bool), np.arange(5))
    assert alone.borrowed
    assert alone.sd == BORROWED_SD
    assert "assumed, which is not from these runs" in alone.sentence()


def test_r2_and_intervals_are_of_new_recipes(bench):
    """25 recipes × 4 seeds whose accuracy no choice explains: seeds on both sides of a fold make R² 0.9 of it."""
    frame = bench.seeds_table(25, 4, draw=0)
    model = Predictor.fit(frame[~frame.new], groups=())
    assert model.score().r2 < 0.3
    new = frame[frame.new]
    inside = [p.low <= t <= p.high for p, t in zip(model.predict(new), new.aa_acc, strict=True)]
    assert np.mean(inside) > 0.75  # 50 of one table; bench/laws.py seeds has the rate
    assert model.seed_noise.sd == pytest.approx(0.3, rel=0.25)


def test_a_recipe_that_was_run_is_answered_with_its_runs():
    frame = repeated(16, 3, sd=0.4)
    noise = seed_noise(frame.aa_acc.to_numpy(), frame.collapsed.to_numpy(), np.repeat(np.arange(16), 3))
    asked = pd.DataFrame([{"parameters": 1e6, "steps": 2}, {"parameters": 1e6, "steps": 9}])
    ran, none = runs_of(asked, frame, noise, ["parameters", "steps"])
    assert none is None
    assert ran.runs == ("r0s0", "r0s1", "r0s2")
    assert ran.aa_acc == pytest.approx(frame.aa_acc[:3].mean())
    assert ran.high - ran.low == pytest.approx(2 * 1.96 * noise.sd / 3**0.5, rel=1e-3)
    assert ran.next_high - ran.next_low > ran.high - ran.low
    assert ran.costs["cost_usd"] == pytest.approx(3.0)


def test_what_says_nothing_of_new_recipes_is_refused():
    frame = repeated()
    one = frame.assign(parameters=1e6, steps=2)
    with pytest.raises(InputError, match=r"no choice varies among the 48 runs .*train recipes that differ"):
        Predictor.fit(one)
    two = frame.assign(parameters=1e6, steps=[2, 5] * 24)
    with pytest.raises(InputError, match=r"48 runs of 2 recipes, .*train 5 or more that differ"):
        Predictor.fit(two)
    with pytest.raises(InputError, match="all 48 runs have the same robust accuracy, 50%"):
        Predictor.fit(frame.assign(aa_acc=50.0))


def test_another_dataset_is_refused():
    frame = repeated()
    model = Predictor.fit(frame, groups=())
    asked = {"parameters": 1e6, "steps": 2, "dataset": "cifar100"}
    with pytest.raises(InputError, match="dataset cifar100 cannot be predicted from runs with dataset cifar10"):
        model.predict(asked)
    assert len(model.predict(asked | {"dataset": "cifar10"})) == 1
    paper = frame.assign(train_flops_paper=1e15 * (1 + np.arange(48)))
    model = Predictor.fit(paper, features=["train_flops_paper", "steps"], groups=())
    with pytest.raises(InputError, match="train_flops_exact counts FLOPs by another convention"):
        model.predict({"train_flops_exact": 1e15, "steps": 2})
