"""Every analysis finds an effect that was planted in a made-up table, and finds none where there is none as often as it
says it does."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from robudget.answers.amounts import amounts
from robudget.answers.answer import TooFewRuns, usable
from robudget.answers.comparison import changes, comparison
from robudget.answers.exponents import exponents
from robudget.answers.forecast import forecast
from robudget.answers.ranking import ranking

REPEATS = 400


def table(x: Any, y: Any, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {"loss": "at", "status": "done", "train_flops_exact": x, "aa_acc": y, "clean_acc": 60.0} | columns
    )


def law_table(
    rng: np.random.Generator, slopes: dict[str, float], noise: float = 0.01
) -> tuple[pd.DataFrame, list[str]]:
    """Error = 60%·(x/1e12)^−slope by group, with noise of the log."""
    x = np.tile(np.geomspace(1e11, 1e13, 6), len(slopes))
    group = [name for name in slopes for _ in range(6)]
    slope = np.array([slopes[name] for name in group])
    error = 60 * (x / 1e12) ** -slope * 10 ** rng.normal(0, noise, len(x))
    return table(x, 100 - error), group


def rejected(share: float, n: int, nominal: float = 0.05) -> bool:
    """Whether a share of n is within four standard errors of the nominal rate."""
    return abs(share - nominal) < 4 * np.sqrt(nominal * (1 - nominal) / n)


def test_exponents_recovers_a_planted_difference() -> None:
    runs, group = law_table(np.random.default_rng(0), {"1": 0.05, "10": 0.10})
    found = exponents(runs, group, "steps")
    assert found.verdict == "yes"
    assert [row["low"] < true < row["high"] for row, true in zip(found.rows, (0.05, 0.10), strict=True)] == [True, True]
    assert "differ between the 2 alternatives of steps" in found.sentence
    assert "12 runs" in found.sentence


def test_a_band_ends_at_an_accuracy_of_0() -> None:
    runs = table([1e8, 3e8, 1e9] * 2, [2.0, 30.0, 40.0, 1.0, 5.0, 30.0], collapsed=False)
    lines = exponents(runs, ["a"] * 3 + ["b"] * 3).lines.values()
    assert [line.low.min() for line in lines] == [0, 0]
    assert all((line.low <= line.y).all() and (line.y <= line.high).all() for line in lines)


def test_exponents_of_equal_groups_differ_at_the_nominal_rate_and_are_covered() -> None:
    rng, yes, covered = np.random.default_rng(1), 0, 0
    for _ in range(REPEATS):
        found = exponents(*law_table(rng, dict.fromkeys("abc", 0.08)))
        yes += found.verdict == "yes"
        covered += found.rows[0]["low"] < 0.08 < found.rows[0]["high"]
    assert rejected(yes / REPEATS, REPEATS)
    assert rejected(1 - covered / REPEATS, REPEATS)


def test_exponents_compare_levels_only_where_all_were_run() -> None:
    near, far = np.geomspace(1e8, 1e10, 6), np.geomspace(1e12, 1e14, 6)
    apart = exponents(table(np.concatenate([near, far]), np.linspace(20, 50, 12)), ["a"] * 6 + ["b"] * 6)
    assert "No compute is common to all 2" in apart.sentence
    assert [np.isnan(row["accuracy at equal compute"]) for row in apart.rows] == [True, True]
    shared = exponents(table(np.concatenate([near, near * 90]), np.linspace(20, 50, 12)), ["a"] * 6 + ["b"] * 6)
    assert "At 9.5e+09 FLOP" in shared.sentence


def test_comparison_finds_the_best_and_none_among_equals_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(2)
    group = [name for name in "abcd" for _ in range(4)]
    better = np.array([3.0 if name == "c" else 0.0 for name in group])
    found = comparison(table(1e12, 40 + better + rng.normal(0, 0.5, 16)), group, "method")
    assert found.verdict == "yes"
    assert found.rows[0]["method"] == "c"
    worse = found.sentence.split("worse than it: ")[1].split(". ")[0]
    assert sorted(worse.split(", ")) == ["a", "b", "d"]
    yes = sum(comparison(table(1e12, 40 + rng.normal(0, 0.5, 16)), group).verdict == "yes" for _ in range(REPEATS))
    # That the best of four is shown to beat the second is one of the six comparisons: at most 5% in all.
    assert yes / REPEATS < 0.05 + 4 * np.sqrt(0.05 * 0.95 / REPEATS)


def test_comparison_has_the_intervals_of_scipy_for_unequal_groups() -> None:
    rng = np.random.default_rng(7)
    samples = [rng.normal(mean, 1, n) for mean, n in ((50, 5), (47, 3), (46, 4))]
    group = [name for name, sample in zip("abc", samples, strict=True) for _ in sample]
    found = comparison(table(1e12, np.concatenate(samples)), group)
    theirs = stats.tukey_hsd(*samples).confidence_interval(0.95)
    assert f"[{theirs.low[0, 1]:.1f}, {theirs.high[0, 1]:.1f}] above b" in found.sentence


def test_changes_finds_what_moves_and_nothing_else_at_the_nominal_rate() -> None:
    rng, repeats = np.random.default_rng(3), 40
    group = [name for name in ("baseline", "a", "b", "c") for _ in range(5)]
    moved = np.array([-2.0 if name == "b" else 0.0 for name in group])
    found = changes(table(1e12, 40 + moved + rng.normal(0, 0.4, 20)), group, "change")
    assert found.verdict == "yes"
    by_name = {row["change"]: row for row in found.rows}
    assert by_name["b"]["low"] < -2 < by_name["b"]["high"] < 0
    assert by_name["a"]["low"] < 0 < by_name["a"]["high"]
    yes = sum(changes(table(1e12, 40 + rng.normal(0, 0.4, 20)), group).verdict == "yes" for _ in range(repeats))
    assert yes / repeats < 0.05 + 4 * np.sqrt(0.05 * 0.95 / repeats)


def test_changes_states_the_noise_of_seeds() -> None:
    y = np.array([40.0, 41.0, 42.0, 40.0, 41.0, 42.0])
    found = changes(table(1e12, y), ["baseline"] * 3 + ["a"] * 3)
    assert "scatter by 1.00 points" in found.sentence
    assert "3.6 points is 3.6 of these" in found.sentence


def frontier_table(rng: np.random.Generator, low: float, high: float, n: int, bend: float = 0.0) -> pd.DataFrame:
    """Runs below a frontier that rises by 5 points a decade from 20% at 1e10, and by `bend` less above 1e13."""
    u = np.log10(np.geomspace(low, high, n))
    best = 20 + 5 * (u - 10) - bend * np.maximum(u - 13, 0)
    y = best - rng.exponential(0.8, n)
    return table(10**u, y, n_eval=10_000)


def test_forecast_predicts_runs_of_its_own_law_and_refuses_others() -> None:
    rng = np.random.default_rng(4)
    below = frontier_table(rng, 1e10, 1e13, 30)
    same, other = (frontier_table(rng, 2e13, 1e14, 20, bend) for bend in (0.0, 16.0))
    found = forecast(below, same)
    assert found.verdict == "yes", found.sentence
    assert found.rows[-1]["inside"]
    refused = forecast(below, other)
    assert refused.verdict == "no", refused.sentence
    assert "It does not" in refused.sentence


def test_forecast_hides_its_own_top_decade_where_nothing_stands_beside() -> None:
    found = forecast(frontier_table(np.random.default_rng(5), 1e10, 1e14, 30))
    assert set(found.points.group) == {"fitted", "predicted"}
    assert found.points[found.points.group == "fitted"].x.max() <= 1e13
    assert found.rows[-1]["decades beyond"] == pytest.approx(1.0, abs=0.2)


def ranking_table(rng: np.random.Generator, effect: float) -> pd.DataFrame:
    rows = []
    for size in (1e5, 1e6, 1e7):
        for number, activation in enumerate(("relu", "silu", "gelu", "elu", "tanh", "selu")):
            rows.append((size, activation, size * 1e6, 40 + effect * number + rng.normal(0, 0.3)))
    frame = pd.DataFrame(rows, columns=["parameters", "activation", "train_flops_exact", "aa_acc"])
    return frame.assign(loss="at", status="done", clean_acc=90.0, model="m")


def test_ranking_finds_scales_that_choose_alike_and_none_in_noise() -> None:
    rng, repeats = np.random.default_rng(6), 40
    found = ranking(ranking_table(rng, 2.0))
    assert found.verdict == "yes"
    assert "more often than a coin" in found.sentence
    yes = sum(ranking(ranking_table(rng, 0.0)).verdict == "yes" for _ in range(repeats))
    assert yes / repeats < 0.35


def amounts_table(rng: np.random.Generator, effect: float, turn: float = 0.0) -> tuple[pd.DataFrame, Any, Any, Any]:
    """20% at 200 real images, 2 points a doubling, a second size 3 points above, and what the alternative b adds."""
    cells = [(real, name, size) for real in (100, 200, 400, 800) for name in "0ab" for size in ("s", "l")]
    real, group, size = (np.array(column) for column in zip(*cells, strict=True))
    d = np.log2(real / 200)
    y = 20 + 2 * d + 3 * (size == "l") + (group == "b") * (effect + turn * d) + rng.normal(0, 0.5, len(cells))
    return table(1e12, y, collapsed=False), group, real, size


def test_amounts_recovers_a_planted_effect_and_its_turn() -> None:
    found = amounts(*amounts_table(np.random.default_rng(8), 4.0, -2.0), "generated")
    assert found.verdict == "yes"
    assert "the best, b, moves it by" in found.sentence
    by_name = {row["generated"]: row for row in found.rows}
    assert by_name["b"]["low"] < 4.0 - 2.0 * 0.5 < by_name["b"]["high"]  # the mean of the doublings is 0.5
    assert by_name["b"]["its low"] < -2.0 < by_name["b"]["its high"] < 0
    assert by_name["a"]["low"] < 0 < by_name["a"]["high"]
    worse = amounts(*amounts_table(np.random.default_rng(8), -4.0), "generated")
    assert worse.verdict == "undecided"
    assert "shown to be worse than 0: b." in worse.sentence


def test_amounts_says_no_where_all_are_worse() -> None:
    runs, group, real, size = amounts_table(np.random.default_rng(9), -4.0)
    keep = group != "a"
    found = amounts(runs[keep].reset_index(drop=True), group[keep], real[keep], size[keep])
    assert found.verdict == "no"
    assert found.points.x.tolist() == pytest.approx(real[keep].tolist())


def test_amounts_finds_nothing_at_the_nominal_rate() -> None:
    rng, wrong, covered = np.random.default_rng(10), 0, 0
    for _ in range(REPEATS):
        rows = amounts(*amounts_table(rng, 0.0)).rows[1:]
        wrong += any(row["low"] > 0 or row["high"] < 0 for row in rows)
        covered += rows[0]["its low"] < 0 < rows[0]["its high"]
    assert wrong / REPEATS < 0.05 + 4 * np.sqrt(0.05 * 0.95 / REPEATS)
    assert rejected(1 - covered / REPEATS, REPEATS, 0.025)  # each of two intervals, by Bonferroni


def test_collapsed_runs_are_counted_apart() -> None:
    runs = table(1e12, [40.0, 41.0, 1.0, 39.0, 40.0])
    found = usable(runs, ["a", "a", "a", "b", "b"])
    assert found.collapsed == {"a": 1, "b": 0}
    assert found.notes == ("1 of 5 runs left out: collapsed",)


@pytest.mark.parametrize(
    ("analysis", "said"),
    [
        (lambda: exponents(table([1e12], [40.0]), ["a"]), "0 of 1 alternatives"),
        (lambda: comparison(table([1e12, 1e12], [40.0, 41.0]), ["a", "b"]), "0 alternatives of group have 2 runs"),
        (lambda: changes(table(1e12, [1.0, 40.0, 41.0]), ["base", "a", "a"]), "1 alternatives of group have 2 runs"),
        (lambda: forecast(table([1e12, 2e12], [40.0, 41.0])), "allowed: 4 runs at 4 levels"),
        (lambda: amounts(table(1e12, [40.0, 41.0]), ["0", "b"], [1, 2], ["", ""]), "0 alternatives of group, w"),
        (lambda: amounts(table(1e12, [40.0] * 6), ["0"] * 3 + ["b"] * 3, [1, 2, 4] * 2, [""] * 6), "6 runs do not fix"),
        (lambda: ranking(table([1e12, 2e12], [40.0, 41.0])), "too few"),
    ],
)  # fmt: skip
def test_too_few_runs_say_what_is_needed(analysis: Any, said: str) -> None:
    with pytest.raises(TooFewRuns, match=said):
        analysis()
