"""`torchrun -m robudget run` on two processes of this CPU: one run, one table, one record, one bill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import robudget as rb
from robudget import stop
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.runner import Until
from robudget.store import RunFolder, Store


def launch(recipe: Path, store: Path) -> subprocess.Popen[str]:
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m robudget run"
    ours = [str(recipe), "device=cpu", "threads=1", "--store", str(store), "--json"]
    command = [sys.executable, *torchrun.split(), *ours]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def epochs(folder: RunFolder) -> int:
    return len(list(folder.events("epoch")))


@pytest.mark.usefixtures("forks")
def test_a_killed_node_ends_the_other_with_one_line(tiny: Recipe, tmp_path: Path) -> None:
    """`srun` starts the tasks and watches over none of them. One process goes on where two were."""
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.with_({"epochs": 500, "precision": "float32", "validation.every": 500}).to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
        step |= {"MASTER_PORT": str(free.getsockname()[1]), "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    command = [sys.executable, "-m", "robudget", "run", str(path), "device=cpu", "threads=1", "--store", str(tmp_path)]
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0", "SLURM_NODEID": str(i)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    folder = Store(tmp_path).folder(Recipe.load(path))
    deadline = time.monotonic() + 240
    while not epochs(folder) and all(task.poll() is None for task in tasks) and time.monotonic() < deadline:
        time.sleep(0.05)
    tasks[1].kill()
    _, said = tasks[0].communicate(timeout=120)
    tasks[1].communicate()
    assert tasks[0].returncode == 1
    assert "error: another process of this run ended or stopped answering" in said
    assert "run again to go on" in said
    assert "Traceback" not in said
    reached = epochs(folder)
    with pytest.raises(stop.Paused):
        rb.run(Recipe.load(path), store=tmp_path, site=Site(device="cpu", threads=1), until=Until(reached + 2))
    assert epochs(folder) > reached > 0


def test_stopped_and_resumed_on_two_processes_is_one_run(
    tiny: Recipe, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = tiny.with_({"epochs": 6, "epoch_images": 512, "precision": "float32", "validation.every": 6})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    folder = Store(tmp_path / "two").folder(recipe)

    first = launch(path, tmp_path / "two")
    deadline = time.monotonic() + 120
    while epochs(folder) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode != 0
    assert not folder.done
    stopped_at = epochs(folder)
    assert 2 <= stopped_at < 6

    request.getfixturevalue("forks")  # torchrun and its processes have started anew once
    second = launch(path, tmp_path / "two")
    out, err = second.communicate(timeout=180)
    assert second.returncode == 0, err
    shown = json.loads(out)  # one object, from one process
    assert [event["epoch"] for event in folder.events("epoch")] == [1, 2, 3, 4, 5, 6]

    alone = rb.run(recipe, store=tmp_path / "one", site=Site(device="cpu", threads=1))
    mine, theirs = folder.record(), alone.record
    assert shown["run_id"] == mine["id"] == theirs["id"]
    assert mine["environment"]["processes"] == 2
    for phase in ("craft_forward", "craft_backward", "update_forward", "update_backward"):
        assert mine["training"]["flops_by_phase"][phase] == theirs["training"]["flops_by_phase"][phase] > 0
    # Validation leaves out what the model gets wrong, which the order of a sum can change for an image or two of 20.
    assert mine["training"]["flops_exact"] == pytest.approx(theirs["training"]["flops_exact"], rel=0.02)
    assert mine["training"]["flops_paper"] == theirs["training"]["flops_paper"]
    assert mine["evaluation"]["n"] == theirs["evaluation"]["n"] == 12
    for stage in ("training", "evaluation"):
        logged = [
            [event for event in folder.events("energy", rank=rank) if event["window"] == stage] for rank in (0, 1)
        ]
        assert all(logged)
        once = sum(event["kwh"] for events in logged for event in events)
        assert mine[stage]["energy"]["kwh"] == pytest.approx(once)
        assert mine[stage]["seconds"] == pytest.approx(max(sum(e["seconds"] for e in events) for events in logged))
