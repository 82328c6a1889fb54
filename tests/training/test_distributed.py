"""Two processes on the CPU do what one does: batch, lr, gradients, records, passes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from robudget import data
from robudget.errors import InputError
from robudget.recipe import Recipe
from robudget.training import Trainer
from robudget.training.distributed import SyncBatchNorm2d, World, current, join

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
    from robudget.recipe import Recipe
    from robudget.training import Trainer
    from robudget.training.distributed import join
    torch.set_num_threads(1)
    world, device = join("cpu")
    out = Path(sys.argv[1])
    recipe = Recipe.load(out / "recipe.yaml")
    digits = data.load("digits")
    next(iter(Trainer(recipe, digits, device=device, folder=out / "run")))
    trainer = Trainer(recipe, digits, device=device, folder=out / "run")  # resumes after the first epoch
    list(trainer)
    (out / f"{world.rank}.json").write_text(json.dumps([asdict(record) for record in trainer.records]))
    save_file(trainer.model.state_dict(), out / f"{world.rank}.safetensors")
    dist.destroy_process_group()
    """
)


def test_two_processes_are_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env=os.environ | place | meeting)
        )
    whole = Trainer(RECIPE, data.load("digits"))
    list(whole)
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for one, a, b in zip(whole.records, *records, strict=True):
        for name in ("epoch", "steps", "images", "lr", "best", "val_images"):
            assert a[name] == b[name] == getattr(one, name)
        assert a["train_loss"] == pytest.approx(one.train_loss, rel=1e-3)
        for name in ("craft_acc", "val_clean", "val_robust", "one_step", "multi_step"):
            assert a[name] == b[name] == pytest.approx(getattr(one, name), abs=0.03)
        for phase in ("craft_forward", "craft_backward", "update_forward", "update_backward"):
            assert a["calls"][phase] == one.calls[phase]
    assert (tmp_path / "run" / "best.safetensors").exists()


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


def test_a_batch_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    from robudget.training import loop

    monkeypatch.setattr(loop, "current", lambda: World(0, 3))
    with pytest.raises(InputError, match="batch_size = 64 can't be shared by 3 processes"):
        Trainer(RECIPE, data.load("digits"))


def test_synchronised_batchnorm_alone_is_batchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
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
