"""Two processes on the CPU do what one does: batch, lr, gradients, records, passes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from robudget import data
from robudget.errors import InputError, RunFailed
from robudget.execution import adopt_slurm
from robudget.recipe import Recipe
from robudget.training import Trainer, distributed
from robudget.training.batchnorm import SyncBatchNorm2d
from robudget.training.distributed import TIMEOUT, World, current, join

RECIPE = Recipe().with_(
    {
        "data.name": "digits",
        "data.crop": 1,
        "model.name": "wrn-10-1",
        "model.base": 4,
        "craft.steps": 1,
        "threat.eps": 0.1,
        "optim.lr": 0.05,
        "ema.decay": 0.5,
        "epochs": 2,
        "epoch_images": 128,
        "batch_size": 64,
        "synthetic.source": "mixture",
        "synthetic.amount": 200,
        "synthetic.fraction": 0.5,
        "validation.steps": 2,
        "collapse.images": 32,
        "collapse.steps": 2,
        "precision": "float32",
    }
)

PROGRAM = textwrap.dedent(
    """
    import json, sys
    from dataclasses import asdict
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from robudget import data
    from robudget.data import synthetic
    from robudget.recipe import Recipe
    from robudget.training import Trainer
    from robudget.training.distributed import join
    torch.set_num_threads(1)
    world, device = join("cpu")
    out = Path(sys.argv[1])
    fit = synthetic.mixture
    def mixture(*arguments, **options):
        (out / f"{world.rank}.fitted").touch()
        return fit(*arguments, **options)
    synthetic.mixture = mixture
    recipe = Recipe.load(out / "recipe.yaml")
    digits = data.load("digits")
    next(iter(Trainer(recipe, digits, device=device, folder=out / "run")))
    trainer = Trainer(recipe, digits, device=device, folder=out / "run")  # resumes after the first epoch
    list(trainer)
    (out / f"{world.rank}.json").write_text(json.dumps([asdict(record) for record in trainer.records]))
    average = {name: torch.as_tensor(value) for name, value in trainer.ema.state().items()}
    save_file({**trainer.model.state_dict(), **average}, out / f"{world.rank}.safetensors")
    dist.destroy_process_group()
    """
)


def group(program: str, folder: Path, count: int) -> list[subprocess.Popen[bytes]]:
    """`count` processes of one group, without a launcher that watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen([sys.executable, "-c", program, str(folder)], env=os.environ | place | meeting)
        )
    return processes


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value) for name, value in state.items()}


@pytest.mark.usefixtures("forks")
def test_four_processes_are_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    processes = group(PROGRAM, tmp_path, 4)
    whole = Trainer(RECIPE, data.load("digits"))
    list(whole)
    assert [process.wait(timeout=240) for process in processes] == [0] * 4

    first, *others = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(4))
    assert whole.ema is not None
    for name, tensor in {**whole.model.state_dict(), **tensors(whole.ema.state())}.items():
        assert all(torch.equal(first[name], other[name]) for other in others), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [[r | {"seconds": 0} for r in told] for told in records[1:]] == [
        [r | {"seconds": 0} for r in records[0]]
    ] * 3
    fitted = [(tmp_path / f"{rank}.fitted").exists() for rank in range(4)]
    assert fitted == [True, False, False, False]  # the mixture, by the first one alone
    for one, a in zip(whole.records, records[0], strict=True):
        for name in ("epoch", "steps", "images", "lr", "best", "val_images"):
            assert a[name] == getattr(one, name)
        assert a["train_loss"] == pytest.approx(one.train_loss, rel=1e-3)
        for name in ("craft_acc", "val_clean", "val_robust", "one_step", "multi_step"):
            assert a[name] == pytest.approx(getattr(one, name), abs=0.03)
        for phase in ("craft_forward", "craft_backward", "update_forward", "update_backward"):
            assert a["calls"][phase] == one.calls[phase]
    assert (tmp_path / "run" / "best.safetensors").exists()

    heard: list[str] = []  # one process goes on where four have stopped
    alone = Trainer(RECIPE.with_({"epochs": 2}), data.load("digits"), folder=tmp_path / "run", notify=heard.append)
    assert heard == ["begun on 4 processes, going on with 1: equal up to rounding, not bit for bit"]
    assert alone.done
    assert torch.equal(alone.model.state_dict()["head.weight"], first["head.weight"])


