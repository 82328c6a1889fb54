"""How well cheaper runs rank choices, on tables where it is known."""

import json
import math
from itertools import product

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.prediction.small_runs import small_runs


def table(effect: float, swap: float = 1.0) -> pd.DataFrame:
    """3 sizes × 6 batch sizes × 2 seeds; at the smallest size the order of the batch sizes is times `swap`."""
    rows = []
    for (i, parameters), j, seed in product(enumerate([1e6, 1e7, 1e8]), range(6), range(2)):
        sign = swap if i == 0 else 1.0
        rows.append({
            "parameters": parameters, "batch_size": 64 * 2**j, "loss": "at", "seed": seed, "clean_acc": 80.0,
            "aa_acc": 40 + 5 * i + sign * effect * j + 0.2 * seed, "collapsed": False,
            "train_flops_exact": parameters * 1e9,
        })  # fmt: skip
    return pd.DataFrame(rows)


def test_small_runs_that_rank_alike_and_that_rank_the_other_way():
    alike, other = small_runs(table(1.0)), small_runs(table(1.0, swap=-1.0))
    assert (alike.scale, alike.choices) == (("parameters",), ("batch_size",))
    assert [one.share for one in alike.levels] == pytest.approx([0.01, 0.1])
    assert [one.decision_accuracy for one in alike.levels] == [1.0, 1.0]
    assert [one.decision_accuracy for one in other.levels] == [0.0, 1.0]
    assert [one.n_pairs for one in alike.levels] == [15, 15]
    assert alike.levels[0].signal == pytest.approx(5.0)
    assert alike.levels[0].snr == pytest.approx(5.0 / alike.noise.sd)
    assert alike.noise.sd == pytest.approx(0.2 / math.sqrt(2))
    assert small_runs(table(0.0)).levels[0].decision_accuracy == 0.5  # ties say nothing
    json.dumps(alike.to_dict(), allow_nan=False)


def test_collapsed_runs_rank_nothing():
    frame = table(1.0)
    frame.loc[frame.parameters == 1e6, ["collapsed", "aa_acc"]] = [True, 1.0]
    first = small_runs(frame).levels[0]
    assert (first.collapsed, first.n_pairs) == (1.0, 0)
    assert np.isnan([first.decision_accuracy, first.low, first.signal]).all()
    frame = table(1.0).assign(collapsed=True)
    with pytest.raises(InputError, match="but the cheapest was run with 3 or more of the other choices, not collapsed"):
        small_runs(frame)


def test_the_papers_table(paper):
    runs = small_runs(paper)
    assert runs.n_choices == 16
    assert [0.8 < one.decision_accuracy <= 1 for one in runs.levels] == [True] * 6
    assert all(one.low <= one.decision_accuracy <= one.high for one in runs.levels)
    assert runs.levels[0].collapsed > 0.5  # the cheapest runs are those of one step, which collapse
    assert runs.noise.borrowed


def test_the_costliest_scale_with_enough_choices_judges():
    """A study rarely runs every choice at its costliest scale: the demo has no TRADES there."""
    frame = table(1.0)
    top = frame[frame.parameters == frame.parameters.max()]
    costlier = top.head(2).assign(parameters=1e9, train_flops_exact=1e3 * top.train_flops_exact.max())
    runs, before = small_runs(pd.concat([frame, costlier], ignore_index=True)), small_runs(frame)
    assert runs.target == before.target
    assert [one.decision_accuracy for one in runs.levels] == [one.decision_accuracy for one in before.levels]
    assert runs.target_text().startswith("parameters ")
