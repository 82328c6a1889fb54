"""Counters that wrap, are reset or fall silent; power that is sampled."""

import math

import pytest

from robudget.meter.counters import Counter, Integral, without_mirrors


class Hardware:
    """A register and a clock that the test sets."""

    def __init__(self, value: float | None = 0.0) -> None:
        self.value, self.now = value, 0.0

    def read(self) -> float | None:
        return self.value

    def clock(self) -> float:
        return self.now

    def counter(self, wraps_at: float | None = 1000.0, max_watts: float = 20.0) -> Counter:
        return Counter("c", self.read, self.clock, wraps_at=wraps_at, max_watts=max_watts)

    def after(self, seconds: float, value: float | None) -> None:
        self.now += seconds
        self.value = value


def test_counts_from_where_it_was() -> None:
    hw = Hardware(500)
    counter = hw.counter()
    hw.after(10, 550)
    assert counter.total() == 50


def test_wrap_around() -> None:
    hw = Hardware(950)
    counter = hw.counter()
    hw.after(10, 30)
    assert counter.total() == 80
    assert counter.lost == 0
    assert not counter.notes


def test_many_wraps_read_in_time() -> None:
    hw = Hardware(0)
    counter = hw.counter()
    for step in range(1, 500):
        hw.after(10, step * 130 % 1000)
        counter.total()
    assert counter.total() == 499 * 130
    assert counter.lost == 0


def test_unread_for_so_long_that_it_may_have_wrapped_twice() -> None:
    hw = Hardware(0)
    counter = hw.counter()
    assert counter.patience_seconds == 50
    hw.after(51, 10)
    counter.total()
    assert counter.lost == 1
    assert "may have wrapped more than once" in counter.notes[0]


def test_a_reset_is_no_wrap() -> None:
    hw = Hardware(500)
    counter = hw.counter()
    hw.after(1, 3)  # as a wrap it would be 503 J in a second, and it cannot draw more than 20 W
    assert counter.total() == 3
    assert counter.lost == 1
    assert "was reset" in counter.notes[0]


def test_a_counter_that_does_not_wrap_only_resets() -> None:
    hw = Hardware(500)
    counter = hw.counter(wraps_at=None)
    assert counter.patience_seconds == math.inf
    hw.after(1e6, 1e9)
    assert counter.total() == 1e9 - 500
    hw.after(1, 7)
    assert counter.total() == 1e9 - 500 + 7
    assert counter.lost == 1


def test_a_missing_sample_is_made_up_for_by_the_next() -> None:
    hw = Hardware(100)
    counter = hw.counter()
    hw.after(5, None)
    assert math.isnan(counter.total())
    assert math.isnan(counter.total())
    hw.after(5, 160)
    assert counter.total() == 60
    assert counter.lost == 0
    assert counter.notes == ["c: the counter could not be read"]


def test_a_counter_silent_from_the_start_begins_when_it_speaks() -> None:
    hw = Hardware(None)
    counter = hw.counter()
    assert math.isnan(counter.total())
    hw.after(5, 700)
    assert counter.total() == 0
    hw.after(5, 750)
    assert counter.total() == 50


def test_power_is_integrated_by_trapezia() -> None:
    hw = Hardware(100)
    integral = Integral("p", hw.read, hw.clock)
    for _ in range(10):
        hw.after(0.5, hw.value + 20)
        integral.sample()
    assert integral.sample() == pytest.approx((100 + 300) / 2 * 5)


def test_a_short_gap_is_bridged_and_a_long_one_is_lost() -> None:
    hw = Hardware(100)
    integral = Integral("p", hw.read, hw.clock, gap_seconds=5)
    hw.after(1, None)
    assert math.isnan(integral.sample())
    hw.after(1, 100)
    assert integral.sample() == 200
    assert integral.lost == 0
    hw.after(60, 100)
    assert integral.sample() == 200
    assert integral.lost == 1
    hw.after(-1, 100)  # a clock that steps back is a gap too
    assert integral.sample() == 200
    assert integral.lost == 2


def test_mirrored_dies_are_counted_once() -> None:
    assert without_mirrors([1000.0, 1000.5, 2000.0, 2000.2]) == [0, 2]
    assert without_mirrors([1000.0, 3000.0]) == [0, 1]
    assert without_mirrors([0.0, 0.0]) == [0, 1]  # just reset: nothing can be said
