"""One run: data and model, training, evaluation, the meter around both, and the record. The only place that composes
them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robudget import __version__, data
from robudget.data.dataset import sampled_fingerprint
from robudget.energy_log import EnergyLog
from robudget.errors import InputError
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.state import Progress as EvaluationProgress
from robudget.evaluation.verdicts import Verdicts, merge
from robudget.execution import Site
from robudget.files import write_json
from robudget.meter.flops import model_record, of_recipe, stage_record, training_record
from robudget.meter.machine import open_meter
from robudget.recipe import Recipe
from robudget.store import RunFolder, Store, writing
from robudget.training import Trainer, best_model
from robudget.training.distributed import World, joined

# Of the progress bar: an evaluation takes about as long as a training of some tens of epochs.
TRAINING_SHARE = 0.4
_LOOK_SECONDS = 0.1  # of one process after what another writes


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

    A run that was stopped, however, goes on where it was; one trained for another evaluation is only evaluated.
    Under `torchrun` all processes call it: training and evaluation are shared out, the first one writes and reports.
    Raises `store.Busy` where another process has the run, InputError for what the user can mend, RunFailed when
    training diverges.
    """
    site = site or Site()
    folder = Store(store).folder(recipe)
    if folder.has(recipe):
        return RunResult(folder, folder.record())
    if site.threads:
        torch.set_num_threads(site.threads)
    with _algorithms(site.deterministic), joined(str(resolve_device(site.device))) as (world, device):
        dataset = data.load(recipe.data.name, root=site.data_root, image_size=recipe.data.image_size)
        with _held(folder, recipe, world):
            if not folder.has(recipe):  # by another process, between the look and the lock
                _run(recipe, dataset, site, device, world, folder, progress if world.leads else _silent)
    return RunResult(folder, folder.record())


def _run(
    recipe: Recipe,
    dataset: data.Dataset,
    site: Site,
    device: torch.device,
    world: World,
    folder: RunFolder,
    progress: Callable[[Progress], None],
) -> None:
    if world.leads:
        with writing(folder.path):
            write_json(folder.path / "environment.json", environment(device))
    world.barrier()
    folder.log("start", rank=world.rank)
    meter = open_meter(str(device), cpu_watts=site.cpu_watts, gpu_watts=site.gpu_watts)
    with meter, EnergyLog(folder, meter, rank=world.rank) as ledger:
        one = _One(recipe, dataset, site, device, world, folder, ledger, progress)
        trained = folder.record() if folder.done else one.train()
        verdicts = one.evaluate()
        if world.leads:
            folder.finish(one.record(trained, verdicts))
    while not folder.has(recipe):  # the first process is still putting it together
        time.sleep(_LOOK_SECONDS)


@contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _silent(progress: Progress) -> None:
    pass


@contextmanager
def _held(folder: RunFolder, recipe: Recipe, world: World) -> Iterator[None]:
    """The folder, made and held against others by the first process; the others go on once it is."""
    if not world.leads:
        world.barrier()
        yield
        return
    folder.open(recipe)
    with folder.lock():
        world.barrier()
        yield


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
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


