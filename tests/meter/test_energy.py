"""Windows: nesting, exceptions, sums, JSON, carrying on; and one bill for two processes."""

import json
import math
import os
import subprocess
import sys
import time

import pytest

from robudget.files import to_plain
from robudget.meter.energy import Energy, Meter, Part, Reading
from robudget.meter.machine import open_meter


class Steady:
    """A source of `watts` on a clock that the test sets."""

    how = "measured"
    method = "made up"
    uncertainty = 0.1

    def __init__(self, clock, watts=100.0, name="gpu"):
        self.clock, self.watts, self.name = clock, watts, name

    def read(self):
        return Reading(self.clock.now * self.watts, {"joules": self.clock.now * self.watts})

    def close(self):
        pass


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def metered():
    clock = Clock()
    return clock, Meter([Steady(clock)], clock=clock)


def test_windows_nest_and_say_where() -> None:
    clock, meter = metered()
    with meter.window("run") as run:
        clock.now += 10
        with meter.window("train") as train:
            clock.now += 36
            assert train.energy.kwh == pytest.approx(1e-3)  # 3,600 J so far, while it is open
        clock.now += 26
    assert (run.name, train.name) == ("run", "run/train")
    assert train.energy.kwh == pytest.approx(1e-3)
    assert train.energy.seconds == 36
    assert run.energy.kwh == pytest.approx(2e-3)
    clock.now += 100
    assert run.energy.kwh == pytest.approx(2e-3)
    assert run.energy.parts[0].raw == {"joules": pytest.approx(7200)}


def test_a_window_survives_what_is_raised_inside() -> None:
    clock, meter = metered()
    kept = []

    def fail() -> None:
        with meter.window("outer") as outer, meter.window("inner") as inner:
            kept.extend((outer, inner))
            clock.now += 36
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    outer, inner = kept
    assert inner.energy.kwh == outer.energy.kwh == pytest.approx(1e-3)
    with meter.window("next") as after:
        pass
    assert after.name == "next"


def test_the_device_is_synchronised_first_and_may_die() -> None:
    clock = Clock()

    def finish() -> None:
        clock.now += 5  # what was queued

    waiting = Meter([Steady(clock)], synchronise=finish, clock=clock)
    with waiting.window("train") as window:
        clock.now += 1
    assert window.energy.seconds == 6

    def gone() -> None:
        raise RuntimeError("CUDA error: device lost\nand much more")

    broken = Meter([Steady(clock)], synchronise=gone, clock=clock)
    with broken.window("train") as window:
        clock.now += 1
    assert window.energy.notes == ("the device could not be synchronised: CUDA error: device lost",)


def test_a_clock_that_steps_back_is_noted() -> None:
    clock, meter = metered()
    clock.now = 50
    with meter.window("train") as window:
        clock.now = 40
    assert math.isnan(window.energy.seconds)
    assert "the clock went back by 10 s" in window.energy.notes


def test_a_killed_run_carries_on_and_nothing_counts_twice() -> None:
    clock, meter = metered()
    with meter.window("train") as straight:
        clock.now += 108
    log = []
    for _ in range(3):  # three attempts of 36 s
        with meter.window("train") as window:
            clock.now += 36
            log.append(json.dumps(to_plain(window.energy.to_dict())))
    first, second, third = (Energy.from_dict(json.loads(line)) for line in log)
    whole = first + second + third
    assert whole.kwh == pytest.approx(straight.energy.kwh)
    assert whole.seconds == pytest.approx(straight.energy.seconds)
    assert whole.parts[0].raw["joules"] == pytest.approx(straight.energy.parts[0].raw["joules"])


def part(name: str, kwh: float, how="measured", uncertainty=0.1) -> Part:
    return Part(name, kwh, how, "made up", uncertainty)


def test_how_is_measured_only_where_most_was() -> None:
    assert Energy(1, (part("gpu", 0.95), part("cpu", 0.05, "estimated"))).how == "measured"
    assert Energy(1, (part("gpu", 0.8), part("cpu", 0.2, "estimated"))).how == "estimated"
    unknown = Energy(1, (part("gpu", math.nan, "unknown"), part("cpu", 0.2)))
    assert unknown.how == "unknown"
    assert math.isnan(unknown.kwh)
    assert math.isnan(Energy(1, ()).kwh)


def test_errors_add_up_and_methods_are_kept() -> None:
    whole = Energy(1, (part("gpu", 3, uncertainty=0.1), part("cpu", 1, "estimated", 0.5)))
    assert whole.uncertainty == pytest.approx((0.3 + 0.5) / 4)
    twice = whole + whole
    assert (twice.kwh, twice.seconds) == (8, 2)
    assert twice.uncertainty == pytest.approx(whole.uncertainty)
    assert twice.method == "gpu: made up; cpu: made up"
    ranks = whole.beside(Energy(3, (part("gpu", 3),), shared=True))
    assert (ranks.kwh, ranks.seconds, ranks.shared) == (7, 3, True)
    other = part("gpu", 1) + Part("gpu", 1, "estimated", "TDP", 0.4)
    assert (other.how, other.method) == ("estimated", "made up; then TDP")


