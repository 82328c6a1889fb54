"""The Ray executor on a real Ray cluster of several nodes, each some processes of this machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from robudget import __version__
from robudget.errors import InputError
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Store
from robudget.sweep.executor import Event, Executor, Job, attempt, open_executor
from robudget.sweep.ray import REPORT_SECONDS, SPARE_SLOTS, RayExecutor, sweep_on_ray
from robudget.sweep.study import Study
from robudget.tables.read import load_runs

SITE = Site(device="cpu", threads=1)


def test_a_study_end_to_end(tiny: Recipe, tmp_path: Path, ray_cluster: Any) -> None:
    recipes = [tiny, tiny.with_({"seed": 1}), tiny.with_({"model.name": "wrn-11-1"})]
    state = sweep_on_ray(recipes, store=tmp_path, site=SITE, address=ray_cluster.address)
    assert sorted(state.finished) == [0, 1]
    assert "depth must be 6n + 4" in state.failed[2]
    assert len(load_runs(tmp_path)) == 2
    again = sweep_on_ray(recipes[:2], store=tmp_path, site=SITE, address=ray_cluster.address)
    assert (again.done, again.to_do) == (2, [])


def test_this_machine_and_a_cluster_at_once(tiny: Recipe, tmp_path: Path, ray_cluster: Any) -> None:
    """The same study by two drivers, each with its executor, into one store: every run is trained once."""
    study, store = tmp_path / "study.yaml", tmp_path / "runs"
    seeds = {str(seed): {"seed": seed} for seed in range(4)}
    study.write_text(json.dumps({"base": tiny.to_dict(), "axes": {"seed": seeds}}))
    words = [str(study), "--store", str(store), "--workers", "1", "device=cpu", "threads=1"]
    local = subprocess.Popen([sys.executable, "-m", "robudget", "sweep", *words], stdout=subprocess.DEVNULL)
    recipes = Study.load(study).recipes
    state = sweep_on_ray(recipes, store=store, site=SITE, address=ray_cluster.address)
    assert local.wait(240) == 0
    assert (state.done, state.failed) == (4, {})
    assert len(load_runs(store)) == 4
    for folder in Store(store).folders():
        assert [event["epoch"] for event in folder.events("epoch")] == [1, 2]


def test_ray_and_slurm_at_once(
    tiny: Recipe, tmp_path: Path, ray_cluster: Any, slurm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same study by two drivers, each with a cluster of its own, into one store: every run is trained once."""
    monkeypatch.setenv("ROBUDGET_SLURM_POLL_SECONDS", "0.5")
    study, store = tmp_path / "study.yaml", tmp_path / "runs"
    seeds = {str(seed): {"seed": seed} for seed in range(3)}
    study.write_text(json.dumps({"base": tiny.to_dict(), "axes": {"seed": seeds}}))
    words = [str(study), "--store", str(store), "device=cpu", "threads=1", "--on", "slurm", "--runs-per-job=2"]
    other = subprocess.Popen([sys.executable, "-m", "robudget", "sweep", *words], stdout=subprocess.DEVNULL)
    state = sweep_on_ray(Study.load(study).recipes, store=store, site=SITE, address=ray_cluster.address)
    assert other.wait(240) == 0
    assert (state.done, state.failed) == (3, {})
    assert len(load_runs(store)) == 3
    for folder in Store(store).folders():
        assert [event["epoch"] for event in folder.events("epoch")] == [1, 2]


def test_runs_are_ended_early(ends_early: Callable[..., None], ray_cluster: Any) -> None:
    ends_early("--on", f"ray:{ray_cluster.address}")


