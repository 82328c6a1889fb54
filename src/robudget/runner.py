"""One run, composed: data and model, training, evaluation, the meter around both, and the record.

From top to bottom: `run` prepares, then `_Run` trains, evaluates and records. `evaluate_metered` serves every
evaluation, of a run and of any other classifier (`benchmark`).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from robudget import __version__, data, stop
from robudget.attacks.victim import Model
from robudget.backend.device import answering, why_no_gpu
from robudget.data.dataset import sampled_fingerprint
from robudget.energy_log import EnergyLog
from robudget.errors import InputError
from robudget.evaluation.evaluator import Evaluator
from robudget.evaluation.specification import Specification
from robudget.evaluation.state import Progress as EvaluationProgress
from robudget.evaluation.verdicts import Verdicts, merge
from robudget.evaluation.victims import Backward
from robudget.execution import Site
from robudget.files import write_json
from robudget.lease import Observer
from robudget.meter.flops import PassFlops, model_record, of_recipe, stage_record, training_record
from robudget.meter.gpu import driver_version
from robudget.meter.machine import open_meter
from robudget.recipe import Recipe
from robudget.store import RunFolder, Store, writing
from robudget.threads import claimed
from robudget.training.checkpoint import best_model
from robudget.training.distributed import World, first_on_node, joined
from robudget.training.loop import Trainer

TRAINING_SHARE = 0.4  # of a progress bar: an evaluation takes about as long as a training of some tens of epochs


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
        training, evaluation = self.record["training"], self.record["evaluation"]
        energy = [stage["energy"]["kwh"] for stage in (training, evaluation)]
        wh = "unknown" if None in energy else f"{1000 * sum(energy):.2g}"
        robust, low, high, clean = (100 * evaluation[name] for name in ("robust", "low", "high", "clean"))
        return (
            f"robust {robust:.1f}% [{low:.1f}, {high:.1f}], clean {clean:.1f}% of {evaluation['n']} images · "
            f"train {training['seconds']:.1f} s, evaluate {evaluation['seconds']:.1f} s, {wh} Wh"
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
    over: int | None = None,
    stop_token: str | None = None,
) -> RunResult:
    """Train `recipe`, evaluate it, meter both, and write the record to `store`; what is done already is only read.

    A run that was stopped, however, goes on where it was; one trained for another evaluation is only evaluated.
    Under `torchrun` all processes call it: training and evaluation are shared out, the first one writes and reports.
    `over` is for who has watched the run's lease already: the number of a stale one to take over, 0 for none; otherwise
    a lease of another host is watched here until it moves or has stood still for `lease.STALE_SECONDS`. `stop_token`:
    what the store's file of requests said when the sweep began (`stop.on_file`); default: what it says now.
    Raises `store.Busy` where another process has the run, InputError for what the user can mend, RunFailed when
    training diverges, stop.Stopped where that was requested (`stop.py`).
    """
    site, folder = site or Site(), Store(store).folder(recipe)
    if folder.has(recipe):
        return RunResult(folder, folder.record())
    with (
        stop.on_file(Path(store), stop_token),
        claimed(site.threads, begun_with=folder.threads),
        _algorithms(site.deterministic),
        answering(),
        joined(str(resolve_device(site.device))) as (world, device),
    ):
        part = recipe.data
        dataset = first_on_node(world, lambda: data.load(part.name, root=site.data_root, image_size=part.image_size))
        with _locked(folder, recipe, world, over):
            if not folder.has(recipe):  # another process may have done it before this one had the lock
                with (
                    open_meter(str(device), **site.meter) as meter,
                    EnergyLog(folder, meter, rank=world.rank) as energy,
                ):
                    _Run(recipe, dataset, site, device, world, folder, energy, progress).complete()
    return RunResult(folder, folder.record())


@dataclass(frozen=True)
class _Run:
    """The parts of one run, in one of its processes."""

    recipe: Recipe
    dataset: data.Dataset
    site: Site
    device: torch.device
    world: World
    folder: RunFolder
    energy: EnergyLog
    progress: Callable[[Progress], None]
    attacks: set[str] = field(default_factory=set)  # that this process has begun

    def complete(self) -> None:
        """Train and evaluate what is not done yet, and write the record."""
        if self.world.leads:
            with writing(self.folder.path):
                write_json(self.folder.path / "environment.json", environment(self.device) | _chosen(self.site))
        self.world.barrier()
        self.folder.log("start", rank=self.world.rank)
        training = self.folder.record() if self.folder.done else self.train()
        verdicts = self.evaluate()
        if self.world.leads:
            self.folder.finish(self.record(training, verdicts))
        self.world.barrier()

    def train(self) -> dict[str, Any]:
        """The parts of the record that the training determines."""
        recipe = self.recipe
        with self.energy.window("training"):
            trainer = Trainer(
                recipe,
                self.dataset,
                self.site,
                device=self.device,
                folder=self.folder.path,
                window=self.energy.window,
                notify=self._notice,
                activation_bytes=self._flops.activation_bytes if self.device.type == "cuda" else None,
            )
        self._report_epoch(len(trainer.records))
        epochs = iter(trainer)
        slowest = 0.0
        while not trainer.done:
            if slowest > stop.seconds_left():
                stop.request("the next epoch would not end in time")  # the trainer looks before it begins one
            began = time.monotonic()
            with self.energy.window("training"):
                record = next(epochs)
            slowest = max(slowest, time.monotonic() - began)
            if self.world.leads:
                self.folder.log("epoch", **asdict(record))
            self._report_epoch(record.epoch, record.val_robust)
        last, best, synthetic = trainer.records[-1], trainer.best, trainer.data.synthetic
        assert best is not None, "the last epoch is always validated"
        return {
            "environment": environment(self.device)
            | {"precision": trainer.precision.name, "processes": self.world.size, "arithmetic": trainer.arithmetic}
            | {"fast_paths": trainer.fast_paths}
            | {"physical_batch": trainer.physical.images or recipe.batch_size // self.world.size}
            | _chosen(self.site),
            "dataset": {
                "name": self.dataset.name,
                "fingerprint": self.dataset.fingerprint,
                "train": len(trainer.data.rows),
                "validation": len(trainer.data.validation),
                "test": len(self.dataset.test),
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

    def evaluate(self) -> Verdicts:
        """The ensemble's verdicts, from the disk where they are there. Each process evaluates a contiguous part."""
        recipe, world = self.recipe, self.world
        target = self.folder.path / "evals" / recipe.evaluation_id
        if _evaluated(target):
            return Verdicts.load(target)
        n = len(self.dataset.test.first(recipe.evaluation.images))
        count = min(world.size, n)
        folders = [target if count == 1 else target / f"part-{i + 1}-of-{count}" for i in range(count)]
        if world.rank < count and not _evaluated(folders[world.rank]):
            asked = recipe.evaluation
            evaluate_metered(
                best_model(recipe, self.dataset, self.folder.best).to(self.device),
                Specification(
                    recipe.evaluation_threat,
                    asked.version,
                    seed=asked.seed,
                    batch_size=asked.batch_size,
                    confirm=asked.confirm,
                    until=asked.until,
                ),
                self.dataset,
                part_of(n, world.rank, count),
                folder=folders[world.rank],
                energy=self.energy,
                device=self.device,
                flops=lambda: self._flops,
                progress=self._report_evaluation,
                evaluation=recipe.evaluation_id,
            )
        world.barrier()  # until every part is there
        if count == 1 or not world.leads:
            return Verdicts.load(folders[min(world.rank, count - 1)])
        verdicts = merge([Verdicts.load(folder) for folder in folders])
        verdicts.save(target)
        return verdicts

    def record(self, trained: Mapping[str, Any], verdicts: Verdicts) -> dict[str, Any]:
        """run.json; `trained` is what `train` returned, or an earlier run.json."""
        recipe, training, threat = self.recipe, trained["training"], self.recipe.evaluation_threat
        images, steps, calls = training["images_seen"], training["steps"], training["calls"]
        energy = self.energy.total("training")
        low, high = verdicts.interval
        return {
            "id": recipe.id,
            "slug": recipe.slug,
            "status": "done",
            "recipe": recipe.to_dict(),
            "environment": trained["environment"],
            "dataset": trained["dataset"],
            "model": model_record(self._flops),
            "training": training
            | training_record(recipe, self._flops, calls, images=images, steps=steps, energy=energy),
            "evaluation": {
                "id": recipe.evaluation_id,
                "norm": threat.norm,
                "eps": threat.eps,
                "version": recipe.evaluation.version,
                "n": len(verdicts),
                "clean": verdicts.clean_accuracy,
                "robust": verdicts.robust_accuracy,
                "low": low,
                "high": high,
                "audit_deviation": verdicts.audit_deviation,
                "calls": verdicts.calls,
                "findings": [finding.to_dict() for finding in verdicts.findings],
            }
            | stage_record(
                self._flops, verdicts.calls, self.energy.total("evaluation", evaluation=recipe.evaluation_id)
            ),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    @property
    def _flops(self) -> PassFlops:
        return of_recipe(self.recipe, self.dataset.classes, self.dataset.image_shape)

    # -- what is reported on the way --------------------------------------------------------------------------------

    def _report(self, phase: str, fraction: float, note: str, key: str) -> None:
        if self.world.leads:
            self.progress(Progress(phase, fraction, note, key))

    def _report_epoch(self, epoch: int, robust: float | None = None) -> None:
        note = f"epoch {epoch}/{self.recipe.epochs}"
        note += "" if robust is None else f", validation {100 * robust:.1f}% robust"
        self._report("train", TRAINING_SHARE * epoch / self.recipe.epochs, note, f"epoch {epoch}")

    def _report_evaluation(self, now: EvaluationProgress) -> None:
        if self.world.leads and now.attack not in self.attacks:
            self.attacks.add(now.attack)
            self.folder.log("attack", attack=f"{self.recipe.evaluation_id} {now.attack}")
        fraction = TRAINING_SHARE + (1 - TRAINING_SHARE) * now.fraction
        self._report("evaluate", fraction, f"{now.attack}, {100 * now.robust:.1f}% robust so far", now.attack)

    def _notice(self, text: str) -> None:
        if self.world.leads:
            self.folder.log("notice", text=text)
        self._report("train", 0.0, text, text)


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
    progress: Callable[[EvaluationProgress], None] | None,
    backward: Backward = "own",
    surrogate_flops: Callable[[], PassFlops | None] = lambda: None,
    known: Verdicts | None = None,
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
    with energy.window("evaluation", **about):
        evaluator = Evaluator(model, specification, device, folder / "state", progress, energy.window, backward, known)
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


def _evaluated(folder: Path) -> bool:
    return (folder / "result.json").exists()


# -- where a run executes ----------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: RunFolder, recipe: Recipe, world: World, over: int | None) -> Iterator[None]:
    """The folder, made and leased by the first process; the others go on once it is, under the same lease."""
    if not world.leads:
        world.barrier()
        with folder.shared():
            yield
        return
    folder.open(recipe)
    with folder.lock(over=Observer().wait(folder.path) if over is None else over):
        world.barrier()
        yield


@contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    if not deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.get_deterministic_debug_mode()
    # `use_deterministic_algorithms` sets the same flag, and imports torch's compiler (3 s) to tell it too.
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


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
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        why = f": {why_no_gpu()}" if gpus == 0 else ""
        raise InputError(f"device = {name!r}, but this machine has {gpus} CUDA GPUs{why} (allowed: auto, cpu)")
    return device


def _chosen(site: Site) -> dict[str, Any]:
    """What was asked of the site: beside its defaults, paths left out."""
    asked = site.model_dump(exclude_defaults=True, exclude={"data_root", "synthetic_root", "teacher"})
    return {"tf32": site.tf32, "site": asked}


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
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **(cuda_versions(device) if device.type == "cuda" else {}),
    }


def cuda_versions(device: torch.device) -> dict[str, Any]:
    """Versions of what computes on a GPU, and how many GPUs there are (the driver by NVML, None where it is silent)."""
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "driver": driver_version(),
        "gpus": torch.cuda.device_count(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
    }
