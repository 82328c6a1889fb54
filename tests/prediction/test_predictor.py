"""Predictions before training: the paper's regressor, the better default, its intervals and P(collapse)."""

import json

import numpy as np
import pandas as pd
import pytest

from robudget.errors import InputError
from robudget.prediction import PaperGBR, Predictor, predict
from robudget.prediction.cross_validation import Score, choose_model
from robudget.recipe import Recipe

SEEDS = (0, 7)  # of the 20 in bench/laws.py


@pytest.fixture(scope="module")
def splits(paper):
    """(the paper's regressor, our predictor on the same 70%, the other 30%) for each seed."""
    out = []
    for seed in SEEDS:
        gbr = PaperGBR.fit(paper, seed=seed)
        test = paper.iloc[gbr.rows]
        train = paper.drop(index=test.index).reset_index(drop=True)
        out.append((gbr, Predictor.fit(train, repeats=1, groups=["steps"]), test))
    return out


def test_the_papers_regressor(paper):
    fits = [PaperGBR.fit(paper, seed=seed) for seed in range(20)]
    assert np.mean([fit.r2 for fit in fits]) == pytest.approx(0.88, abs=0.005)
    assert np.mean([fit.mae for fit in fits]) <= 3.0
    assert (fits[0].n_train, fits[0].n_test) == (223, 96)
    assert sum(fits[0].importances.values()) == pytest.approx(1)
    assert next(iter(fits[0].importances)) == "steps"  # not synthetic data, as the paper has it: collapse leads
    assert (paper.aa_acc.to_numpy()[fits[0].rows] == fits[0].truth).all()
    json.dumps(fits[0].to_dict(), allow_nan=False)


def test_the_default_is_better_than_the_papers(splits):
    for gbr, model, test in splits:
        made = np.array([p.aa_acc for p in model.predict(test)])
        assert np.abs(made - gbr.truth).mean() < gbr.mae


def test_collapse_is_foreseen(splits):
    for _, model, test in splits:
        p = np.array([one.p_collapse for one in model.predict(test)])
        fell = test.collapsed.to_numpy()
        right = (p[fell][:, None] > p[~fell][None]).mean()  # the area under the ROC curve
        assert right > 0.97
        assert p[(test.steps == 1).to_numpy()].min() > 0.5  # all 64 single-step runs collapsed
        assert p[(test.steps >= 5).to_numpy()].max() < 0.1


def test_intervals_cover_and_hold_the_point(splits):
    inside, n = 0, 0
    for gbr, model, test in splits:
        for one, truth in zip(model.predict(test), gbr.truth, strict=True):
            assert 0 <= one.low <= one.aa_acc <= one.high <= 100
            inside += one.low - 1e-9 <= truth <= one.high + 1e-9
            n += 1
    assert 0.82 <= inside / n <= 0.97


def test_an_undecided_recipe_has_a_wide_interval(paper_predictor):
    even = {"parameters": 184531674.0, "synthetic": True, "activation": "relu", "loss": "at", "steps": 2, "ema": True}
    sure = even | {"steps": 10}
    one, two = paper_predictor.predict(even)[0], paper_predictor.predict(sure)[0]
    assert 0.05 < one.p_collapse < 0.95
    assert one.high - one.low > 30
    assert two.p_collapse < 0.05
    assert two.high - two.low < 10


def test_scores_tell_random_from_new(paper_predictor):
    random = paper_predictor.score()
    assert random.r2 > 0.9
    assert random.mae < paper_predictor.score(model="gbr").mae
    unseen = paper_predictor.score("by steps")
    assert unseen.r2 < random.r2 - 0.5  # a step count that no run had is another matter, and is reported
    assert {s.design for s in paper_predictor.scores} == {"random", "by parameters", "by steps", "by synthetic"}


def test_importances(paper_predictor):
    found = {i.feature: i for i in paper_predictor.importances}
    assert paper_predictor.importances[0].feature == "steps"
    assert paper_predictor.importances[1].feature == "synthetic"
    assert sum(i.by_model for i in found.values()) == pytest.approx(1)
    assert all(i.low <= i.by_permutation <= i.high for i in found.values())
    assert "epochs" in found["ema"].aliases


def test_partial_dependence_and_the_map_of_collapse(paper_predictor):
    curve = paper_predictor.partial("steps")
    assert curve.values == (1, 2, 5, 7, 10)
    assert curve.aa_acc[0] < 5 < 40 < curve.aa_acc[1] < curve.aa_acc[2]
    assert curve.p_collapse[0] > 0.9 > 0.05 > curve.p_collapse[3]
    assert paper_predictor.partial("cutmix").feature == "ema"  # which stands for it
    chart = paper_predictor.collapse_map("steps", "ema")
    assert chart.observed[:, 0].tolist() == [1, 0, 0, 0, 0]
    assert chart.n.sum() == 319
    assert np.abs(chart.p_collapse - chart.observed).max() < 0.1
    json.dumps(chart.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="unknown feature"):
        paper_predictor.partial("moon phase")