# Each scenario trains or validates from the same start on one process and on two.
SCENARIOS = textwrap.dedent(
    """
    from collections import Counter
    from pathlib import Path
    import torch
    from robudget import data, stop
    from robudget.training import clock
    from robudget.backend.precision import Precision
    from robudget.execution import Site
    from robudget.models.build import build_for
    from robudget.recipe import Recipe
    from robudget.threat import Threat
    from robudget.training import Trainer
    from robudget.training.distributed import current
    from robudget.training.craft import Adversary
    from robudget.training.validation import Validator

    def stopping(trainer):
        "The last process alone is asked to stop at step 2 of 8; all save the same step."
        clock.LOOK_STEPS = 2
        step = trainer._train_step
        def asked():
            if trainer.step == 2 and current().rank == current().size - 1:
                stop.request("SIGTERM")
            step()
        trainer._train_step = asked
        try:
            list(trainer)
        except stop.Stopped:
            assert trainer.step == (3 if current().size == 1 else 4), trainer.step
            stop.withdraw()
            return
        raise AssertionError("not stopped")

    def scenarios(folder):
        recipe, digits = Recipe.load(Path(folder) / "recipe.yaml"), data.load("digits")
        recipe = recipe.with_({"epochs": 1, "validation.images": 8, "collapse.action": "off", "synthetic.source": None})
        found = {}
        changes = {"plain": {}, "trades, batch": {"loss": "trades", "craft.batchnorm": "batch"},
                   "awp": {"awp.gamma": 0.01}, "cutmix": {"data.cutmix": True}}
        sites = {"checkpointing": Site(checkpointing=True), "unsynchronised": Site(sync_batchnorm=False)}
        for name in (*changes, *sites):
            trainer = Trainer(recipe.with_(changes.get(name, {})), digits, sites.get(name, Site()))
            list(trainer)
            found[name] = {**trainer.model.state_dict(), **trainer.ema.state()}
            found[name] |= {"calls." + k: v for k, v in trainer.records[-1].calls.items()}
            found[name] = {k: torch.as_tensor(v) for k, v in found[name].items()}
        trainer = Trainer(recipe.with_({"epoch_images": 512}), digits, folder=Path(folder) / f"stop-{current().size}")
        stopping(trainer)
        trainer = Trainer(recipe.with_({"epoch_images": 512}), digits, folder=Path(folder) / f"stop-{current().size}")
        list(trainer)
        found["stopped"] = {k: torch.as_tensor(v) for k, v in trainer.model.state_dict().items()}
        calls, images = Counter(), digits.test.first(44)
        model = build_for(recipe, digits)
        validator = Validator(images.images, model(images.unit()).argmax(1), 0, 8, Precision("float32",
                              torch.device("cpu")), current(), calls)
        seen = validator(model, Adversary(Threat("linf", 0.02), 2, 0.01))
        assert 0 < seen.robust < 1, seen
        total = current().totals(calls, torch.device("cpu"))
        found["validation"] = {"robust": torch.tensor(round(44 * seen.robust)), "clean": torch.tensor(seen.clean),
                               **{k: torch.tensor(v) for k, v in total.items()}}
        return found
    """
)


