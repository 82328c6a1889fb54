"""The Slurm executor on a real Slurm of two nodes, each some processes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robudget import __version__
from robudget.errors import InputError
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Store
from robudget.sweep.drive import drive
from robudget.sweep.executor import Event, Job, open_executor
from robudget.sweep.slurm import JOB_SECONDS, SlurmExecutor, _groups
from robudget.sweep.slurm_task import final_events
from robudget.tables.read import load_runs

SITE = Site(device="cpu", threads=1)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUDGET_SLURM_POLL_SECONDS", "0.5")


def test_a_study_end_to_end(tiny: Recipe, tmp_path: Path, slurm: Any) -> None:
    """Three runs in two arrays, since this Slurm's have two tasks at most; one of them fails."""
    recipes = [tiny, tiny.with_({"seed": 1}), tiny.with_({"model.name": "wrn-11-1"})]
    seen = set()
    state = drive(
        recipes,
        lambda runs: open_executor("slurm", site=SITE, runs=runs, options={"runs-per-job": "1", "time": "10"}),
        store=tmp_path,
        site=SITE,
        watch=lambda state: seen.update(status.phase for status in state.running.values()),
    )
    assert sorted(state.finished) == [0, 1]
    assert "depth must be 6n + 4" in state.failed[2]
    assert len(load_runs(tmp_path)) == 2
    assert "queued" in seen
    assert seen & {"train", "evaluate"}, "progress is told"
    assert len({path.name for path in (tmp_path / ".slurm").iterdir()}) == 2


def test_a_driver_that_comes_back_a_warning_a_preemption_and_a_lost_node(
    tiny: Recipe, tmp_path: Path, slurm: Any
) -> None:
    """What is in the queue is found there again. A task that is warned saves and is put back into the queue, as Slurm
    puts back one that it preempts, and that of a lost node; every epoch is trained once where it was saved."""
    recipe = tiny.with_({"epochs": 12, "epoch_images": 1024})
    folder = Store(tmp_path).folder(recipe)
    ready(slurm)
    first = SlurmExecutor(options={"runs-per-job": "2"})
    first.submit(0, job(recipe, tmp_path))
    first.submit(1, job(tiny, tmp_path))
    first.events(0)
    first.close()  # and the driver has gone
    assert tasks() == 1
    until(lambda: len(list(folder.events("epoch"))) >= 2)
    again = SlurmExecutor(options={"runs-per-job": "2"})
    again.submit(5, job(recipe, tmp_path))
    again.submit(6, job(tiny, tmp_path))
    again.events(0)
    assert tasks() == 1, "nothing is submitted twice"
    subprocess.run(["scancel", "--batch", "--signal=USR1", task_of(again)], check=True)
    until(lambda: squeue("%T") != ["RUNNING"])
    reached = len(list(folder.events("epoch")))
    assert reached < 12
    until(lambda: len(list(folder.events("epoch"))) > reached)
    node = squeue("%N")[0]
    urgent = ["sbatch", "--partition=urgent", f"--nodelist={node}", "--output=/dev/null", "--wrap=true"]
    subprocess.run(urgent, check=True, capture_output=True)
    until(lambda: " Restarts=2 " in shown(again))
    reached = len(list(folder.events("epoch")))
    assert reached < 12
    until(lambda: len(list(folder.events("epoch"))) > reached)
    node = squeue("%N")[0]
    slurm.kill_node(node)
    ended: dict[int, Event] = {}
    until(lambda: ended.update({e.number: e for e in again.events(0.5) if e.kind != "progress"}) or len(ended) == 2)
    slurm.start_node(node)
    assert {event.kind for event in ended.values()} == {"done"}
    epochs = [entry["epoch"] for entry in folder.events("epoch")]
    assert sorted(set(epochs)) == list(range(1, 13))
    assert len(epochs) <= 14, "what was killed may have trained one that was not saved"


def test_runs_are_ended_early(ends_early: Callable[..., None], slurm: Any) -> None:
    ends_early("--on", "slurm", "--time", "10", "--runs-per-job", "3")


