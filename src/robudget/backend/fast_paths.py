"""What makes a training faster on CUDA, which of it is on, and why not: tuned convolutions, a compiled update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from robudget.attacks.victim import out_of_memory
from robudget.backend.graph import Graphs
from robudget.errors import first_line
from robudget.execution import Site
from robudget.losses import LOSSES
from robudget.recipe import Recipe


def asked_for(recipe: Recipe, site: Site, device: torch.device, processes: int) -> dict[str, str]:
    """Each fast path that a training may take: "on", or "off" and why."""
    if device.type != "cuda":
        return dict.fromkeys(("CUDA graphs", "cudnn.benchmark", "compiled update"), f"off: the device is {device.type}")
    statistics = recipe.craft.batchnorm == "batch" and processes > 1 and site.sync_batchnorm
    graphs = {
        "cuda_graphs=false": not site.cuda_graphs,
        "checkpointing=true": site.checkpointing,
        "an attack step exchanges BatchNorm's statistics": statistics,
        "the loss crafts and updates at once": LOSSES[recipe.loss].replays or LOSSES[recipe.loss].remembers,
        "nothing is crafted": not recipe.adversarial,
    }
    benchmark = {"cudnn_benchmark=false": not site.cudnn_benchmark, "deterministic=true": site.deterministic}
    compiled = {"compile=false": not site.compile, "checkpointing=true": site.checkpointing}
    reasons = {"CUDA graphs": graphs, "cudnn.benchmark": benchmark, "compiled update": compiled}
    return {
        name: next((f"off: {reason}" for reason, holds in each.items() if holds), "on")
        for name, each in reasons.items()
    }


class FastPaths:
    """The fast paths of one training: `graphs` and `update` where they are on, else None; `tuned()` around its steps;
    `record` says of each whether it is on, or why not."""

    def __init__(
        self,
        recipe: Recipe,
        site: Site,
        model: nn.Module,
        device: torch.device,
        processes: int,
        notify: Callable[[str], None],
    ) -> None:
        self._asked = asked_for(recipe, site, device, processes)
        self.graphs = Graphs(device, notify) if self._asked["CUDA graphs"] == "on" else None
        self.update = Compiled(model, notify) if self._asked["compiled update"] == "on" else None

    def tuned(self) -> AbstractContextManager[None]:
        return tuned_convolutions(self._asked["cudnn.benchmark"] == "on")

    @property
    def record(self) -> dict[str, str]:
        paths = {"CUDA graphs": self.graphs, "compiled update": self.update}
        failed = {name: f"off: {path.failed}" for name, path in paths.items() if path is not None and path.failed}
        return self._asked | failed


@contextmanager
def tuned_convolutions(on: bool) -> Iterator[None]:
    """cuDNN chooses each convolution's algorithm by timing the first call of a shape. The choice may differ from one
    start to the next, and with it last bits."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Compiled:
    """`model` through torch.compile. Where that fails, `notify` is told once, `failed` says why, and the model is
    called as it is from then on."""

    def __init__(self, model: nn.Module, notify: Callable[[str], None]) -> None:
        self._model, self._notify = model, notify
        self._call: Callable[..., Any] = torch.compile(model)
        self.failed: str | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self.failed is not None:
            return self._model(*inputs)
        try:
            return self._call(*inputs)
        # Of the tracer, the compiler or a compiler that is missing: any class of any library.
        except Exception as error:
            if out_of_memory(error):
                raise
            self.failed = first_line(error)
            self._notify(f"the update could not be compiled, going on without: {self.failed}")
        return self._model(*inputs)