def test_nearest_real_runs(paper, paper_predictor):
    made = paper_predictor.predict(paper.iloc[[17]])[0]
    assert made.nearest[0][0] == "paper-017"
    assert made.nearest[0][2] == 0
    assert made.nearest[0][1] == pytest.approx(paper.aa_acc[17])
    assert len(made.nearest) == 3
    assert "nearest run paper-017" in made.sentence()


def test_a_recipe_goes_in_as_it_is(grid_predictor):
    recipe = Recipe.from_dict({
        "model": {"name": "wrn-16-4"}, "loss": "trades", "craft": {"steps": 5}, "ema": {"decay": 0.99}, "epochs": 20,
        "data": {"name": "digits"}, "synthetic": {"source": "mixture"}, "threat": {"eps": 0.1},
    })  # fmt: skip
    made = grid_predictor.predict(recipe)[0]
    truth = 30 + 2 * np.log10(7e5) + 3 * np.log2(5) + 4 + 2 + 1
    assert made.low - 0.5 < truth < made.high + 0.5
    assert made.aa_acc == pytest.approx(truth, abs=1.5)
    assert made.outside == ()
    far = grid_predictor.predict(recipe.with_({"craft.steps": 10}))[0]
    assert far.outside == ("steps",)
    assert "beyond the table in steps" in far.sentence()
    other = grid_predictor.predict(recipe.with_({"ema.decay": 0.9}))[0]
    assert other.outside == ("ema_decay",)  # the table knows EMA with 0.99 only, and cannot tell what 0.9 does


def test_a_step_count_that_nobody_ran_is_flagged(paper, paper_predictor):
    row = paper.iloc[[17]]
    made = paper_predictor.predict(pd.concat([row.assign(steps=4), row.assign(steps=5)]))
    assert [p.unseen for p in made] == [("steps",), ()]
    assert [p.outside for p in made] == [(), ()]
    assert "no run has this value of steps" in made[0].sentence()


def test_one_question_in_one_call(grid, grid_predictor, monkeypatch):
    monkeypatch.setattr(Predictor, "fit", lambda *_, **__: grid_predictor)
    features = {"parameters": 2e5, "loss": "at", "steps": 5, "synthetic": False, "ema": False}
    assert predict(grid, features) == grid_predictor.predict(features)[0]
    assert predict(grid, grid.iloc[:2]) == grid_predictor.predict(grid.iloc[:2])


@pytest.mark.usefixtures("fresh")
def test_one_seed_one_answer(grid):
    one, two = (Predictor.fit(grid, repeats=1, groups=[]).predict(grid.iloc[:3]) for _ in range(2))
    assert one == two


def test_plain_data(grid_predictor):
    json.dumps(grid_predictor.to_dict(), allow_nan=False)
    json.dumps([p.to_dict() for p in grid_predictor.predict({
        "parameters": 2e5, "loss": "at", "steps": 5, "synthetic": False, "ema": False,
    })], allow_nan=False)  # fmt: skip


def test_a_table_without_collapse_and_one_with_few(grid):
    calm = Predictor.fit(grid[~grid.collapsed], repeats=1, groups=[])
    assert {p.p_collapse for p in calm.predict(grid[~grid.collapsed].iloc[:5])} == {0.0}
    two = grid[~grid.collapsed | (np.arange(len(grid)) % 8 == 0)]
    assert 0 < two.collapsed.sum() <= 4
    assert 0 <= Predictor.fit(two, repeats=1, groups=[]).predict(two.iloc[:1])[0].p_collapse <= 1


def test_what_is_said_of_small_and_confounded_tables(grid_predictor):
    assert any("varies only together with" in w and "ema_decay" in w for w in grid_predictor.warnings)
    small = Predictor.fit(grid_predictor.table.iloc[::3], repeats=1, groups=[])
    assert any("take its intervals seriously" in w for w in small.warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "forrest"}, "unknown model of a predictor 'forrest'; did you mean 'forest'"),
        ({"level": 90}, "level = 90"),
        ({"features": ["stepps"]}, "did you mean 'steps'"),
    ],
)
def test_mistakes(grid, arguments, message):
    with pytest.raises(InputError, match=message):
        Predictor.fit(grid, **arguments)


def test_too_few_runs(grid):
    with pytest.raises(InputError, match="9 finished runs are too few for a predictor"):
        Predictor.fit(grid.iloc[:9])


def test_the_blend_stays_unless_clearly_beaten():
    def score(name, mae):
        return Score("random", name, 0.9, mae, 2 * mae, 0.99, 100)

    close = [score("gbr", 3.0), score("forest", 2.5), score("mixture", 2.30), score("blend", 2.35)]
    clear = [score("gbr", 3.0), score("forest", 2.5), score("mixture", 1.9), score("blend", 2.35)]
    assert choose_model(close) == "blend"
    assert choose_model(clear) == "mixture"
