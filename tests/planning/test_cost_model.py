"""Costs of recipes that were not run, from those that were."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from robudget.meter.conventions import exact_factor
from robudget.planning.cost_model import CostModel, images_of


def test_counted_flops_come_back_exactly(grid):
    model = CostModel.fit(grid, "train_flops_exact")
    assert model.predict(grid) == pytest.approx(grid.train_flops_exact, rel=1e-4)
    assert model.scatter < 1e-4


def test_steps_between_those_that_were_run(grid):
    model = CostModel.fit(grid, "train_flops_exact")
    row = grid[(grid.steps == 5) & (grid.loss == "at")].iloc[[0]]
    three = float(model.predict(row.assign(steps=3))[0])
    assert three == pytest.approx(float(row.train_flops_exact.iloc[0]) * (2 * 3 + 3) / (2 * 5 + 3), rel=1e-3)


def test_twice_the_epochs_cost_twice(grid):
    model = CostModel.fit(grid, "cost_usd")
    row = grid.iloc[[0]]
    longer = row.assign(epochs=40, images_seen=np.nan)
    assert model.predict(longer)[0] == pytest.approx(2 * model.predict(row)[0])


def test_measured_energy_has_its_scatter(grid):
    assert CostModel.fit(grid, "train_energy_kwh").scatter == pytest.approx(0.1, rel=0.3)


def test_an_effect_that_the_table_cannot_tell_is_none_rather_than_anything(grid):
    """SiLU only ever with TRADES: ReLU with TRADES must cost about the same, not a thousandth."""
    tied = grid.assign(activation=np.where(grid.loss == "trades", "silu", "relu"))
    model = CostModel.fit(tied, "train_flops_exact")
    row = tied[tied.loss == "trades"].iloc[[0]]
    ratio = float(model.predict(row.assign(activation="relu"))[0] / model.predict(row)[0])
    assert 0.5 < ratio < 2

    assert np.isnan(model.spread(row.assign(activation="relu"), 0.9)).all()  # nobody knows how wide that is
    assert (model.spread(row, 0.9) > 0).all()


def test_as_many_corrections_as_runs_leave_no_interval(grid):
    """Two runs fit two corrections exactly: that is no certainty."""
    two = grid[(grid.model == "wrn-16-2") & grid.steps.isin([2, 5]) & (grid.loss == "at") & ~grid.ema & ~grid.synthetic]
    model = CostModel.fit(two, "train_energy_kwh")
    assert (model.freedom, len(two)) == (0, 2)
    assert np.isnan(model.scatter)
    assert np.isnan(model.spread(two, 0.9)).all()
    assert model.predict(two) == pytest.approx(two.train_energy_kwh, rel=1e-3)


def made_up(rng, repeats):
    """Runs of 3 models, 2 losses and 3 step counts; costs scatter by 20%."""
    levels = product([1e6, 4e6, 2e7], ["at", "trades"], [1, 2, 5])
    runs = pd.DataFrame(list(levels) * repeats, columns=["parameters", "loss", "steps"]).assign(images_seen=1e6)
    runs = runs.iloc[rng.permutation(len(runs))[: max(9, len(runs) // 2)]].reset_index(drop=True)
    guess = runs.parameters * np.array([exact_factor(*e) for e in zip(runs.loss, runs.steps, strict=True)])
    return runs.assign(train_energy_kwh=guess * np.exp(rng.normal(0, 0.2, len(runs))))


@pytest.mark.parametrize("repeats", [1, 4])
def test_intervals_of_new_runs_cover_what_they_say(repeats):
    """Few runs for many corrections: the doubt in these is most of the width. `bench/laws.py costs` has more tables."""
    rng = np.random.default_rng(repeats)
    hits, n = 0, 0
    for _ in range(150):
        runs, new = made_up(rng, repeats), made_up(rng, 1)
        model = CostModel.fit(runs, "train_energy_kwh")
        off = np.abs(np.log(model.predict(new) / new.train_energy_kwh))
        told = ~np.isnan(model.spread(new, 0.9))
        hits, n = hits + (off <= model.spread(new, 0.9))[told].sum(), n + told.sum()
    assert n > 800
    assert hits / n == pytest.approx(0.9, abs=0.04)


def test_a_size_between_two(grid):
    model = CostModel.fit(grid, "train_flops_exact")
    row = grid[(grid.model == "wrn-16-2")].iloc[[0]]
    between = float(model.predict(row.assign(model="wrn-22-3", parameters=3e5))[0])
    assert between == pytest.approx(float(row.train_flops_exact.iloc[0]) * 1.5, rel=0.05)


def test_unknown_columns_and_values(grid):
    assert CostModel.fit(grid, "gpu_hours") is None
    assert CostModel.fit(grid.assign(gpu_hours=np.nan), "gpu_hours") is None
    assert images_of(grid.drop(columns=["images_seen"])) == pytest.approx(grid.images_seen)
    assert images_of(grid[["epochs"]]).tolist() == [20.0] * len(grid)
    assert images_of(grid[["steps"]]).tolist() == [1.0] * len(grid)
