"""What the verbs of sweeps answer to mistakes, as typed: one line, exit code 2, and the store as it was."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robudget.cli.view.console import SweepDisplay
from robudget.lease import take
from robudget.recipe import Recipe
from robudget.store import Store
from robudget.sweep import ray_cluster
from robudget.sweep.queue import SweepState

Run = Callable[..., tuple[int, str, str]]

SEEDS: dict[str, Any] = {"base": "digits", "axes": {"seed": {"a": {"seed": 1}, "b": {"seed": 2}}}}
MANY = {f"axis{i}": {str(j): {} for j in range(11)} for i in range(6)}
READ_ONLY = Path("/sys/kernel")  # on Linux a folder where nobody makes a file, root neither


def one_line(err: str) -> str:
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a run that was begun."""
    recipe = Recipe.load("digits", {"seed": 1})
    folder = Store(tmp_path / "runs").folder(recipe)
    folder.open(recipe)
    folder.log("epoch", epoch=1)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("study", "words", "said"),
    [
        (SEEDS | {"along": "sede"}, "", "unknown study.yaml: axis in along 'sede'; did you mean 'seed'?"),
        (SEEDS | {"axis": {}}, "", "did you mean 'axes'"),
        ({"axes": {"size": {"small": {"model.bas": 4}}}}, "", "small: unknown key 'model.bas'; did you mean 'model"),
        ({"axes": {"size": {"small": 4}}}, "", "size: small = 4 (allowed: keys of a recipe, e.g. small: {"),
        (SEEDS | {"base": ["digits"]}, "", "base = ['digits'] (allowed: a named recipe"),
        (
            {"axes": {"a": {"x": {"model": {"base": 4}}}, "b": {"y": {"model.base": 8}}}}, "",
            "a: x sets model.base = 4 and b: y sets 8 (allowed: one axis for a key)",
        ),
        ({"axes": MANY}, "", "the axes have 1,771,561 combinations (allowed: 1,000,000; more with --yes)"),
        (SEEDS, "--on locl", "unknown executor 'locl'; did you mean 'local'?"),
        (SEEDS, "--on locl --dry-run", "unknown executor 'locl'; did you mean 'local'?"),
        (SEEDS, "--on locl --detach", "unknown executor 'locl'; did you mean 'local'?"),
        (SEEDS, "--on slurm", "there is no sbatch on this machine"),
        (SEEDS, "device=cuda", "device = 'cuda', but this machine has 0 CUDA GPUs"),
        (SEEDS, "device=gpu", "unknown device 'gpu'"),
        (SEEDS, "--device cuda", "--device cuda without --dry-run (allowed: device=auto, cpu, cuda"),
        (SEEDS, "--dryrun", "unknown option of robudget sweep '--dryrun'; did you mean '--dry-run'?"),
        (SEEDS, "--order cheap", "unknown order 'cheap'; did you mean 'cheapest-first'?"),
        (SEEDS, "--halving 1", "--halving 1 (allowed: 2 or more"),
        (SEEDS, "--time soon", "time = 'soon' (allowed: 90s"),
        (SEEDS, "--only wrn-28", "--only wrn-28: no run of study has that in its name"),
    ],
)  # fmt: skip
def test_sweep(
    study: dict[str, Any], words: str, said: str, robudget_command: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    monkeypatch.setenv("PATH", "/nowhere")  # no sbatch
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("study.yaml").write_text(json.dumps(study), "utf-8")
    before = files_of(store)
    code, out, err = robudget_command("sweep", "study.yaml", *words.split(), "--store", str(store))
    assert (code, out) == (2, "")
    # On a way that begins with workers, the display has said what is to do.
    assert said in one_line(err.removeprefix("study: 2 of 2 runs to do\n"))
    assert files_of(store) == before


@pytest.mark.parametrize("address", ["127.0.0.1:9", ""])
def test_an_address_of_ray_where_nothing_answers(
    address: str, robudget_command: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given, or in RAY_ADDRESS."""
    pytest.importorskip("ray")
    if not address:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    before = files_of(store)
    where = f"ray:{address}".removesuffix(":")
    code, _, err = robudget_command("sweep", "digits-30", "--on", where, "--store", str(store))
    assert code == 2
    assert "no Ray cluster at '127.0.0.1:9': Connection refused" in one_line(err.partition("to do\n")[2])
    assert files_of(store) == before


def test_an_address_where_something_else_listens(
    robudget_command: Run, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server that accepts and says nothing, for which Ray itself would wait ten minutes; one of another kind."""
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_cluster, "ANSWER_SECONDS", 0.3)
    before = files_of(store)
    for answer, said in ((b"", "no answer"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what listens there is no Ray")):
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            if answer:
                threading.Thread(target=lambda: server.accept()[0].sendall(answer), daemon=True).start()  # noqa: B023
            code, _, err = robudget_command("sweep", "digits-30", "--on", f"ray:{address}", "--store", str(store))
        assert code == 2
        assert f"no Ray cluster at '{address}': {said} (allowed: ray:HOST:6379" in one_line(err.partition("to do\n")[2])
    assert files_of(store) == before


def test_a_store_that_is_not_there(robudget_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("", "utf-8")
    for verb in ("status", "stop", "watch"):
        for store in ("nowhere", "file"):
            code, out, err = robudget_command(verb, store)
            assert (code, out) == (2, "")
            assert f"no such store: '{store}' is not a folder" in one_line(err)
        assert "URLs can only be read" in one_line(robudget_command(verb, "s3://bucket/runs")[2])
    code, _, err = robudget_command("sweep", "digits-30", "--store", "file/runs")
    assert code == 2
    assert "a part of the path is a file" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not READ_ONLY.is_dir(), reason="no folder here that nobody can write to")
def test_a_store_that_is_read_only(robudget_command: Run) -> None:
    """Its status is read; what must write says that it cannot, before a worker starts."""
    assert robudget_command("status", str(READ_ONLY))[0] == 0
    for words in (["stop"], ["sweep", "digits-30", "--store"], ["sweep", "digits-30", "--detach", "--store"]):
        code, _, err = robudget_command(*words, str(READ_ONLY))
        assert code == 2, words
        assert f"cannot write '{READ_ONLY}" in one_line(err[err.index("error") :])


def test_a_port_that_is_taken(robudget_command: Run, store: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, _, err = robudget_command("watch", str(store), "--port", port)
    assert code == 2
    assert f"--port {port}: Address already in use (allowed: a free port; 0 = any)" in one_line(err)


def test_a_lease_held_elsewhere(robudget_command: Run, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`run` says who has it; a sweep waits for it, and says so once."""
    recipe = Recipe.load("digits", {"seed": 1})
    folder = Store(store).folder(recipe)
    lease = take(folder.path)
    try:
        before = files_of(store)
        code, out, err = robudget_command("run", "digits", "seed=1", "device=cpu", "--store", str(store))
    finally:
        lease.release()
    assert (code, out) == (1, "")
    assert f"is being worked on by another process (process {os.getpid()} on {socket.gethostname()})" in one_line(err)
    assert [*files_of(store)] == [*before]
    state = SweepState([recipe], [1.0], [0], elsewhere={0: "process 7 on there"})
    with SweepDisplay("seeds") as display:
        display.update(state)
        display.update(state)
    assert capsys.readouterr().err.splitlines()[1:] == [f"waiting for {recipe.slug}, which process 7 on there works on"]
