"""One evaluation of any classifier: the model, the data, the ensemble, the meter around it, and a folder of results."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from robudget import data
from robudget.errors import InputError
from robudget.evaluation import Progress, Verdicts, evaluate
from robudget.evaluation.load import load_classifier
from robudget.evaluation.merge import merge
from robudget.files import write_json
from robudget.meter import flops, record
from robudget.meter.energy import open_meter
from robudget.models.build import build_for
from robudget.runner import environment, resolve_device
from robudget.site import Site
from robudget.store import RunFolder, writing
from robudget.threat import Threat
from robudget.training import load_weights

if TYPE_CHECKING:
    from robudget.evaluation.evaluate import Precision


@dataclass(frozen=True)
class Judgement:
    """`verdicts` per image and the `bill` (FLOPs, seconds, energy; as in run.json), both kept in `folder`."""

    folder: Path
    verdicts: Verdicts
    bill: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), **self.verdicts.summary(), "bill": self.bill}


def judge(
    source: str,
    *,
    dataset: str | None = None,
    threat: Threat | None = None,
    version: str = "standard",
    images: int | None = None,
    shard: tuple[int, int] = (1, 1),
    seed: int = 0,
    batch_size: int = 500,
    precision: str = "auto",
    model: str | None = None,
    out: str | Path | None = None,
    site: Site | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Judgement:
    """Put a classifier through the ensemble on a test split and keep the verdicts; resumes what was begun.

    `source` is a run's folder, whose recipe then gives dataset and threat, or anything that `load_classifier` takes.
    `images`: the first n of the test split. `shard` = (i, n): the i-th of n contiguous parts, from 1; noise goes with
    an image's row in the split, so shards give the verdicts of the whole. Raises InputError.
    """
    site = site or Site()
    device = resolve_device(site.device)
    if site.threads:
        torch.set_num_threads(site.threads)
    run = RunFolder(source) if Path(source).is_dir() else None
    if run is not None:
        dataset, threat = dataset or run.recipe.data.name, threat or run.recipe.evaluation_threat
    if dataset is None and Path(source).suffix != ".safetensors" and ":" not in source and not Path(source).exists():
        raise InputError(f"nothing to evaluate at {source!r}, or no --data for it (robudget eval --help)")
    if dataset is None or threat is None:
        raise InputError("an evaluation needs its data and its threat (--data cifar10 --norm linf --eps 8/255)")
    read = data.load(dataset, root=site.data_root)
    classifier = _of_run(run, read) if run is not None else load_classifier(source, read, model=model)
    first, last = _part(len(read.test.first(images)), shard)
    part = read.test[first:last]
    name = re.sub(r"[^\w.-]+", "-", f"{Path(source).name}-{dataset}-{threat}-{version}-{seed}")
    name += f"-{shard[0]}of{shard[1]}" if shard[1] > 1 else ""
    folder = Path(out) if out is not None else (run.path / "evals" if run else Path("evals")) / name
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with open_meter(str(device)) as meter, meter.window("evaluation") as window:
        verdicts = evaluate(
            classifier,
            part.unit(),
            part.labels,
            threat,
            version=version,
            seed=seed,
            batch_size=batch_size,
            precision=cast("Precision", precision),
            index=torch.arange(first, last),
            device=device,
            state=folder / "state",
            progress=progress,
            window=meter.window,
        )
    bill: dict[str, Any] = {"energy": window.energy.to_dict(), "seconds": window.energy.seconds}
    if isinstance(classifier, nn.Module):
        counted = flops.count(classifier, read.image_shape)
        bill = record.of_evaluation(counted, verdicts.calls, energy=window.energy)
    with writing(folder):
        verdicts.save(folder)
        write_json(folder / "bill.json", bill | {"environment": environment(device)})
    return Judgement(folder, verdicts, bill)


def merged(shards: Sequence[Path], out: Path | None) -> Verdicts:
    """The shards' verdicts as one, written to `out` (default: beside the first shard, as `…-merged`)."""
    verdicts = merge([Verdicts.load(path) for path in shards])
    target = out or shards[0].with_name(re.sub(r"-\d+of\d+$", "", shards[0].name) + "-merged")
    with writing(target):
        verdicts.save(target)
    return verdicts


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` → (2, 4). Raises InputError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise InputError(f"shard = {text!r} (allowed: i/n, e.g. 2/4)")
    return int(match[1]), int(match[2])


def _of_run(run: RunFolder, dataset: data.Dataset) -> Callable[[Tensor], Tensor]:
    if not run.best.exists():
        raise InputError(f"{str(run.path)!r} has no best.safetensors yet: train it first (robudget run)")
    network = build_for(run.recipe, dataset)
    network.load_state_dict(load_weights(run.best)[0])
    return network.eval()


def _part(n: int, shard: tuple[int, int]) -> tuple[int, int]:
    """[first, last) of the i-th of `count` contiguous parts of n rows."""
    i, count = shard
    if not 1 <= i <= count <= n:
        raise InputError(f"shard = {i}/{count} of {n} images (allowed: 1/n to n/n, n at most the number of images)")
    return n * (i - 1) // count, n * i // count
