"""Laws in several quantities: the published one at its published points, and one fitted to a known truth."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from robudget.errors import InputError
from robudget.laws import BARTOLDSON, fit_joint


@pytest.mark.parametrize(("flops", "accuracy"), [(1e20, 70.3), (2.1e20, 71.4), (1.44e21, 74.0)])
def test_bartoldson_at_published_budgets(flops, accuracy):
    assert BARTOLDSON.best(flops, 1.65) == pytest.approx(accuracy, abs=0.1)


def test_bartoldson_at_published_sizes():
    N, D = BARTOLDSON.optimum(2.1e20, 1.65)
    assert pytest.approx(76e6, rel=0.02) == N
    assert pytest.approx(350e6, rel=0.02) == D
    assert BARTOLDSON.flops(N, D) == pytest.approx(2.1e20)


def test_bartoldson_costs_and_ceilings():
    assert np.log10(BARTOLDSON.cost_at(76, 1.65)) == pytest.approx(22, abs=0.05)
    assert np.log10(BARTOLDSON.cost_at(80, 1.65)) == pytest.approx(24.7, abs=0.05)
    assert BARTOLDSON.best(BARTOLDSON.cost_at(76, 1.65), 1.65) == pytest.approx(76)
    assert [BARTOLDSON.ceiling(fid) for fid in (0, 1.4, 1.65)] == pytest.approx([89.65, 84.4, 83.7], abs=0.05)
    assert BARTOLDSON.cost_at(85, 1.65) == np.inf


def test_the_optimum_is_one():
    for flops in (1e18, 1e20, 1e22):
        N, _ = BARTOLDSON.optimum(flops, 1.65)
        product = flops / BARTOLDSON.per_sample
        found = minimize_scalar(
            lambda s, product=product: float(BARTOLDSON.loss(10**s, product / 10**s, 1.65)),
            bounds=(4, 12),
            method="bounded",
        )
        assert np.log10(N) == pytest.approx(found.x, abs=1e-3)
    growth = np.log10(BARTOLDSON.optimum(1e21, 1.65)[0] / BARTOLDSON.optimum(1e20, 1.65)[0])
    assert growth == pytest.approx(0.483, abs=5e-4)


def test_mistakes():
    with pytest.raises(InputError, match="fid = -1"):
        BARTOLDSON.best(1e20, -1)
    with pytest.raises(InputError, match="flops = 0"):
        BARTOLDSON.optimum(0, 1.65)


@pytest.fixture(scope="module")
def runs():
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(6, 9, 150), 10 ** rng.uniform(6, 9, 150)
    y = 75 - 200 * N**-0.3 - 300 * D**-0.25
    return pd.DataFrame({"parameters": N, "images_seen": D, "aa_acc": y, "clean_acc": 90.0, "loss": "at"})


def test_a_known_truth_comes_back(runs):
    joint = fit_joint(runs, resamples=0)
    assert joint.converged
    assert joint.params == pytest.approx({"E": 75, "A": 200, "B": 300, "a": 0.3, "d": 0.25}, rel=1e-3)
    N, D = joint.split(1e16)
    nearby = [float(joint.predict(N * f, D / f)) for f in (0.8, 1.25)]
    assert float(joint.predict(N, D)) > max(nearby)


def test_intervals_hold_it(runs):
    noisy = runs.assign(aa_acc=runs.aa_acc + np.random.default_rng(1).normal(0, 0.3, len(runs)))
    joint = fit_joint(noisy, resamples=60)
    for name, value in {"E": 75, "a": 0.3, "d": 0.25}.items():
        low, high = joint.intervals[name]
        assert low - 0.1 * abs(value) < value < high + 0.1 * abs(value)


def test_what_cannot_be_told_is_refused(runs):
    with pytest.raises(InputError, match="the runs have 1 level of images_seen"):
        fit_joint(runs.assign(images_seen=5e7))
    with pytest.raises(InputError, match="5 runs cannot fix the 5 parameters"):
        fit_joint(runs.iloc[:5])


def test_steps_quality_and_flop_split(runs):
    rng = np.random.default_rng(2)
    steps, synthetic = rng.choice([1, 2, 5, 10], len(runs)), rng.random(len(runs)) < 0.5
    y = runs.aa_acc - 6 * steps**-0.8 + 3.0 * synthetic + rng.normal(0, 0.1, len(runs))
    outliers = rng.random(len(runs)) < 0.05
    table = runs.assign(
        steps=steps, synthetic=synthetic, aa_acc=y - 15 * outliers,
        train_flops_exact=4 * runs.parameters * runs.images_seen * (steps + 1.5),
    )  # fmt: skip
    joint = fit_joint(table, k="steps", g="synthetic", huber=True, resamples=30)
    truth = {"E": 75, "a": 0.3, "d": 0.25, "s": 0.8, "Q": 3.0}
    for name, value in truth.items():
        low, high = joint.intervals[name]
        assert low - 0.15 * abs(value) < value < high + 0.15 * abs(value), name
    plain = fit_joint(table, k="steps", g="synthetic", resamples=0)
    assert abs(joint.params["E"] - 75) < abs(plain.params["E"] - 75)
    low, high = joint.intervals["n_exponent"]
    assert low < 0.25 / 0.55 < high
    assert joint.flops_per == pytest.approx(4)
    best = joint.optimum(1e19, k=5)
    assert best.n * best.d * 4 * 6.5 == pytest.approx(1e19)
    assert max(y for _, _, y in best.profile) == pytest.approx(best.y, abs=1e-6)
    assert len(joint.optima()) >= 3
    assert joint.sentence().startswith("By 150 runs, a budget of FLOP is best split so that parameters grow as FLOP^0.")


def test_a_loss_falls(runs):
    rng = np.random.default_rng(3)
    loss = 1.2 + 40 * runs.parameters**-0.3 + 60 * runs.images_seen**-0.25 + rng.normal(0, 0.002, len(runs))
    joint = fit_joint(runs.assign(adversarial_loss=loss), y="adversarial_loss", resamples=0)
    assert joint.falls
    assert -joint.params["E"] == pytest.approx(1.2, abs=0.05)
    assert float(joint.predict(1e7, 1e7)) == pytest.approx(1.2 + 40 * 1e7**-0.3 + 60 * 1e7**-0.25, abs=0.01)


def test_the_table_says_what_it_can_tell(runs, robudget_command, tmp_path):
    spent = runs.assign(train_flops_exact=4 * runs.parameters * runs.images_seen, dataset="made up")
    spent.to_csv(tmp_path / "runs.csv", index=False)
    code, out, _ = robudget_command("fit", str(tmp_path / "runs.csv"), "--joint")
    assert code == 0
    assert out.startswith("By 150 runs, a budget of FLOP is best split")
    assert "IsoFLOP profiles" in out
    spent.assign(images_seen=[1e7, 2e7] * 75).to_csv(tmp_path / "two.csv", index=False)
    code, out, err = robudget_command("fit", str(tmp_path / "two.csv"), "--joint")
    assert (code, out) == (2, "")
    assert err == (
        "error: the runs have 2 levels of images_seen: a joint law needs 3 or more of parameters and of images_seen, "
        "independent of each other (train recipes that differ in it)\n"
    )
