import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import robudget as rb
from robudget import stop
from robudget.errors import InputError
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.runner import Progress
from robudget.store import RunFolder, Store

SITE = Site(device="cpu", threads=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_and_what_it_did_before_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop.on_signals():
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        with pytest.raises(stop.Stopped, match=number.name) as caught:
            stop.check()
        assert caught.value.exit_code == 75
    assert not stop.requested()
    assert signal.getsignal(number) is before


def test_a_run_that_is_asked_stops_between_epochs_and_in_the_evaluation_and_goes_on(
    tiny: Recipe, tmp_path: Path
) -> None:
    def ask_at(word: str) -> Callable[[Progress], None]:
        def look(now: Progress) -> None:
            if word in now.note:
                stop.request("test")

        return look

    recipe = tiny.with_({"evaluation.images": 40})
    folder = Store(tmp_path).folder(recipe)
    try:
        for word, epochs in (("epoch 1/", [1]), ("apgd", [1, 2])):
            with pytest.raises(stop.Stopped, match="test"):
                rb.run(recipe, store=tmp_path, site=SITE, progress=ask_at(word))
            stop.withdraw()
            assert [event["epoch"] for event in folder.events("epoch")] == epochs
            assert not folder.done
    finally:
        stop.withdraw()
    assert (folder.path / "evals" / recipe.evaluation_id / "state" / "evaluation.npz").exists()
    stopped = rb.run(recipe, store=tmp_path, site=SITE)
    plain = rb.run(recipe, store=tmp_path / "plain", site=SITE)
    assert list(stopped.verdicts.broken_by) == list(plain.verdicts.broken_by)
    assert stopped.record["training"]["flops_exact"] == plain.record["training"]["flops_exact"]


def test_the_command_saves_and_exits_with_a_code_of_its_own(tiny: Recipe, tmp_path: Path) -> None:
    recipe = tiny.with_({"epochs": 400})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    folder: RunFolder = Store(tmp_path / "runs").folder(recipe)
    command = ["run", str(tmp_path / "recipe.yaml"), "device=cpu", "threads=1", "--store", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [sys.executable, "-m", "robudget", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(folder.events("epoch")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "stopped (SIGTERM); what was done is saved" in said
    assert "Traceback" not in said
    assert 1 <= len(list(folder.events("epoch"))) < 400
    assert (folder.path / "last.pt").exists()


def test_the_end_of_a_jobs_time_keeps_some_for_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, seconds in (("90", 90), ("90s", 90), ("30min", 1800), ("2h", 7200), ("1d", 86400), ("1-02:03:04", 93784)):
        assert stop.seconds_of(text) == seconds
    with pytest.raises(InputError, match="allowed: 90s"):
        stop.seconds_of("soon")
    with stop.on_signals():
        stop.end_after(3600)
        assert stop.seconds_left() == pytest.approx(3570, abs=5)
        assert not stop.requested()
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
        stop.end_of_job()
        assert stop.seconds_left() == pytest.approx(90, abs=5)
        stop.end_after(0)
        with pytest.raises(stop.Stopped, match="the time is up"):
            stop.check()
    assert stop.seconds_left() == float("inf")


def test_an_epoch_that_cannot_end_in_time_is_not_begun(tiny: Recipe, tmp_path: Path) -> None:
    with stop.on_signals(), pytest.raises(stop.Stopped, match="would not end in time"):
        rb.run(tiny, store=tmp_path, site=SITE, progress=lambda now: stop.end_after(0.01) if "1/" in now.note else None)
    assert [event["epoch"] for event in Store(tmp_path).folder(tiny).events("epoch")] == [1]
