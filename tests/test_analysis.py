"""Everything about a table in one call; the room starts without torch."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from robudget.analysis import PRICED_FORMS, analyse
from robudget.errors import InputError
from robudget.laws import average, envelope, fit_forms


@pytest.fixture(scope="module")
def found(paper):
    return analyse(paper, resamples=300, predict=False)


def test_the_papers_two_laws_are_named_in_json(found):
    data = found.to_dict()
    json.dumps(data, allow_nan=False)
    keys = {"form", "C", "alpha", "alpha_interval", "r2", "n_runs", "n_bins", "x", "y"}
    assert all(keys <= set(law) for law in data["laws"])
    published = {law["y"]: law for law in data["laws"] if law["x"] == "published_run_tflops"}
    assert published["aa_acc"]["C"] == pytest.approx(50.86, abs=0.005)
    assert published["aa_acc"]["alpha"] == pytest.approx(0.0105, abs=5e-5)
    assert published["cost_usd"]["alpha"] == pytest.approx(0.95, abs=0.005)
    assert data["laws"][0]["x"] == "train_flops_exact"


def test_what_is_in_it(found):
    assert found.law is found.forms[0]
    assert len(found.forms) == 7
    assert [h.hidden for h in found.holdouts] == ["decade", "bin"]
    assert {law.y for law in found.costs} == {"train_energy_kwh", "co2_kg", "cost_usd", "train_seconds"}
    assert {(c.how, c.bins) for c in found.sensitivity} >= {("log", 9), ("log", 19), ("log", 38), ("pareto", 1)}
    assert found.prices[0].target == pytest.approx(61.1)
    assert found.prices[-1].target == 90
    assert any("do not extrapolate" in w for w in found.warnings)


def test_what_the_headline_is_worth(found):
    support, decade, top, reach = found.trust
    assert support == found.average.support()
    assert found.holdouts[0].sentence() in decade
    assert f"power form missed by {found.holdouts[0].miss('power').rmse:.2f}" in decade
    assert top.startswith("Hiding the top bin, ")
    assert reach.endswith(f"more than {found.holdouts[0].decades:.1f} decades beyond its points.")


@pytest.mark.parametrize("form", ["saturating", "broken", "m4"])
def test_another_headline(paper, form):
    found = analyse(paper, form=form, resamples=20, predict=False, splits=False)
    assert found.law.form == form
    assert found.forms[0] is found.law
    assert len(found.forms) == 7
    assert found.to_dict()["laws"][0]["form"] == form


@pytest.mark.parametrize("how", ["linear", "quantile", "pareto", "log"])
def test_other_bins(paper, how):
    found = analyse(paper, how=how, bins=8, resamples=20, predict=False, splits=False)
    assert found.envelope.how == how
    assert found.envelope.n_bins == (found.law.n_bins if how == "pareto" else 8)


def test_laws_per_steps_and_per_data(found):
    splits = {(s.feature, s.level): s for s in found.splits if s.within is None}
    assert splits["steps", 1].law is None
    assert "64 collapsed" in splits["steps", 1].reason
    assert splits["steps", 10].law.n_runs == 64
    low, high = splits["synthetic", True].law.alpha_interval
    assert 0 < low < splits["synthetic", True].law.alpha < high
    assert {s.feature for s in found.splits} == {"steps", "synthetic", "loss"}


def test_the_answer_comes_first(found):
    assert found.answer.startswith("Ten times the training compute (4.19×10¹⁸ FLOP to 4.19×10¹⁹ FLOP) bought the best")
    gain, low, high = found.frontier.gain()
    assert f"{gain:+.1f} [{low:+.1f}, {high:+.1f}] points of AutoAttack accuracy" in found.answer
    assert any("α = " in line for line in found.support)
    assert found.prices[0].sentence() in found.support[-1]
    data = found.to_dict()
    assert data["answer"] == found.answer
    assert data["support"] == list(found.support)


def test_three_copies_of_one_curve_are_no_preference(found):
    """They were 69% of the weight: 0.25 on the error, 0.23 on the log-odds, 0.21 on the value."""
    families = found.average.families
    assert sum(families.values()) == pytest.approx(1)
    assert families["power"] < 0.5
    assert found.average.support().startswith("These points do not decide between forms")


def test_no_difference_between_steps_is_seen_within_synthetic_runs(found):
    """The best of each bin gave −0.025 at two steps, where bins hold no run with synthetic data."""
    inside = {s.level: s for s in found.splits if s.feature == "steps" and s.within == ("synthetic", True)}
    assert set(inside) == {1, 2, 5, 7, 10}
    assert inside[1].frontier is None
    assert inside[2].frontier.n_runs == 23
    two = inside[2].frontier.alpha_interval
    assert two[0] < 0.0105 < two[1]
    for steps in (5, 7, 10):
        assert inside[steps].frontier.alpha == pytest.approx(0.011, abs=0.002)
    (comparison,) = (c for c in found.comparisons if c.feature == "steps" and c.within == ("synthetic", True))
    assert comparison.p_value > 0.3
    assert "no difference seen" in comparison.sentence()
    all_runs = {s.level: s for s in found.splits if s.feature == "steps" and s.within is None}
    assert all_runs[2].law.alpha == pytest.approx(-0.025, abs=0.002)
    assert all_runs[2].frontier.alpha > 0


def test_prices_under_other_bins_are_shown_beside_the_frontiers(found):
    assert all(b.next_point > 0 for b in found.sensitivity)
    assert max(b.next_point for b in found.sensitivity if np.isfinite(b.next_point)) <= found.prices[0].limit


@pytest.mark.parametrize("bins", [10, 15, 19, 25])
def test_the_price_does_not_hang_on_the_number_of_bins(paper, found, bins):
    """61.1% once cost 2×10³², never, 1.1×10²⁰ or 1.2×10²⁰ FLOP with 10, 15, 19 or 25 bins."""
    other = analyse(paper, bins=bins, resamples=10, predict=False, splits=False)
    assert [p.value for p in other.prices] == [p.value for p in found.prices]
    assert other.answer == found.answer


def test_costs_that_are_one_clock_are_one_law(found):
    ((law, constants),) = found.clocks
    assert law.y == "train_seconds"
    assert set(constants) == {"train_energy_kwh", "cost_usd", "co2_kg"}
    assert constants["train_energy_kwh"] * 3600 == pytest.approx(1.2)  # 4 GPUs of 300 W


def test_a_pareto_frontier_says_what_it_cannot_give(paper):
    found = analyse(paper, how="pareto", resamples=20, predict=False, splits=False)
    assert any("cannot give an exponent of 0 or below" in w for w in found.warnings)


def test_any_x_and_any_y(paper):
    by_size = analyse(paper, x="parameters", y="clean_acc", resamples=50, predict=False, splits=False)
    assert by_size.counts.used == 319  # collapsed runs have a clean accuracy, too
    error = analyse(paper, x="cost_usd", y="aa_error", resamples=50, predict=False, splits=False)
    assert error.law.alpha < 0
    assert error.envelope.best == "min"
    energy = analyse(paper, y="train_energy_kwh", resamples=50, predict=False, splits=False)
    assert energy.average is None
    assert energy.law.alpha == pytest.approx(0.94, abs=0.01)


def test_a_small_study_says_what_it_stands_on(grid):
    small = grid[grid.loss == "at"].iloc[::3].reset_index(drop=True)
    found = analyse(small, resamples=100)
    assert any("points only" in w for w in found.warnings)
    assert found.predictor is not None
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_study_too_small_for_a_predictor_still_has_its_law(grid):
    found = analyse(grid[grid.steps == 5].iloc[:8], resamples=50)
    assert found.predictor is None
    assert any(w.startswith("no effects and no predictor: 8 finished runs are too few") for w in found.warnings)


def test_robustbench_by_size(shared):
    found = analyse(shared / "data" / "robustbench" / "cifar10" / "Linf", x="parameters", resamples=50, predict=False)
    assert found.counts.unknown > 0
    assert found.envelope.ys.max() == pytest.approx(73.71)


def test_mistakes_of_the_call(paper):
    with pytest.raises(InputError, match="unknown form 'powr'; did you mean 'power'"):
        analyse(paper, form="powr")
    with pytest.raises(InputError, match="unknown kind of envelope 'linar'; did you mean 'linear'"):
        analyse(paper, how="linar")
    with pytest.raises(InputError, match="bins = 0"):
        analyse(paper, bins=0)
    with pytest.raises(InputError, match="did you mean 'train_flops_exact'"):
        analyse(paper, x="train_flop_exact")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"aa_acc": [50.0, 55]}), "no column 'train_flops_exact' for x"),
        (pd.DataFrame({"train_flops_exact": ["much", "more"], "aa_acc": [50.0, 55]}), "does not hold numbers"),
        (pd.DataFrame({"train_flops_exact": [1e18, 1e19], "aa_acc": [np.nan, np.nan]}), "2 with a value missing"),
        (pd.DataFrame({"train_flops_exact": [1e18, 1e18], "aa_acc": [50.0, 55]}), "at least two levels"),
    ],
)
def test_mistakes_are_one_line(frame, message):
    with pytest.raises(InputError, match=message) as caught:
        analyse(frame)
    assert "\n" not in str(caught.value)


def test_the_room_starts_without_torch():
    code = (
        "import sys, robudget.laws, robudget.tables.published\n"
        "assert 'torch' not in sys.modules and 'sklearn' not in sys.modules, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_fitting_needs_no_torch(tmp_path, grid):
    grid.to_csv(tmp_path / "runs.csv", index=False)
    code = (
        "import sys; from robudget.analysis import analyse; from robudget.planning import plan\n"
        "from robudget.tables import read_table\n"
        "found = analyse(read_table(sys.argv[1]), resamples=20)\n"
        "plan(sys.argv[1], budget='1e18flops', predictor=found.predictor)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "runs.csv")], check=True, timeout=120)


@pytest.mark.parametrize("bins", [10, 15, 19, 25])
def test_what_the_binned_forms_say_of_the_price_is_near_the_frontiers(paper, found, bins):
    """Within a factor of 3 of one another and of the frontier's, or refused as beyond what was tested."""
    forms = fit_forms(envelope(paper, bins=bins), PRICED_FORMS, resamples=0)
    cost, one = average(forms).cost_at(found.prices[0].target).value, found.prices[0]
    assert cost > one.limit or 1 / 3 < cost / one.value < 3