def test_what_is_cancelled(tiny: Recipe, tmp_path: Path, slurm: Any) -> None:
    """In the queue it leaves it; what runs saves, ends, and is not put back."""
    ready(slurm)
    endless = [tiny.with_({"epochs": 300, "seed": seed}) for seed in range(3)]
    executor = SlurmExecutor(options={"runs-per-job": "1", "nodelist": "n1"})
    for number, recipe in enumerate(endless):
        executor.submit(number, job(recipe, tmp_path))
    executor.events(0)
    until(lambda: any(Store(tmp_path).folder(recipe).path.exists() for recipe in endless))
    for number in range(3):
        executor.cancel(number)
    ended: dict[int, Event] = {}
    until(lambda: ended.update({e.number: e for e in executor.events(0.5) if e.kind != "progress"}) or len(ended) == 3)
    assert {event.kind for event in ended.values()} == {"stopped"}
    until(lambda: tasks() == 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tiem": "3"}, r"sbatch failed: unrecognized option '--tiem=3'"),
        ({"partition": "gpu"}, r"sbatch failed: .*[Ii]nvalid partition"),
        ({"runs-per-job": "many"}, r"--runs-per-job many \(allowed: a whole number"),
        ({"mem": "1T"}, r"sbatch failed: .*Memory specification can not be satisfied"),
    ],
)
def test_a_failed_sbatch_says_why(options: dict[str, str], said: str, tiny: Recipe, tmp_path: Path, slurm: Any) -> None:
    def send() -> None:
        executor = SlurmExecutor(options=options)
        executor.submit(0, job(tiny, tmp_path))
        executor.events(0)

    with pytest.raises(InputError, match=said) as error:
        send()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / ".slurm").glob("*"))


def test_a_gpu_where_none_is(tiny: Recipe, tmp_path: Path, slurm: Any) -> None:
    executor = SlurmExecutor()
    executor.submit(0, Job(tiny.to_dict(), str(tmp_path), Site(device="cuda").model_dump(), gpus=1))
    with pytest.raises(InputError, match=r"no node of this Slurm has one \(allowed: device=cpu\)"):
        executor.events(0)


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="no sbatch on this machine"):
        open_executor("slurm", site=SITE)
    with pytest.raises(InputError, match="Slurm has no address"):
        open_executor("slurm:login", site=SITE)


def test_a_job_of_another_version_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    """A task that robudget was changed for says both versions, whatever fields jobs had; nothing is trained."""
    ours = job(tiny, tmp_path).to_dict()
    line = {"runs": ["a", "b"], "jobs": [ours | {"version": "99.1"}, ours | {"version": "99.1", "new": 1}]}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    words = [sys.executable, "-m", "robudget.sweep.slurm_task", str(tmp_path)]
    subprocess.run(words, env=os.environ | {"SLURM_ARRAY_TASK_ID": "0"}, check=True)
    events = list(final_events(tmp_path / "events-0.jsonl"))
    assert [event["run"] for event in events] == ["a", "b"]
    for event in events:
        assert (event["kind"], event["cause"]) == ("failed", "input")
        assert f"the sweep is of robudget 99.1, this worker of {__version__}" in event["note"]
    assert len(list(tmp_path.iterdir())) == 2


def test_several_short_runs_share_a_job(tiny: Recipe, tmp_path: Path) -> None:
    def sizes(seconds: list[float], per_job: int = 0) -> list[int]:
        jobs = [Job(tiny.to_dict(), "runs", SITE.model_dump(), seconds=each) for each in seconds]
        return [len(group) for group in _groups([(str(i), each) for i, each in enumerate(jobs)], per_job)]

    assert sizes([0, 0, 0]) == [1, 1, 1], "nothing is known of them"
    assert sizes([0, 0, 0], per_job=2) == [2, 1]
    assert sizes([JOB_SECONDS / 4] * 6) == [4, 2]
    assert sizes([JOB_SECONDS / 4, 10 * JOB_SECONDS, JOB_SECONDS / 4, JOB_SECONDS / 4]) == [1, 1, 2]
    assert sizes([1.0] * 250) == [100, 100, 50]


# -- what the tests share ----------------------------------------------------------------------------------------------


def job(recipe: Recipe, store: Path) -> Job:
    return Job(recipe.to_dict(), str(store), SITE.model_dump())


def squeue(field: str) -> list[str]:
    return subprocess.run(
        ["squeue", "-h", "-r", "--me", "-o", field], capture_output=True, text=True, check=True
    ).stdout.split()


def tasks() -> int:
    return len(squeue("%i"))


def task_of(executor: SlurmExecutor) -> str:
    return next(iter(executor._tasks.values())).name


def shown(executor: SlurmExecutor) -> str:
    words = ["scontrol", "show", "job", task_of(executor)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ready(slurm: Any) -> None:
    """Both nodes wait for work, and nothing is in the queue."""
    until(lambda: tasks() == 0 and slurm.nodes() == "0/2")
