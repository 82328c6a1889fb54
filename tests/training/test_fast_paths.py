"""A training's fast paths change no bit where the device is a CPU, and a step never waits for its device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from robudget import data
from robudget.backend.batch_size import Physical
from robudget.backend.graph import Graphs
from robudget.backend.precision import Precision
from robudget.execution import Site
from robudget.models import build
from robudget.recipe import Recipe
from robudget.training import Trainer, step
from robudget.training.batchnorm import synchronise_batchnorm
from robudget.training.clock import Stopwatch
from robudget.training.distributed import World
from robudget.training.optimisation import Ema, build_optimizer
from robudget.training.records import PHASES
from robudget.training.step import Step

CPU, META = torch.device("cpu"), torch.device("meta")
LOSSES: list[dict[str, Any]] = [
    {},
    {"loss": "trades"},
    {"loss": "trades", "craft.batchnorm": "batch"},
    {"loss": "n-fgsm", "craft.steps": 1},
    {"threat.norm": "l2", "threat.eps": 0.5},
    {"threat.norm": "l1", "threat.eps": 5.0, "awp.gamma": 0.01},
]


def step_of(
    recipe: Recipe,
    model: nn.Module,
    device: torch.device,
    precision: str = "float32",
    ema: Ema | None = None,
    world: World = World(),  # noqa: B008 (frozen)
    **more: Any,
) -> Step:
    return Step(
        recipe,
        model,
        build_optimizer(model, recipe.optim, 0.1),
        ema,
        precision=Precision(precision, device),  # type: ignore[arg-type]
        craft_precision=Precision(precision, device),  # type: ignore[arg-type]
        world=world,
        watch=Stopwatch(CPU),
        calls=Counter(dict.fromkeys(PHASES, 0)),
        steps_per_epoch=1,
        **more,
    )


def recipe_of(changes: dict[str, Any]) -> Recipe:
    return Recipe().with_({"threat.eps": 0.1, "craft.steps": 3, "optim.lr": 0.1} | changes)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", LOSSES, ids=str)
def test_static_buffers_train_to_the_same_bits(changes: dict[str, Any], precision: str) -> None:
    x, y = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4
    weights = []
    for graphs in (None, Graphs(CPU, pytest.fail)):
        torch.manual_seed(0)
        model = build("wrn-10-1", classes=4, image_size=8, base=2).train()
        train = step_of(recipe_of(changes), model, CPU, precision, Ema(model, 0.9, warmup=True), graphs=graphs)
        for number in range(3):  # the weights of the folded copy are renewed where they lie
            train(x, y, y, number)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


def test_parts_of_a_batch_have_buffers_of_their_own() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(x.flatten(1))
            return logits

    x, y = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4
    weights = []
    for graphs in (None, Graphs(CPU, pytest.fail)):
        torch.manual_seed(0)
        model = Linear()
        train = step_of(recipe_of({}), model, CPU, graphs=graphs, physical=Physical(4))
        train(x, y, y, 0)
        weights.append(model.head.weight)
    assert torch.equal(*weights)


def test_what_waits_is_counted(waits: Any) -> None:
    x = torch.ones(4, device=META)
    with waits() as seen:
        x.copy_(torch.ones(4))
        torch.ones(4).to(META)
        torch.ones(4).to(META, non_blocking=True)
        torch.ones(4)[torch.ones(4) > 0].sum().item()
    assert seen.seen == [
        "aten.copy_.default",
        "aten._to_copy.default",
        "aten.index.Tensor",
        "aten._local_scalar_dense.default",
    ]


@pytest.mark.parametrize("changes", [*LOSSES, {"loss": "mart"}, {"loss": "free-at"}], ids=str)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_never_waits_for_the_device(
    changes: dict[str, Any], processes: int, monkeypatch: pytest.MonkeyPatch, waits: Any
) -> None:
    # On torch's device without data, every value that is read is an error, and every copy from the host is seen.
    monkeypatch.setattr(step, "generator_for", lambda *_: None)  # it has none of its own
    model = build("wrn-10-1", classes=4, image_size=8, base=2).train().to(META)
    if processes > 1:
        monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
        monkeypatch.setattr(dist, "get_world_size", lambda: processes)
        synchronise_batchnorm(model)
    x, y = torch.rand(6, 3, 8, 8, device=META), torch.zeros(6, dtype=torch.int64, device=META)
    train = step_of(recipe_of(changes), model, META, ema=Ema(model, 0.9, warmup=True), world=World(0, processes))
    with waits() as seen:
        outcome = train(x, y, y, 0)
    assert outcome.loss.device == META
    assert not seen.seen
    assert seen.operations > 100


def test_a_run_records_its_fast_paths(tmp_path: Path) -> None:
    trainer = Trainer(Recipe.load("digits"), data.load("digits"), Site(), device="cpu")
    paths = dict(trainer.fast_paths)
    assert paths.pop("channels-last") in ("on", "off: the update is in float32")
    assert set(paths.values()) == {"off: the device is cpu"}