def test_a_cluster_of_another_version(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Ray or of Python: Ray itself compares them, and says both; the next connection is as ever."""
    import ray

    here = (ray.__version__, platform.python_version())
    for other in (("0.1", here[1]), (here[0], "3.99.1")):
        monkeypatch.setattr("ray._private.utils.compute_version_info", lambda other=other: other)
        with pytest.raises(InputError, match="Version mismatch") as error:
            open_executor(f"ray:{ray_cluster.address}", site=SITE)
        said = str(error.value)
        assert "\n" not in said
        for name, mine, theirs in zip(("Ray", "Python"), other, here, strict=True):
            assert f"{name}: {theirs}" in said
            assert f"{name}: {mine}" in said
        assert not ray.is_initialized()


def test_without_ray_it_says_how_to_get_it(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"robudget\[ray\]"):
        sweep_on_ray([tiny], store=tmp_path)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", r"no Ray cluster at '127\.0\.0\.1:9': Connection refused"),
        ("nowhere", r"no Ray cluster at 'nowhere': .*allowed: ray:HOST:6379, ray\)"),
        ("ray://127.0.0.1:10001", r"--on ray:ray://127\.0\.0\.1:10001 \(allowed: ray:HOST:6379"),
    ],
)
def test_an_address_where_nothing_answers(address: str, said: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(InputError, match=said):
        open_executor(f"ray:{address}", site=SITE)


def stub(number: int, job: Mapping[str, Any], tell: Callable[[Event], None]) -> Event:
    """In place of a run: says where it is, and waits to be stopped where it shall."""
    import os
    import time

    import ray

    from robudget import __file__ as source
    from robudget import stop

    if job["recipe"].get("wait"):
        tell(Event(number, "progress", ray.get_runtime_context().get_node_id(), "train", 0.5))
        while not stop.requested():
            time.sleep(0.05)
        return Event(number, "stopped")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ROBUDGET_REMEMBER")
    return Event(number, "done", " ".join([source, job["site"]["device"], *(os.environ.get(n, "-") for n in names)]))


def job(device: str = "cpu", **needs: Any) -> Job:
    wait = {"wait": True} if needs.pop("wait", False) else {}
    return Job(wait, "nowhere", Site(device=device).model_dump(), **needs)


def until_ended(executor: Executor, numbers: set[int]) -> dict[int, Event]:
    ended: dict[int, Event] = {}
    deadline = time.monotonic() + 300
    while numbers - set(ended) and time.monotonic() < deadline:
        ended |= {event.number: event for event in executor.events(0.5) if event.kind != "progress"}
    return ended


@pytest.fixture(scope="module")
def executor(ray_cluster: Any) -> Iterator[RayExecutor]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes have no tests
    executor = RayExecutor(ray_cluster.address, work=stub)
    yield executor
    executor.close()


def test_code_and_settings_go_along(executor: RayExecutor) -> None:
    assert executor.slots == 2 + SPARE_SLOTS
    executor.submit(7, job("auto", gpus=1))
    source, device, rank, *_, setting = until_ended(executor, {7})[7].note.split()
    assert "py_modules" in source
    assert (device, rank, setting) == ("auto", "-", os.environ["ROBUDGET_REMEMBER"])


def test_a_worker_of_another_version_refuses(executor: RayExecutor) -> None:
    executor._work = attempt
    executor.submit(1, job(version="99.1"))
    executor._work = stub
    event = until_ended(executor, {1})[1]
    assert (event.kind, event.cause) == ("failed", "input")
    assert f"the sweep is of robudget 99.1, this worker of {__version__}" in event.note


def test_a_forecast_of_memory_is_asked_for_where_a_node_has_it(executor: RayExecutor) -> None:
    for forecast, asked in ((10**8, 10**8), (10**15, None)):
        executor.submit(1, job(memory_forecast=forecast))
        assert executor._need.get("memory") == asked
        assert until_ended(executor, {1})[1].kind == "done"


def test_attempts_are_stopped_and_save(executor: RayExecutor) -> None:
    """Two of three, since no more run at once than there are CPUs, however they report; the third does not start."""
    for number in (1, 2, 3):
        executor.submit(number, job(wait=True))
    phases: dict[int, str] = {}
    deadline = time.monotonic() + 120
    while len(phases) < 2 and time.monotonic() < deadline:
        phases |= {event.number: event.phase for event in executor.events(0.5)}
    until = time.monotonic() + 2 * REPORT_SECONDS
    while time.monotonic() < until:
        phases |= {event.number: event.phase for event in executor.events(0.5)}
    assert list(phases.values()) == ["train", "train"]
    for number in (1, 2, 3):
        executor.cancel(number)
    assert {event.kind for event in until_ended(executor, {1, 2, 3}).values()} == {"stopped"}


def test_a_stop_outlives_the_mailbox_that_was_told(executor: RayExecutor) -> None:
    """As where its node is lost: it begins anew, and knows of nothing that it was told before."""
    executor.submit(1, job(wait=True))
    deadline = time.monotonic() + 120
    while not executor.events(0.5) and time.monotonic() < deadline:
        pass
    executor.cancel(1)
    early = executor.events(0.0)
    executor._ray.kill(executor._mailbox, no_restart=False)
    ended = [event for event in early if event.kind != "progress"] or [*until_ended(executor, {1}).values()]
    assert [event.kind for event in ended] == ["stopped"]


def test_several_processes_of_one_run(executor: RayExecutor) -> None:
    """Each is told what torchrun would tell it."""
    executor._options["processes"] = 2
    executor.submit(3, job())
    del executor._options["processes"]
    _, device, rank, size, local, address, _ = until_ended(executor, {3})[3].note.split()
    assert (device, rank, size, local) == ("cpu", "0", "2", "0")
    assert address.count(".") == 3


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ({"device": "cuda:1", "gpus": 1}, r"a run asks for 1 GPUs, and no node .* has more than 0 .*device=cpu"),
        ({"cpus": 3}, r"a run asks for 3 CPUs, .* more than 1 \(allowed: at most 1\)"),
        ({"memory_bytes": 10**15}, "a run asks for 1e.15 bytes of memory"),
    ],
)
def test_what_no_node_has(executor: RayExecutor, needs: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        executor.submit(4, job(**needs))


def test_a_lost_node(executor: RayExecutor, ray_cluster: Any) -> None:
    """Its attempt is lost, and the other one goes on; a node that comes is used."""
    executor.submit(5, job(wait=True))
    executor.submit(6, job(wait=True))
    places: dict[int, str] = {}
    deadline = time.monotonic() + 120
    while len(places) < 2 and time.monotonic() < deadline:
        places |= {event.number: event.note for event in executor.events(0.5)}
    node = next(node for node in ray_cluster.worker_nodes if node.node_id == places[5])
    ray_cluster.remove_node(node, allow_graceful=False)
    try:
        assert until_ended(executor, {5})[5].kind == "lost"
        executor.cancel(6)
        assert until_ended(executor, {6})[6].kind == "stopped"
    finally:
        ray_cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    executor._looked = 0.0
    executor.submit(8, job())
    executor.submit(9, job())
    assert {event.kind for event in until_ended(executor, {8, 9}).values()} == {"done"}