@pytest.mark.usefixtures("forks")
def test_two_processes_are_one_whatever_is_asked(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    start = "import sys; from robudget.training.distributed import dist, join; world, device = join('cpu')"
    end = "torch.save(scenarios(sys.argv[1]), f'{sys.argv[1]}/{world.rank}.pt'); dist.destroy_process_group()"
    processes = group("\n".join((SCENARIOS, "torch.set_num_threads(1)", start, end)), tmp_path, 2)
    space: dict[str, Any] = {}
    exec(SCENARIOS, space)
    alone = space["scenarios"](tmp_path)
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, expected in alone.items():
        for key, value in expected.items():
            assert torch.equal(first[name][key], second[name][key]), (name, key)  # the same model everywhere
            if key.startswith("calls.") or name == "validation":
                assert torch.equal(first[name][key], value), (name, key)
            elif name != "unsynchronised":
                torch.testing.assert_close(first[name][key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
    for key, value in alone["plain"].items():  # recomputing activations changes nothing
        if not key.startswith("calls."):
            torch.testing.assert_close(first["checkpointing"][key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current() == World()
    assert join("cpu") == (World(), torch.device("cpu"))
    assert World().leads
    rows = torch.arange(10)
    assert torch.equal(torch.cat([rows[World(r, 3).mine] for r in range(3)]).sort().values, rows)


def test_fewer_gpus_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="4 processes were started on this machine, but it has 2 GPUs"):
        join("cuda")


def test_one_visible_gpu_each_is_gpu_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's --gpus-per-task; NCCL is told its device and a time to give up."""
    import torch.distributed as dist

    environment = {"WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "3"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen: list[torch.device] = []
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.setattr(dist, "new_group", lambda **options: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([("store", 3, 4)]))
    _, device = join("cuda")
    assert device == torch.device("cuda:0")
    assert chosen == [device]
    met = {"store": "store", "rank": 3, "world_size": 4}
    assert asked == met | {"backend": "nccl", "timeout": TIMEOUT, "device_id": device}


def test_a_gpu_of_its_own_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    join("cuda:2")
    join("cpu")
    assert chosen == [torch.device("cuda:2")]


def test_no_group_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    def fail(*_: object, **__: object) -> None:
        raise dist.DistNetworkError("The client socket has failed to connect\nmore of it")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([("store", 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(
        RunFailed, match=r"the 2 processes can't form a group: The client socket has failed to connect$"
    ):
        join("cpu")


def test_a_process_that_never_comes_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "FORMING", timedelta(seconds=1))
    causes = {"0": "Timed out after .* waiting for clients", "1": "The client socket has (timed out|failed to connect)"}
    for rank, cause in causes.items():
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(RunFailed, match=rf"^the 2 processes can't form a group: {cause}") as caught:
            join("cpu")
        assert "\n" not in str(caught.value)


def test_slurms_tasks_are_processes() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "11",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        "SLURM_STEP_NODELIST": "gpu[03-05,9],x1",
        "SLURM_JOB_ID": "70001",
    }
    assert adopt_slurm(step) == {
        "WORLD_SIZE": "11",
        "RANK": "9",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "30001",
    }
    assert adopt_slurm(step | {"SLURM_STEP_NODELIST": "node7"})["MASTER_ADDR"] == "node7"
    assert adopt_slurm(step | {"WORLD_SIZE": "2"}) == {}  # torchrun within a step
    assert adopt_slurm(step | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert adopt_slurm({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == {}  # the batch script itself


def test_a_batch_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    from robudget.training import loop

    monkeypatch.setattr(loop, "current", lambda: World(0, 3))
    with pytest.raises(InputError, match="batch_size = 64 can't be shared by 3 processes"):
        Trainer(RECIPE, data.load("digits"))


def test_synchronised_batchnorm_alone_is_batchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    torch.manual_seed(0)
    plain, synced = nn.BatchNorm2d(3), SyncBatchNorm2d(3)
    x = 2 + 3 * torch.randn(8, 3, 4, 4)
    outputs = []
    for norm in (plain, synced):
        leaf = x.clone().requires_grad_(True)
        out = norm(leaf)
        out.square().mean().add(out.mean() * 2).add((out[:, :, 0] ** 3).mean()).backward()
        outputs.append((out, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
    for a, b in zip(*outputs, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.eval()(x), synced.eval()(x))
