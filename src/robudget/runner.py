"""One run: data and model, training, evaluation, the meter around both, and the record. The only place that composes
them."""

from __future__ import annotations

import functools
import importlib.metadata
import operator
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from robudget import __version__, data
from robudget.errors import InputError
from robudget.evaluation import Progress as EvaluationProgress
from robudget.evaluation import Verdicts, evaluate
from robudget.files import write_json
from robudget.meter import flops, record
from robudget.meter.energy import Energy, Meter, open_meter
from robudget.recipe import Recipe
from robudget.site import Site
from robudget.store import RunFolder, Store, writing
from robudget.training import Trainer

# Of the progress bar: an evaluation takes about as long as a training of some tens of epochs.
TRAINING_SHARE = 0.4


@dataclass(frozen=True)
class Progress:
    """Where a run is: `phase` ("train" or "evaluate"), `fraction` of the whole run done, and a few words.

    `key` changes with every epoch and every attack: enough for a log, where a display wants more.
    """

    phase: str
    fraction: float
    note: str
    key: str


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and its record (`run.json`)."""

    folder: RunFolder
    record: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """One line: accuracy with interval and n, what it took."""
        judged, trained = self.record["evaluation"], self.record["training"]
        energy = [stage["energy"]["kwh"] for stage in (trained, judged)]
        wh = "unknown" if None in energy else f"{1000 * sum(energy):.2g}"
        return (
            f"robust {100 * judged['robust']:.1f}% [{100 * judged['low']:.1f}, {100 * judged['high']:.1f}], "
            f"clean {100 * judged['clean']:.1f}% of {judged['n']} images · "
            f"train {trained['seconds']:.1f} s, evaluate {judged['seconds']:.1f} s, {wh} Wh"
        )

    @property
    def verdicts(self) -> Verdicts:
        return Verdicts.load(self.folder.path / "evals" / self.record["evaluation"]["id"])


def run(
    recipe: Recipe,
    *,
    store: str | Path = "runs",
    site: Site | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> RunResult:
    """Train `recipe`, evaluate it, meter both, and write the record to `store`; what is done already is only read.

    A run that was stopped, however, goes on where it was. Raises `store.Busy` where another process has the run,
    InputError for what the user can mend, RunFailed when training diverges.
    """
    site = site or Site()
    device = resolve_device(site.device)
    if site.threads:
        torch.set_num_threads(site.threads)
    folder = Store(store).folder(recipe)
    if folder.done:
        return RunResult(folder, folder.record())
    dataset = data.load(recipe.data.name, root=site.data_root)
    folder.open(recipe)
    with folder.lock():
        if RunFolder(folder.path).done:  # by another process, between the look and the lock
            return RunResult(folder, folder.record())
        with writing(folder.path):
            write_json(folder.path / "environment.json", environment(device))
        folder.log("start")
        with open_meter(str(device)) as meter:
            ledger = _Ledger(folder, meter)

            trainer = _train(recipe, dataset, site, device, ledger, progress)
            verdicts = _evaluate(recipe, dataset, trainer, device, ledger, progress)
        folder.finish(_record(recipe, dataset, trainer, verdicts, ledger, device))
    return RunResult(folder, folder.record())


def resolve_device(name: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:1`. Raises InputError where there is no such GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"unknown device {name!r} (allowed: auto, cpu, cuda, cuda:1)") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported (allowed: auto, cpu, cuda, cuda:1)")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise InputError(f"device = {name!r}, but this machine has {found} CUDA GPUs (allowed: auto, cpu)")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """What a result may depend on beside the recipe: versions, device, threads, the CPU's capability."""
    packages = ("torch", "timm", "numpy", "scikit-learn")
    return {
        "robudget": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


# -- the two halves ---------------------------------------------------------------------------------------------------


class _Ledger:
    """Energy windows whose results go straight to the run's log, so that a killed run's energy is not lost with it."""

    def __init__(self, folder: RunFolder, meter: Meter):
        self.folder, self.meter = folder, meter

    @contextmanager
    def window(self, name: str) -> Iterator[None]:
        with self.meter.window(name) as opened:
            try:
                yield
            finally:
                self.folder.log("energy", window=opened.name, **opened.energy.to_dict())

    def total(self, stage: str) -> Energy:
        """What a stage took, attempts that were killed included.

        Inner windows (`stage/…`) are part of the outer one, so they count only where a kill kept that from closing.
        """
        spent: list[Energy] = []
        inner: list[Energy] = []
        for event in self.folder.events():
            if event["event"] == "start":
                spent, inner = spent + inner, []
            elif event["event"] == "energy" and event["window"] == stage:
                spent, inner = [*spent, Energy.from_dict(event)], []
            elif event["event"] == "energy" and event["window"].startswith(f"{stage}/"):
                inner.append(Energy.from_dict(event))
        return functools.reduce(operator.add, spent + inner)


def _train(
    recipe: Recipe,
    dataset: data.Dataset,
    site: Site,
    device: torch.device,
    ledger: _Ledger,
    progress: Callable[[Progress], None],
) -> Trainer:
    def tell(epoch: int, robust: float | None = None) -> None:
        note = f"epoch {epoch}/{recipe.epochs}" + ("" if robust is None else f", validation {100 * robust:.1f}% robust")
        progress(Progress("train", TRAINING_SHARE * epoch / recipe.epochs, note, f"epoch {epoch}"))

    with ledger.window("training"):
        trainer = Trainer(
            recipe,
            dataset,
            synthetic_root=site.synthetic_root,
            device=device,
            folder=ledger.folder.path,
            window=ledger.window,
            notify=lambda text: ledger.folder.log("notice", text=text),
        )
    tell(len(trainer.records))
    epochs = iter(trainer)
    while not trainer.done:
        with ledger.window("training"):
            record = next(epochs)
        ledger.folder.log("epoch", **asdict(record))
        tell(record.epoch, record.val_robust)
    return trainer


def _evaluate(
    recipe: Recipe,
    dataset: data.Dataset,
    trainer: Trainer,
    device: torch.device,
    ledger: _Ledger,
    progress: Callable[[Progress], None],
) -> Verdicts:
    target = ledger.folder.path / "evals" / recipe.evaluation_id
    if (target / "result.json").exists():
        return Verdicts.load(target)
    images = dataset.test.first(recipe.evaluation.images)

    def follow(now: EvaluationProgress) -> None:
        share = TRAINING_SHARE + (1 - TRAINING_SHARE) * now.fraction
        progress(Progress("evaluate", share, f"{now.attack}, {100 * now.robust:.1f}% robust so far", now.attack))

    with ledger.window("evaluation"):
        verdicts = evaluate(
            trainer.best_model(),
            images.unit(),
            images.labels,
            recipe.evaluation_threat,
            version=recipe.evaluation.version,
            seed=recipe.evaluation.seed,
            batch_size=recipe.evaluation.batch_size,
            device=device,
            state=target / "state",
            progress=follow,
            window=ledger.window,
        )
    verdicts.save(target)
    return verdicts


def _record(
    recipe: Recipe, dataset: data.Dataset, trainer: Trainer, verdicts: Verdicts, ledger: _Ledger, device: torch.device
) -> dict[str, Any]:
    counted = flops.of_recipe(recipe, dataset.classes, dataset.image_shape)
    last, best = trainer.records[-1], trainer.best
    assert best is not None, "the last epoch is always validated"
    low, high = verdicts.interval
    synthetic = trainer.data.synthetic
    return {
        "id": recipe.id,
        "slug": recipe.slug,
        "status": "done",
        "recipe": recipe.to_dict(),
        "environment": environment(device) | {"precision": trainer.precision.name},
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "train": len(trainer.data.train),
            "validation": len(trainer.data.validation),
            "test": len(dataset.test),
            "synthetic": len(synthetic) if synthetic is not None else 0,
        },
        "model": record.of_model(counted),
        "training": {
            "epochs": last.epoch,
            "steps": last.steps,
            "images_seen": last.images,
            "best_epoch": best.epoch,
            "val_clean": best.val_clean,
            "val_robust": best.val_robust,
            "val_images": len(trainer.data.validation),
            "calls": last.calls,
            **record.of_training(
                recipe, counted, last.calls, images=last.images, steps=last.steps, energy=ledger.total("training")
            ),
        },
        "evaluation": {
            "id": recipe.evaluation_id,
            "norm": recipe.evaluation_threat.norm,
            "eps": recipe.evaluation_threat.eps,
            "version": recipe.evaluation.version,
            "n": len(verdicts),
            "clean": verdicts.clean_accuracy,
            "robust": verdicts.robust_accuracy,
            "low": low,
            "high": high,
            "calls": verdicts.calls,
            "findings": [finding.to_dict() for finding in verdicts.findings],
            **record.of_evaluation(counted, verdicts.calls, energy=ledger.total("evaluation")),
        },
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
