import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from pandas.testing import assert_frame_equal

from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Busy, Store
from robudget.sweep.local import sweep
from robudget.sweep.queue import SweepState
from robudget.tables.read import load_runs

# What must not depend on when or where a run was interrupted: everything but seconds and what follows from them.
EXACT = [
    "slug",
    "aa_acc",
    "clean_acc",
    "val_acc",
    "train_flops_exact",
    "train_flops_paper",
    "eval_flops_exact",
    "images_seen",
]
SITE = Site(device="cpu", threads=1)


@pytest.fixture(scope="module")
def recipes(tiny: Recipe) -> list[Recipe]:
    return [tiny.with_({"seed": s, "loss": loss}) for loss in ("at", "trades") for s in (0, 1)]


@pytest.fixture(scope="module")
def undisturbed(recipes: list[Recipe], tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    store = tmp_path_factory.mktemp("undisturbed")
    state = sweep(recipes, store=store, site=SITE, workers=1)
    assert not state.failed
    return exact(store)


def exact(store: Path) -> pd.DataFrame:
    return load_runs(store).set_index("run_id").sort_index()[EXACT]


def start(recipes: list[Recipe], store: Path) -> "subprocess.Popen[bytes]":
    """The sweep in a process of its own, that can be killed."""
    code = (
        "import json, sys; from robudget.recipe import Recipe; from robudget.execution import Site;"
        "from robudget.sweep.local import sweep;"
        "recipes = [Recipe.from_dict(r) for r in json.loads(sys.argv[1])];"
        "sweep(recipes, store=sys.argv[2], site=Site(device='cpu', threads=1), workers=1)"
    )
    data = json.dumps([r.to_dict() for r in recipes])
    return subprocess.Popen([sys.executable, "-c", code, data, str(store)])


def log_lines(store: Path) -> int:
    return sum(len(p.read_text().splitlines()) for p in store.glob("*/log.jsonl"))


@pytest.mark.usefixtures("forks")
def test_kill_minus_nine_then_again_gives_the_same_table(
    recipes: list[Recipe], undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    kills = 0
    for wanted in (3, 9, 20):  # log lines: in training, in evaluation, in another run
        process = start(recipes, tmp_path)
        deadline = time.monotonic() + 120
        while log_lines(tmp_path) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    assert sum(f.done for f in Store(tmp_path).folders()) < len(recipes)
    _until_free(tmp_path)
    state = sweep(recipes, store=tmp_path, site=SITE, workers=2)
    assert not state.failed
    assert_frame_equal(exact(tmp_path), undisturbed, check_exact=True)


@pytest.mark.usefixtures("forks")
def test_a_killed_worker_changes_no_table_and_what_it_lost_is_on_the_bill(
    recipes: list[Recipe], undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    process = start(recipes, tmp_path)
    deadline = time.monotonic() + 120
    killed = 0
    for wanted in (4, 20):  # log lines: in training, and later
        while log_lines(tmp_path) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        for worker in psutil.Process(process.pid).children():
            worker.kill()
            killed += 1
    assert process.wait(240) == 0
    assert killed == 2
    assert_frame_equal(exact(tmp_path), undisturbed, check_exact=True)
    for folder in Store(tmp_path).folders():
        for stage in (folder.record()["training"], folder.record()["evaluation"]):
            assert (stage["flops_lost"] >= 0, stage["flops_lost_how"]) == (True, "counted")


def _until_free(store: Path) -> None:
    """A killed sweep's worker ends a moment later; until then it rightly holds its run."""
    deadline = time.monotonic() + 60
    for folder in Store(store).folders():
        while time.monotonic() < deadline:
            try:
                with folder.lock():
                    break
            except Busy:
                time.sleep(0.05)


@pytest.mark.usefixtures("forks")
def test_two_sweeps_on_one_store_never_share_a_run(
    recipes: list[Recipe], undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    other = start(recipes, tmp_path)
    state = sweep(list(reversed(recipes)), store=tmp_path, site=SITE, workers=1)
    assert other.wait(120) == 0
    assert not state.failed
    assert_frame_equal(exact(tmp_path), undisturbed, check_exact=True)
    for folder in Store(tmp_path).folders():
        assert [e["epoch"] for e in folder.events("epoch")] == [1, 2]


@pytest.mark.usefixtures("forks")
def test_what_is_done_is_skipped_and_progress_is_told(recipes: list[Recipe], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def watch(state: SweepState) -> None:
        seen.append((state.done, len(state.running)))

    sweep(recipes[:1], store=tmp_path, site=SITE, watch=watch)
    assert seen[0] == (0, 0)
    assert seen[-1] == (1, 0)
    assert (0, 1) in seen
    state = sweep(recipes[:1], store=tmp_path, site=SITE)
    assert (state.done, state.to_do) == (1, [])


@pytest.mark.usefixtures("forks")
def test_a_failed_run_is_noted_and_the_others_go_on(recipes: list[Recipe], tmp_path: Path) -> None:
    bad = recipes[0].with_({"model.name": "wrn-11-1"})
    state = sweep([bad, recipes[0]], store=tmp_path, site=SITE, workers=1)
    assert list(state.failed) == [0]
    assert "depth must be 6n + 4" in state.failed[0]
    assert list(state.finished) == [1]
    assert len(load_runs(tmp_path)) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_sweep(
    tiny: Recipe, tmp_path: Path, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    if number == signal.SIGTERM:  # SIGKILL is for interpreters of their own
        request.getfixturevalue("forks")
    endless = tiny.with_({"epochs": 1, "epoch_images": 10**8})  # not a word from it for hours
    process = start([endless], tmp_path)
    deadline = time.monotonic() + 120
    while not log_lines(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    os.kill(process.pid, number)
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    for orphan in alive:
        orphan.kill()
    assert not alive
    assert gone
