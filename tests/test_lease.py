"""Leases: one owner at a time, dead and silent ones are followed, and who comes back too late writes nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robudget import files, lease
from robudget.lease import Busy, LeaseLost, Observer, read, take
from robudget.store import RunFolder


def leases(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".lease-*"))


def elsewhere(folder: Path) -> None:
    """Make the newest lease that of a process on another host."""
    path = folder / leases(folder)[-1]
    beat, _, owner = path.read_text().partition("\n")
    path.write_text(f"{beat}\n{json.dumps(json.loads(owner) | {'where': 'another host', 'host': 'node-7'})}\n")


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_numbers_grow_and_old_leases_are_cleaned(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        mine = take(tmp_path)
        assert leases(tmp_path) == [f".lease-{number}"]
        with pytest.raises(Busy, match=f"another process .process {os.getpid()} on"):
            take(tmp_path)
        mine.release()
        entry = read(tmp_path)
        assert entry is not None
        assert entry.released
        assert entry.free


def _hold(path: Path, ready: multiprocessing.synchronize.Event) -> None:
    with RunFolder(path).lock():
        ready.set()
        signal.pause()


def test_a_dead_owner_of_this_host_is_followed_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(10)
    assert holder.pid is not None
    with pytest.raises(Busy):
        take(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (entry := read(tmp_path)) is not None and not entry.free and time.monotonic() < deadline:
        time.sleep(0.01)  # not collected yet: a process that has ended must not count as one that lives
    take(tmp_path).release()
    holder.join(10)


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    take(tmp_path)
    path = tmp_path / ".lease-1"
    beat, _, owner = path.read_text().partition("\n")
    path.write_text(f"{beat}\n{json.dumps(json.loads(owner) | {'started': '17'})}\n")
    take(tmp_path).release()
    files.unguard(tmp_path)


def test_silence_is_judged_by_the_observers_own_time(tmp_path: Path) -> None:
    mine = take(tmp_path)
    elsewhere(tmp_path)
    clock = Time()
    observer = Observer(clock)
    step = lease.BEAT_SECONDS
    for beat in range(100):  # as long as it moves it is alive, however long that is
        mine._write(f"{beat:012}")
        assert observer.look(tmp_path) == (False, 0)
        clock.now += step
    assert observer.look(tmp_path) == (False, 0)
    clock.now += 1e6  # the observer itself was paused: that says nothing of the owner
    assert observer.look(tmp_path) == (False, 0)
    for _ in range(round(lease.STALE_SECONDS / step)):
        clock.now += step
        free = observer.look(tmp_path)
    assert free == (True, 1)
    files.unguard(tmp_path)


def test_who_was_followed_writes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with folder.lock() as late:
        folder.log("epoch", epoch=1)
        files.write_json(folder.path / "a.json", {"x": 1})
        elsewhere(folder.path)
        late.entry.owner.update(json.loads((folder.path / ".lease-1").read_text().partition("\n")[2]))
        files.unguard(folder.path)
        other = take(folder.path, over=1)
        files.unguard(folder.path)
        files.guard(folder.path, late.check)
        before = {path: path.read_bytes() for path in folder.path.iterdir()}
        for write in (
            lambda: folder.log("epoch", epoch=2),
            lambda: files.write_json(folder.path / "a.json", {"x": 2}),
            lambda: files.write_json(folder.path / "evals" / "b.json", {"x": 2}),
            lambda: files.make_folder(folder.path / "evals"),
            lambda: folder.finish({}),
        ):
            with pytest.raises(LeaseLost, match="has taken it over; nothing more is written"):
                write()
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before
    assert leases(folder.path) == [".lease-2"]
    files.guard(folder.path, other.check)
    folder.log("epoch", epoch=2)
    other.release()


PAUSED = """
import os, signal, sys
from pathlib import Path
from robudget import files
from robudget.store import RunFolder
folder = RunFolder(Path(sys.argv[1]))
with folder.lock():
    folder.log("epoch", epoch=1)
    os.kill(os.getpid(), signal.SIGSTOP)
    for write in (
        lambda: folder.log("epoch", epoch=2),
        lambda: files.write_json(folder.path / "a.json", {}),
        lambda: folder.finish({}),
    ):
        try:
            write()
        except Exception as error:
            print(type(error).__name__)
"""


def test_a_paused_process_that_comes_back_writes_nothing(tmp_path: Path) -> None:
    late = subprocess.Popen([sys.executable, "-c", PAUSED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    os.waitpid(late.pid, os.WUNTRACED)  # it has paused
    with pytest.raises(Busy):
        take(tmp_path)  # paused is not dead
    mine = take(tmp_path, over=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    late.send_signal(signal.SIGCONT)
    assert late.communicate(timeout=60)[0].split() == ["LeaseLost"] * 3
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    mine.release()


def test_no_clock_of_the_day_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that those of two machines may differ by a minute, or a day."""

    def refuse() -> float:
        raise AssertionError

    monkeypatch.setattr(time, "time", refuse)
    mine = take(tmp_path)
    elsewhere(tmp_path)
    clock = Time()
    observer = Observer(clock)
    for beat, hours in enumerate((-24, 0, 1, 24)):
        mine._write(f"{beat:012}")
        os.utime(tmp_path / ".lease-1", (3600.0 * (24 + hours),) * 2)
        assert observer.look(tmp_path) == (False, 0)
        clock.now += lease.BEAT_SECONDS
    while observer.look(tmp_path) == (False, 0):
        clock.now += lease.BEAT_SECONDS
    assert 12 * lease.BEAT_SECONDS <= clock.now <= 18 * lease.BEAT_SECONDS
    files.unguard(tmp_path)
    take(tmp_path, over=1).release()


def test_a_store_that_is_away_is_not_a_lost_lease(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "store" / "run")
    folder.path.mkdir(parents=True)
    with folder.lock():
        (tmp_path / "store").rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError):
            files.make_folder(folder.path / "evals")
        assert not folder.path.exists()
        (tmp_path / "away").rename(tmp_path / "store")
        folder.log("epoch", epoch=1)


RACE = """
import sys, time
from pathlib import Path
from robudget.lease import Busy, take
folder, won = Path(sys.argv[1]), 0
inside = folder / "inside"
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        mine = take(folder)
    except Busy:
        continue
    inside.open("x").close()  # raises where two are in
    won += 1
    inside.unlink()
    mine.release()
print(won)
"""


def test_of_many_that_try_at_once_one_wins(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    won = [int(racer.communicate(timeout=120)[0]) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers)
    assert sum(won) > 3
    assert len(leases(tmp_path)) == 1


def test_a_run_of_another_host_is_watched_until_it_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.05)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    mine = take(tmp_path)
    with pytest.raises(Busy):
        Observer().wait(tmp_path)  # of this host, and alive
    mine._ended.set()
    elsewhere(tmp_path)
    assert Observer().wait(tmp_path) == 1
    files.unguard(tmp_path)