# -- the two halves ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _One:
    """One run's parts, and the two halves of it."""

    recipe: Recipe
    dataset: data.Dataset
    site: Site
    device: torch.device
    world: World
    folder: RunFolder
    ledger: EnergyLog
    progress: Callable[[Progress], None]

    def train(self) -> dict[str, Any]:
        """The parts of the record that the training determines."""
        recipe = self.recipe

        def tell(epoch: int, robust: float | None = None) -> None:
            note = f"epoch {epoch}/{recipe.epochs}"
            note += "" if robust is None else f", validation {100 * robust:.1f}% robust"
            self.progress(Progress("train", TRAINING_SHARE * epoch / recipe.epochs, note, f"epoch {epoch}"))

        with self.ledger.window("training"):
            trainer = Trainer(
                recipe,
                self.dataset,
                self.site,
                device=self.device,
                folder=self.folder.path,
                window=self.ledger.window,
                notify=self._notice,
            )
        tell(len(trainer.records))
        epochs = iter(trainer)
        while not trainer.done:
            with self.ledger.window("training"):
                record = next(epochs)
            if self.world.leads:
                self.folder.log("epoch", **asdict(record))
            tell(record.epoch, record.val_robust)
        return self._trained(trainer)

    def evaluate(self) -> Verdicts:
        """The ensemble's verdicts, from the disk where they are there. Processes take a contiguous part each."""
        recipe, world = self.recipe, self.world
        target = self.folder.path / "evals" / recipe.evaluation_id
        if (target / "result.json").exists():
            return Verdicts.load(target)
        images = self.dataset.test.first(recipe.evaluation.images)
        parts = min(world.size, len(images))
        folders = [target if parts == 1 else target / f"part-{i + 1}-of-{parts}" for i in range(parts)]
        if world.rank < parts:
            mine = torch.arange(len(images) * world.rank // parts, len(images) * (world.rank + 1) // parts)
            if not (folders[world.rank] / "result.json").exists():
                self._evaluate(images[mine], mine, folders[world.rank])
        if parts == 1 or not world.leads:
            return Verdicts.load(folders[min(world.rank, parts - 1)])
        while not all((folder / "result.json").exists() for folder in folders):
            time.sleep(_LOOK_SECONDS)
        verdicts = merge([Verdicts.load(folder) for folder in folders])
        verdicts.save(target)
        return verdicts

    def _evaluate(self, images: data.Split, index: Tensor, target: Path) -> None:
        recipe = self.recipe

        def follow(now: EvaluationProgress) -> None:
            share = TRAINING_SHARE + (1 - TRAINING_SHARE) * now.fraction
            note = f"{now.attack}, {100 * now.robust:.1f}% robust so far"
            self.progress(Progress("evaluate", share, note, now.attack))

        with self.ledger.window("evaluation", evaluation=recipe.evaluation_id):
            verdicts = evaluate(
                best_model(recipe, self.dataset, self.folder.best).to(self.device),
                images.unit(),
                images.labels,
                recipe.evaluation_threat,
                version=recipe.evaluation.version,
                seed=recipe.evaluation.seed,
                batch_size=recipe.evaluation.batch_size,
                index=index,
                device=self.device,
                state=target / "state",
                progress=follow,
                window=self.ledger.window,
            )
        counted = of_recipe(recipe, self.dataset.classes, self.dataset.image_shape)
        verdicts = verdicts.with_flops(counted.forward, counted.input_backward)
        with writing(target):
            verdicts.save(target)  # after the window, so that whoever finds it finds its energy logged too

    def _notice(self, text: str) -> None:
        if self.world.leads:
            self.folder.log("notice", text=text)
            self.progress(Progress("train", 0.0, text, text))

    def _trained(self, trainer: Trainer) -> dict[str, Any]:
        dataset = self.dataset
        last, best = trainer.records[-1], trainer.best
        assert best is not None, "the last epoch is always validated"
        synthetic = trainer.data.synthetic
        return {
            "environment": environment(self.device)
            | {"precision": trainer.precision.name, "processes": self.world.size},
            "dataset": {
                "name": dataset.name,
                "fingerprint": dataset.fingerprint,
                "train": len(trainer.data.rows),
                "validation": len(trainer.data.validation),
                "test": len(dataset.test),
                "synthetic": len(synthetic) if synthetic is not None else 0,
                "synthetic_fingerprint": sampled_fingerprint(synthetic) if synthetic is not None else None,
            },
            "training": {
                "epochs": last.epoch,
                "steps": last.steps,
                "images_seen": last.images,
                "best_epoch": best.epoch,
                "val_clean": best.val_clean,
                "val_robust": best.val_robust,
                "val_images": len(trainer.data.validation),
                "collapsed_at": trainer.collapsed_at,
                "stopped": trainer.stopped,
                "calls": last.calls,
            },
        }

    def record(self, trained: Mapping[str, Any], verdicts: Verdicts) -> dict[str, Any]:
        """run.json, `trained` being what `train` found or an earlier run.json."""
        recipe, training = self.recipe, trained["training"]
        counted = of_recipe(recipe, self.dataset.classes, self.dataset.image_shape)
        low, high = verdicts.interval
        return {
            "id": recipe.id,
            "slug": recipe.slug,
            "status": "done",
            "recipe": recipe.to_dict(),
            "environment": trained["environment"],
            "dataset": trained["dataset"],
            "model": model_record(counted),
            "training": {
                **training,
                **training_record(
                    recipe,
                    counted,
                    training["calls"],
                    images=training["images_seen"],
                    steps=training["steps"],
                    energy=self.ledger.total("training"),
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
                **stage_record(
                    counted,
                    verdicts.calls,
                    self.ledger.total("evaluation", evaluation=recipe.evaluation_id),
                ),
            },
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
