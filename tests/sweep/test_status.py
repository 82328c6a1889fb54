"""How the sweeps of a store stand, from the store alone; stopping them; the page."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from robudget import files, lease, stop
from robudget.errors import InputError
from robudget.recipe import Recipe
from robudget.store import RunFolder, Store
from robudget.sweep import journal
from robudget.sweep.journal import Journal, request_stop
from robudget.sweep.page import server
from robudget.sweep.status import status

Run = Callable[..., tuple[int, str, str]]
SAID = {
    "runs": 6, "done": 1, "left": 5, "left_out": 0, "retries": 0, "running": {}, "failed": {}, "seconds_left": 90.0,
    "spent": {"seconds": 10.0, "kwh": 0.5, "gpu_hours": 0.0, "usd": 0.06}, "forecast": None, "budget": None,
}  # fmt: skip


def begun(store: Path, seed: int) -> RunFolder:
    folder = Store(store).folder(recipe := Recipe().with_({"seed": seed}))
    folder.open(recipe)
    folder.log("start")
    folder.log("epoch", epoch=3, val_robust=0.25)
    folder.log("energy", window="training", kwh=0.1)
    return folder


def test_each_run_is_in_the_state_that_its_folder_shows(tmp_path: Path) -> None:
    done, running, stopped, failed, stale = (begun(tmp_path, seed) for seed in range(5))
    done.finish({})
    begun_again = stale.path / ".lease-1"
    Journal(Store(tmp_path), "study", "local").write(SAID | {"failed": {failed.path.name: "KeyError: 1\nline"}})
    with running.lock(), stale.lock():
        beat, _, owner = begun_again.read_text().partition("\n")
        begun_again.write_text(f"{beat}\n{json.dumps(json.loads(owner) | {'where': 'elsewhere', 'host': 'node-7'})}\n")
        os.utime(begun_again, (time.time() - 10 * lease.STALE_SECONDS,) * 2)
        now = status(tmp_path)
        assert {run.run: run.state for run in now.runs} == {
            done.path.name: "done",
            running.path.name: "running",
            stopped.path.name: "stopped",
            failed.path.name: "failed",
            stale.path.name: "stale",
        }
    told = {run.state: run for run in now.runs}
    assert told["running"].last == "epoch 3, validation 25.0% robust"
    assert told["running"].owner.startswith(f"process {os.getpid()} on ")
    assert told["stale"].owner.endswith(" on node-7")
    assert told["failed"].last == "KeyError: 1"
    assert now.waiting == 5 - 3
    assert [driver.over for driver in now.drivers] == [False]
    files.to_plain(now.to_dict())


def test_a_driver_that_died_is_over_and_its_file_goes_with_the_next_one(tmp_path: Path) -> None:
    code = "import sys; from robudget.store import Store; from robudget.sweep.journal import Journal;"
    code += "Journal(Store(sys.argv[1]), 'study', 'local').write({'runs': 1})"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    (driver,) = status(tmp_path).drivers
    assert driver.over
    assert not status(tmp_path).live
    Journal(Store(tmp_path), "study", "local").write(SAID)
    assert [driver.over for driver in journal.read(tmp_path)] == [False]


def test_a_stop_reaches_only_who_was_there(tmp_path: Path) -> None:
    try:
        with stop.on_file(tmp_path):
            stop.look()
            assert not stop.requested()
            request_stop(Store(tmp_path))
            stop.look()
            assert stop.requested()
        assert not stop.requested()
        with stop.on_file(tmp_path) as token:  # begun later
            stop.look()
            assert not stop.requested()
        with stop.on_file(tmp_path, ""):  # of a sweep that had begun before
            stop.look()
            assert stop.requested()
        assert token
    finally:
        stop.withdraw()


def test_the_verbs_say_it_in_words_and_as_json(tmp_path: Path, robudget_command: Run) -> None:
    begun(tmp_path, 0)
    Journal(Store(tmp_path), "study", "slurm").write(SAID)
    code, said, _ = robudget_command("status", str(tmp_path))
    assert code == 0
    assert "1 stopped, 4 not begun" in said
    assert "study on slurm (process" in said
    assert "1 of 6 runs done, about 1 min 30 s left; spent 0.5 kWh, 0.06 usd, forecast of the rest unknown" in said
    code, said, _ = robudget_command("status", str(tmp_path), "--json")
    assert json.loads(said)["waiting"] == 4
    code, said, _ = robudget_command("stop", str(tmp_path), "--wait", "0")
    assert code == 0
    assert stop.token(tmp_path)
    code, _, error = robudget_command("status", str(tmp_path / "none"))
    assert (code, error.count("\n")) == (2, 1)
    assert "no such store" in error
    code, _, error = robudget_command("stop", str(tmp_path / "none"))
    assert code == 2


def test_the_page_is_served_on_this_machine(tmp_path: Path) -> None:
    begun(tmp_path, 0)
    Journal(Store(tmp_path), "<study>", "local").write(SAID)
    with server(tmp_path, 0) as http:
        assert http.server_address[0] == "127.0.0.1"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{http.server_port}"
        with urllib.request.urlopen(f"{home}/") as answer:
            text = answer.read().decode()
        assert "&lt;study&gt; on local" in text
        assert "http-equiv=refresh" in text
        with urllib.request.urlopen(f"{home}/status.json") as answer:
            assert json.load(answer)["stopped"] == 1
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{home}/other")
        with pytest.raises(InputError, match="allowed: a free port"):
            server(tmp_path, http.server_port)
        http.shutdown()


def test_a_detached_sweep_is_stopped_from_another_shell_and_goes_on(
    tiny: Recipe, tmp_path: Path, robudget_command: Run
) -> None:
    study = tmp_path / "study.yaml"
    long = tiny.with_({"epochs": 300})
    study.write_text(f"base: {json.dumps(long.to_dict())}\naxes:\n  seed: {{a: {{seed: 0}}, b: {{seed: 1}}}}\n")
    store = tmp_path / "runs"
    words = ["sweep", str(study), "device=cpu", "threads=1", "--store", str(store), "--workers", "1"]
    code, said, _ = robudget_command(*words, "--detach")
    assert code == 0
    process = int(said.split()[1].rstrip(","))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not any(list(f.events("epoch")) for f in folders(store)):
        time.sleep(0.1)
    try:
        now = status(store)
        assert (now.count("running"), now.waiting) == (1, 1)
        code, said, _ = robudget_command("stop", str(store), "--wait", "200")
        assert code == 0
        assert "1 stopped" in said
        assert "ended: stopped (robudget stop)" in said
        log = store / ".sweeps" / "study.log"
        while time.monotonic() < deadline + 60 and "what was done is saved" not in log.read_text():
            time.sleep(0.1)  # its status is there before its last line
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert "what was done is saved" in log.read_text()


def folders(store: Path) -> list[RunFolder]:
    return Store(store).folders() if store.is_dir() else []
