"""Wilson's interval against its published values and its properties."""

import math

import pytest

from robudget.accuracy import wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Newcombe 1998, table I, method 3 (the score method without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_values(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_it_contains_the_share_and_stays_in_the_unit_interval():
    for n in (1, 7, 200):
        for k in range(n + 1):
            low, high = wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1
            mirrored = wilson(n - k, n)
            assert mirrored == pytest.approx((1 - high, 1 - low))


def test_more_images_or_less_confidence_is_narrower():
    def width(*a):
        return wilson(*a)[1] - wilson(*a)[0]

    assert width(50, 100) > width(500, 1000) > width(500, 1000, 0.5)


def test_nothing_is_known_of_nothing():
    assert all(math.isnan(end) for end in wilson(0, 0))


def test_impossible_counts():
    for bad in ((5, 4), (-1, 4), (1, 2, 1.0)):
        with pytest.raises(ValueError, match="outside"):
            wilson(*bad)