def test_json_round_trip_keeps_nan() -> None:
    energy = Energy(math.nan, (part("gpu", math.nan, "unknown"),), ("a note",), shared=False)
    again = Energy.from_dict(json.loads(json.dumps(to_plain(energy.to_dict()))))
    assert math.isnan(again.kwh)
    assert math.isnan(again.seconds)
    assert (again.notes, again.shared, again.how) == (("a note",), False, "unknown")


# -- on this machine --------------------------------------------------------------------------------------------------


def busy(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        sum(range(1000))


def test_this_machines_cpu_is_billed_by_cpu_time_and_says_estimated_or_measured() -> None:
    with open_meter("cpu") as opened, opened.window("work") as window:
        busy(0.2)
    energy = window.energy
    names = [p.name for p in energy.parts]
    assert names == ["cpu", "memory"]
    assert energy.kwh > 0
    cpu = energy.parts[0]
    assert cpu.how == ("measured" if "RAPL package" in cpu.method else "estimated")
    if "cpu_seconds" in cpu.raw:
        assert 0.2 <= cpu.raw["cpu_seconds"] < 2
    assert energy.parts[1].how == "estimated"
    assert 0 < energy.uncertainty <= 1


def test_no_threads_on_a_cpu_without_rapl() -> None:
    import threading

    from robudget.meter.cpu import NoRapl, open_counters

    try:
        open_counters()
    except NoRapl:
        before = threading.active_count()
        with open_meter("cpu"):
            assert threading.active_count() == before


def test_users_watts() -> None:
    threads = os.cpu_count()
    with open_meter("cpu", cpu_watts=36.0 * threads) as opened, opened.window("work") as window:
        busy(0.1)
    cpu = window.energy.parts[0]
    if "RAPL package" not in cpu.method:  # the user's figure is for where nothing can be read
        assert "the user's" in cpu.method
        assert cpu.kwh == pytest.approx(cpu.raw["cpu_seconds"] * 1e-5)


WORKER = """
import json, sys, time
from robudget.meter.machine import open_meter
with open_meter("cpu") as opened, opened.window("work") as window:
    begun = time.process_time()
    print("ready", flush=True)
    while time.process_time() - begun < 1.5:
        sum(range(1000))
print(json.dumps(window.energy.to_dict()))
"""


def test_two_processes_side_by_side_add_up_to_one_bill() -> None:
    from robudget.meter.cpu import cpu_power, memory_watts

    begun = time.monotonic()
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    energies = [Energy.from_dict(json.loads(w.communicate(timeout=120)[0].splitlines()[-1])) for w in workers]
    wall = time.monotonic() - begun
    cpu, memory = ([e.parts[i].kwh for e in energies] for i in (0, 1))
    if "RAPL package" not in energies[0].method:
        # Each is billed for its own CPU time (1.5 s of one thread), whatever the other does.
        for kwh in cpu:
            assert kwh * 3.6e6 == pytest.approx(1.5 * cpu_power().watts_per_thread, rel=0.2)
    # The machine's memory is billed once: two shares of it never exceed it. (10% for the kernel's ticks.)
    assert sum(memory) * 3.6e6 <= memory_watts() * wall * 1.1
    assert all(kwh > 0 for kwh in memory)


def test_no_sockets() -> None:
    code = """
import socket, sys
def refused(*args, **kwargs):
    raise AssertionError("a socket was asked for")
socket.socket = socket.create_connection = socket.getaddrinfo = refused
from robudget.meter import prices
from robudget.meter.machine import open_meter
with open_meter("cpu") as opened, opened.window("work") as window:
    sum(range(10**6))
assert window.energy.kwh > 0
assert prices.Prices.load("FRA").gco2e_per_kwh < 200
assert len(prices.grids()) > 200
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_the_plug_adds_is_a_part_of_its_own() -> None:
    clock = Clock()
    meter = Meter([Steady(clock), Steady(clock, 50.0, "cpu")], clock=clock, overhead=1.2)
    with meter.window("train") as window:
        clock.now += 36
    energy = window.energy
    assert [part.name for part in energy.parts] == ["gpu", "cpu", "overhead"]
    assert energy.kwh == pytest.approx(1.2 * 1.5e-3)
    assert energy.parts[-1].how == "estimated"
    assert "the user's factor 1.2" in energy.parts[-1].method
    assert (energy + energy).kwh == pytest.approx(2 * energy.kwh)
