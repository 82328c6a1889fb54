"""Costs of recipes that were not run, from those that were."""

import numpy as np
import pytest

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
