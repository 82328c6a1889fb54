"""A slice of the coverage study in bench/laws.py, which takes 200 tables per form: here a few dozen.

Of 24 intervals that cover 95% of the time, 19 or more hold the truth in 99.7% of studies.
"""

import pytest

REPEATS = 24
FEWEST = 19


@pytest.mark.parametrize(("form", "short"), [("power", "exponential"), ("saturating", "sparse"), ("broken", "bimodal")])
def test_intervals_cover(form, short, bench):
    hits = [bench.covered(form, seed, short, 150) for seed in range(REPEATS)]
    for name in hits[0]:
        assert sum(hit[name] for hit in hits) >= FEWEST, name


def test_the_truths_are_what_they_say(bench):
    for form in bench.TRUTH:
        cost = bench.true_cost(form, 59.0)
        assert bench.true_accuracy(form, [cost])[0] == pytest.approx(59, abs=0.01)
    assert bench.true_cost("saturating", 63) == float("inf")


@pytest.mark.parametrize("kind", ["half-normal", "exponential", "clusters", "uniform"])
def test_the_frontier_covers_the_planted_exponent(kind, bench):
    """Of 8 intervals that cover 95% of the time, 6 or more hold the truth in 99.4% of studies."""
    hits = [bench.frontier_covered(kind, 60, 8, seed) for seed in range(8)]
    for name in ("α", "band at the top", "price"):
        assert sum(hit[name] for hit in hits) >= 6, name
