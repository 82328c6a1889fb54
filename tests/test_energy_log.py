"""What a run has spent survives its kill, and is counted once."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from robudget.energy_log import EnergyLog
from robudget.meter.energy import How, Meter, Reading
from robudget.store import RunFolder


class Watch:
    """A machine that draws 1 kW, and its clock."""

    name, method, uncertainty = "machine", "a test's", 0.0
    how: How = "measured"

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> Reading:
        return Reading(1000 * self.now)

    def close(self) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def watch() -> Watch:
    return Watch()


def opened(folder: RunFolder, watch: Watch, rank: int = 0) -> EnergyLog:
    meter = Meter([watch], clock=lambda: watch.now)
    return EnergyLog(folder, meter, rank=rank, note_seconds=1e6)  # notes are taken by hand


def kwh(seconds: float) -> float:
    return seconds / 3600


def test_closed_windows_add_up_and_inner_ones_are_part_of_them(folder: RunFolder, watch: Watch) -> None:
    with opened(folder, watch) as ledger:
        for _ in range(2):
            with ledger.window("training"):
                watch.now += 3
                with ledger.window("train"):
                    watch.now += 4
        with ledger.window("evaluation", evaluation="a"):
            watch.now += 100
        with ledger.window("evaluation", evaluation="b"):
            watch.now += 200
        assert ledger.total("training").kwh == pytest.approx(kwh(14))
        assert ledger.total("evaluation", evaluation="a").kwh == pytest.approx(kwh(100))
        assert ledger.total("evaluation", evaluation="b").seconds == 200
        assert math.isnan(ledger.total("evaluation", evaluation="c").kwh)
    assert [e["window"] for e in folder.events("energy")].count("training/train") == 2
    assert not (folder.path / "energy.json").exists()


@pytest.mark.parametrize("kills", [1, 3])
def test_a_kill_loses_what_came_after_the_last_note(folder: RunFolder, watch: Watch, kills: int) -> None:
    killed = []  # kept alive, since a window that is thrown away would be closed
    for _ in range(kills):
        ledger = opened(folder, watch)
        window = ledger.window("training")
        window.__enter__()
        watch.now += 20
        ledger._note()
        watch.now += 2  # lost
        killed.append((ledger, window))
    with opened(folder, watch) as ledger:
        with ledger.window("training"):
            watch.now += 5
        assert ledger.total("training").kwh == pytest.approx(kwh(20 * kills + 5))
        assert ledger.total("training").seconds == 20 * kills + 5
    interrupted = [e for e in folder.events("energy") if e.get("interrupted")]
    assert len(interrupted) == kills


def test_the_passes_of_a_killed_attempt_are_known_and_lost(folder: RunFolder, watch: Watch) -> None:
    """Up to its last note, less what its checkpoint kept; one that ended by itself lost what it had not saved."""
    made = {"craft_forward": 0}
    killed = opened(folder, watch)
    window = killed.window("training", calls=lambda: made)
    window.__enter__()
    made["craft_forward"] = 70
    killed._note()
    made["craft_forward"] = 75  # lost without a trace
    made = {"craft_forward": 40}  # of the checkpoint
    with opened(folder, watch) as ledger:
        with pytest.raises(ZeroDivisionError), ledger.window("training", calls=lambda: made):  # noqa: PT012
            made["craft_forward"] = 60
            raise ZeroDivisionError
        made = {"craft_forward": 50}
        with ledger.window("training", calls=lambda: made):
            made["craft_forward"] = 100
        lost = ledger.lost("training", {"craft_forward": 100})
    assert (lost.calls, lost.how) == ({"craft_forward": 40}, "counted")  # 30 of the first attempt, 10 of the second


def test_of_attempts_that_logged_no_passes_the_lost_ones_are_estimated(folder: RunFolder, watch: Watch) -> None:
    killed = opened(folder, watch)
    window = killed.window("training")
    window.__enter__()
    watch.now += 20
    killed._note()
    with opened(folder, watch) as ledger:
        with ledger.window("training"):
            watch.now += 80
        lost = ledger.lost("training", {"update_forward": 100})
    assert (lost.calls, lost.how) == ({"update_forward": 25}, "estimated")


def test_a_note_whose_window_was_closed_after_all_counts_once(folder: RunFolder, watch: Watch) -> None:
    with opened(folder, watch) as ledger:
        with ledger.window("training"):
            watch.now += 7
            ledger._note()
            note = (folder.path / "energy.json").read_text()
        (folder.path / "energy.json").write_text(note)  # killed between the log's line and the removal
    with opened(folder, watch) as again:
        assert again.total("training").kwh == pytest.approx(kwh(7))
    assert not (folder.path / "energy.json").exists()


def test_an_exception_closes_the_window(folder: RunFolder, watch: Watch) -> None:
    with opened(folder, watch) as ledger:
        with pytest.raises(ZeroDivisionError), ledger.window("training"):  # noqa: PT012
            watch.now += 9
            raise ZeroDivisionError
        assert ledger.total("training").kwh == pytest.approx(kwh(9))


def test_processes_are_billed_side_by_side(folder: RunFolder, watch: Watch) -> None:
    ledgers = [opened(folder, Watch(), rank) for rank in range(2)]
    for rank, (ledger, seconds) in enumerate(zip(ledgers, (10, 12), strict=True)):
        with ledger, ledger.window("training"):
            ledger._meter.sources[0].now += seconds  # type: ignore[attr-defined]
        assert folder.ranks()[-1] == rank
    whole = ledgers[0].total("training")
    assert whole.kwh == pytest.approx(kwh(22))
    assert whole.seconds == 12


def test_the_thread_takes_notes_by_itself(folder: RunFolder) -> None:
    watch = Watch()
    with EnergyLog(folder, Meter([watch], clock=lambda: watch.now), note_seconds=0.01) as ledger:
        with ledger.window("training"):
            watch.now = 30.0
            wait = threading.Event()
            for _ in range(1000):
                path = folder.path / "energy.json"
                if path.exists() and json.loads(path.read_text())["seconds"] == 30:
                    break
                wait.wait(0.01)
            else:
                pytest.fail("no note was taken")
        assert ledger.total("training").seconds == 30
