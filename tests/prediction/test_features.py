"""What a predictor may look at, and recipes turned into it."""

import math

import numpy as np
import pandas as pd
import pytest

from robudget.columns import PAPER_FEATURES
from robudget.errors import InputError
from robudget.prediction.features import Features, rows_of
from robudget.recipe import Recipe


def test_the_papers_choices_and_what_went_with_them(paper):
    seen = Features.of(paper)
    assert [c.name for c in seen.columns] == list(PAPER_FEATURES)
    aliases = {c.name: set(c.aliases) for c in seen.columns}
    assert {"epochs", "cutmix"} <= aliases["ema"]  # 400 epochs came with EMA and CutMix, always
    assert "variant" in aliases["activation"]
    assert aliases["steps"] == set()


def test_numbers(grid):
    seen = Features.of(grid, ["parameters", "loss", "steps", "synthetic"])
    X = seen.matrix(grid)
    assert X.shape == (len(grid), 4)
    assert X[:, 0] == pytest.approx(np.log(grid.parameters))
    assert X[:, 1].tolist() == (grid.loss == "trades").astype(float).tolist()
    assert X[:, 2] == pytest.approx(np.log(grid.steps))
    assert X[:, 3].tolist() == grid.synthetic.astype(float).tolist()


def test_a_category_of_three_takes_three_columns(grid):
    frame = grid.assign(precision=np.resize(["float32", "bfloat16", "auto"], len(grid)))
    seen = Features.of(frame, ["precision", "steps"])
    assert seen.names == ("precision", "precision", "precision", "steps")
    assert seen.matrix(frame)[:, :3].sum(axis=1).tolist() == [1.0] * len(frame)


def test_nothing_means_none_where_it_does(grid):
    frame = grid.assign(beta=np.where(grid.loss == "trades", np.where(grid.ema, 6.0, 3.0), np.nan))
    seen = Features.of(frame, ["beta", "steps"])
    assert (seen.matrix(frame)[(grid.loss == "at").to_numpy(), 0] == 0).all()


def test_a_column_that_is_hardly_known_is_no_feature(grid):
    frame = grid.assign(batch_size=[128.0, 256] + [np.nan] * (len(grid) - 2))
    assert "batch_size" not in [c.name for c in Features.of(frame).columns]
    some = grid.assign(batch_size=[np.nan] + [128.0, 256] * 35 + [128.0])
    seen = Features.of(some, ["batch_size"])
    assert seen.known(some).sum() == len(grid) - 1


def test_beyond_the_table(grid):
    seen = Features.of(grid)
    rows = grid.iloc[:2].assign(steps=[5, 10])
    assert seen.outside(rows) == [(), ("steps",)]


def test_a_value_that_no_run_has(paper, grid):
    seen = Features.of(paper)
    rows = paper.iloc[:4].assign(steps=[4, 5, 20, 7], parameters=[36479194.0, 5e7, 36479194.0, 1e6])
    assert seen.unseen(rows) == [("steps",), ("parameters",), ("steps",), ("parameters",)]
    assert seen.outside(rows) == [(), (), ("steps",), ("parameters",)]
    many = grid.assign(batch_size=np.linspace(100, 200, len(grid)))  # a value between many is not new
    rows = many.iloc[:3].assign(batch_size=[101.23, 99, 201])
    assert Features.of(many, ["batch_size"]).unseen(rows) == [(), ("batch_size",), ("batch_size",)]
    assert Features.of(grid, ["loss"]).unseen(grid.iloc[:2]) == [(), ()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "mart"}, "loss = mart is in no run of the table"),
        ({"steps": math.nan}, "steps is unknown for 3 of 3 recipes"),
    ],
)
def test_mistakes(grid, change, message):
    with pytest.raises(InputError, match=message):
        Features.of(grid).matrix(grid.iloc[:3].assign(**change))


def test_names_that_are_not_there(grid):
    with pytest.raises(InputError, match="'stepps' for a feature; did you mean 'steps'"):
        Features.of(grid, ["stepps"])
    with pytest.raises(InputError, match="needs 'steps'"):
        Features.of(grid).matrix(grid.drop(columns="steps"))
    with pytest.raises(InputError, match="nothing to predict from"):
        Features.of(grid.iloc[:1])


def test_a_recipe_as_a_row(grid):
    recipe = Recipe.from_dict({
        "model": {"name": "wrn-16-2"}, "loss": "trades", "craft": {"steps": 5}, "ema": {"decay": 0.99}, "epochs": 20,
        "data": {"name": "digits"},
    })  # fmt: skip
    row = rows_of(recipe, grid).iloc[0]
    assert row["parameters"] == 2e5  # of a run with the same model
    assert (row["loss"], row["steps"], row["ema"], row["synthetic"]) == ("trades", 5, True, False)
    assert np.isfinite(Features.of(grid).matrix(rows_of([recipe], grid))).all()
    assert rows_of(recipe.with_({"loss": "standard"}), grid).iloc[0]["steps"] == 0
    unseen = {"model.name": "wrn-40-4", "data.name": "cifar10"}
    assert rows_of(recipe.with_(unseen), grid).iloc[0]["parameters"] == 8_949_210  # no run has it: by arithmetic
    assert np.isnan(rows_of(recipe.with_({"model.name": "resnet18"}), grid).iloc[0]["parameters"])
    assert isinstance(rows_of({"steps": 3}), pd.DataFrame)


def test_no_step_is_no_adversary(grid):
    seen = Features.of(grid.assign(steps=np.resize([0, 2, 5], len(grid))), ["steps", "loss"])
    column = seen.names.index("steps")
    lowest = float(seen.matrix(grid.assign(steps=0))[0, column])
    assert seen.question(column, lowest) == "trained with an adversary or not"
    assert seen.question(column, math.log(2)) == "attack steps ≤ 2 or not"
