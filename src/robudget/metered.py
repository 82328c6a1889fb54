"""An evaluation, metered: verdicts with the FLOPs and the energy of each attack; of a run or of any classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robudget import data
from robudget.attacks.ensemble import Passes
from robudget.attacks.victim import Model
from robudget.energy_log import EnergyLog
from robudget.evaluation.evaluator import Evaluator
from robudget.evaluation.specification import Specification
from robudget.evaluation.state import Progress
from robudget.evaluation.verdicts import Verdicts
from robudget.evaluation.victims import Backward
from robudget.meter.flops import PassFlops
from robudget.store import writing


def evaluate_metered(
    model: Model,
    specification: Specification,
    dataset: data.Dataset,
    rows: range,
    *,
    folder: Path,
    energy: EnergyLog,
    device: torch.device,
    flops: Callable[[], PassFlops | None],
    progress: Callable[[Progress], None] | None,
    backward: Backward = "own",
    surrogate_flops: Callable[[], PassFlops | None] = lambda: None,
    known: Verdicts | None = None,
    cuda_graphs: bool = True,
    **about: Any,
) -> Verdicts:
    """Evaluate a model on these rows of the test split, and save the verdicts in `folder` with each attack's FLOPs and
    energy. An evaluation that was stopped, however, goes on where it was.

    The energy of the whole is logged as the window "evaluation" with what `about` says of it. `flops` are those of one
    image's passes, None where they are unknown: asked for afterwards, since counting could change a stranger's model;
    so are `surrogate_flops`, where gradients are taken through a surrogate (`backward`). Raises stop.Stopped,
    everything saved, where that was requested.
    """
    images = dataset.test[rows.start : rows.stop]
    counters: list[Callable[[], Passes]] = []

    def made() -> dict[str, int]:
        passes = counters[0]() if counters else Passes()
        return {"evaluation_forward": passes.forward, "evaluation_backward": passes.backward}

    with energy.window("evaluation", calls=made, **about):
        evaluator = Evaluator(
            model,
            specification,
            device,
            folder / "state",
            progress,
            energy.window,
            backward,
            known,
            counters.append,
            cuda_graphs,
        )
        index = torch.arange(rows.start, rows.stop)
        verdicts = evaluator.run(images.images, images.labels, index=index, classes=dataset.classes)
    verdicts = replace(verdicts, about={**verdicts.about, "dataset": dataset.name})
    counted = flops()
    if counted is not None:
        surrogate = surrogate_flops() if verdicts.surrogate_calls else None
        of_surrogate = None if surrogate is None else (surrogate.forward, surrogate.input_backward)
        verdicts = verdicts.with_flops(counted.forward, counted.input_backward, of_surrogate)
    with writing(folder):
        verdicts.save(folder)  # after the window: whoever finds the verdicts finds their energy in the log
    return verdicts


def part_of(n: int, i: int, count: int) -> range:
    """The i-th, from 0, of `count` contiguous parts of n rows."""
    return range(n * i // count, n * (i + 1) // count)
