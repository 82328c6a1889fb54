"""Metering end to end without hardware: recordings through the same sources."""

import json
import math

import pytest

from robudget.meter.replay import Replay

SECONDS = [float(t) for t in range(0, 601)]


def recording(**columns):
    return {"seconds": SECONDS, **columns}


def test_counter_and_integrated_power_agree_on_a_long_window() -> None:
    watts = [250 + 50 * math.sin(t / 7) for t in SECONDS]
    joules = [250 * t + 350 * (1 - math.cos(t / 7)) for t in SECONDS]
    found = []
    for columns in ({"gpu_joules": joules}, {"gpu_watts": watts}):
        replay = Replay(recording(**columns, gpu_processes=1))
        with replay.meter.window("train") as window:
            replay.advance(600)
        assert window.energy.how == "measured"
        assert window.energy.shared is False
        assert window.energy.seconds == 600
        found.append(window.energy.kwh)
    assert found[0] == pytest.approx(joules[-1] / 3.6e6)
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_a_package_counter_that_wraps_is_shared_by_cpu_time() -> None:
    # 100 W over 600 s = 60 kJ through a counter of 7 kJ; this process has a quarter of the busy CPU time.
    replay = Replay(
        recording(
            package_joules=[100 * t % 7000 for t in SECONDS],
            package_wraps_at=7000,
            process_cpu_seconds=[0.5 * t for t in SECONDS],
            machine_cpu_seconds=[2.0 * t for t in SECONDS],
            memory_watts=40,
        )
    )
    with replay.meter.window("train") as window:
        replay.advance(600)
    cpu, memory = window.energy.parts
    assert cpu.kwh == pytest.approx(15_000 / 3.6e6)
    assert cpu.raw["rapl_package-0_joules"] == pytest.approx(60_000)
    assert memory.kwh == pytest.approx(40 * 600 / 4 / 3.6e6)
    assert not window.energy.notes


def test_missing_samples_leave_the_whole_known_and_what_begins_in_them_unknown() -> None:
    joules = [None if 100 <= t < 200 else 300 * t for t in SECONDS]
    replay = Replay(recording(gpu_joules=joules))
    with replay.meter.window("run") as run:
        replay.advance(150)
        with replay.meter.window("epoch") as epoch:
            replay.advance(150)
        replay.advance(300)
    assert run.energy.kwh == pytest.approx(300 * 600 / 3.6e6)
    assert math.isnan(epoch.energy.kwh)
    assert epoch.energy.how == "unknown"
    assert "NVML: the counter could not be read" in run.energy.notes


def test_a_gpu_that_vanishes_leaves_nan_and_a_note() -> None:
    replay = Replay(
        recording(
            gpu_joules=[300 * t if t < 400 else None for t in SECONDS],
            memory_watts=10,
            process_cpu_seconds=SECONDS,
            machine_cpu_seconds=SECONDS,
        )
    )
    with replay.meter.window("before") as before:
        replay.advance(300)
    with replay.meter.window("train") as window:
        replay.advance(300)
    gpu, memory = window.energy.parts
    assert before.energy.how == "measured"
    assert math.isnan(window.energy.kwh)
    assert gpu.how == "unknown"
    assert memory.kwh == pytest.approx(10 * 300 / 3.6e6)
    assert window.energy.notes


def test_a_driver_reset_is_unknown_only_for_windows_across_it() -> None:
    replay = Replay(recording(gpu_joules=[300 * t if t < 250 else 300 * (t - 250) for t in SECONDS]))
    energies = []
    for _ in range(3):
        with replay.meter.window("epoch") as window:
            replay.advance(200)
        energies.append(window.energy)
    assert [e.how for e in energies] == ["measured", "unknown", "measured"]
    assert any("was reset" in note for note in energies[1].notes)
    assert not energies[2].notes


def test_several_runs_on_one_gpu_are_flagged() -> None:
    replay = Replay(recording(gpu_joules=[300 * t for t in SECONDS], gpu_processes=2))
    with replay.meter.window("train") as window:
        replay.advance(10)
    assert window.energy.shared is True


def test_a_recording_is_a_json_file(tmp_path) -> None:
    path = tmp_path / "recording.json"
    path.write_text(json.dumps(recording(gpu_joules=[None, *(100 * t for t in SECONDS[1:])])))
    replay = Replay.load(path)
    replay.advance(1)
    with replay.meter.window("train") as window:
        replay.advance(36)
    assert window.energy.kwh == pytest.approx(1e-3)
