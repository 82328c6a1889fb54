"""One run, composed: data and model, training, evaluation, the meter around both, and the record.

From top to bottom: `run` prepares, then `_Run` trains, evaluates and records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch

from robudget import data, stop
from robudget.backend.device import answering
from robudget.data.dataset import sampled_fingerprint
from robudget.energy_log import EnergyLog
from robudget.environment import algorithms, chosen, environment, peak_memory, resolve_device
from robudget.evaluation.specification import Specification
from robudget.evaluation.state import Progress as EvaluationProgress
from robudget.evaluation.verdicts import Verdicts, merge
from robudget.execution import Site
from robudget.files import write_json
from robudget.lease import Observer
from robudget.meter.flops import (
    PassFlops,
    model_record,
    of_recipe,
    stage_record,
    totals,
    training_calls,
    training_record,
)
from robudget.meter.machine import open_meter
from robudget.metered import evaluate_metered, part_of
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
class Until:
    """Where a training pauses before its last epoch: after so many epochs (0: nowhere) and, with `collapse`, as soon as
    the collapse watch has fired."""

    epoch: int = 0
    collapse: bool = False

    def reached(self, epoch: int, collapsed_at: Sequence[int]) -> str:
        """Why to pause after this epoch; "" where not to."""
        if self.collapse and collapsed_at:
            return f"collapsed at epoch {collapsed_at[0]}"
        return f"epoch {epoch}" if 0 < self.epoch <= epoch else ""


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
    until: Until = Until(),
) -> RunResult:
    """Train `recipe`, evaluate it, meter both, and write the record to `store`; what is done already is only read.

    A run that was stopped, however, goes on where it was; one trained for another evaluation is only evaluated.
    Under `torchrun` all processes call it: training and evaluation are shared out, the first one writes and reports.
    `over` is for who has watched the run's lease already: the number of a stale one to take over, 0 for none; otherwise
    a lease of another host is watched here until it moves or has stood still for `lease.STALE_SECONDS`. `stop_token`:
    what the store's file of requests said when the sweep began (`stop.on_file`); default: what it says now.
    `until`: where the training pauses; what it has taken so far is then in `partial.json`.
    Raises `store.Busy` where another process has the run, InputError for what the user can mend, RunFailed when
    training diverges, stop.Stopped where that was requested (`stop.py`), stop.Paused.
    """
    site, folder = site or Site(), Store(store).folder(recipe)
    if folder.has(recipe):
        return RunResult(folder, folder.record())
    with (
        stop.on_file(Path(store), stop_token),
        claimed(site.threads, begun_with=folder.threads),
        algorithms(site.deterministic),
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
                    _Run(recipe, dataset, site, device, world, folder, energy, progress, until).complete()
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
    until: Until
    attacks: set[str] = field(default_factory=set)  # that this process has begun

    def complete(self) -> None:
        """Train and evaluate what is not done yet, and write the record."""
        if self.world.leads:
            with writing(self.folder.path):
                write_json(self.folder.path / "environment.json", environment(self.device) | chosen(self.site))
                self.folder.go_on()
        self.world.barrier()
        self.folder.log("start", rank=self.world.rank)
        training = self.folder.record() if self.folder.done else self.train()
        verdicts = self.evaluate()
        if self.world.leads:
            self.folder.finish(self.record(training, verdicts))
        self.world.barrier()

    def train(self) -> dict[str, Any]:
        """`trained`, at the end. Raises stop.Paused before that, where it shall."""
        recipe = self.recipe
        with self.energy.window("training", calls=dict):
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
            if why := self.until.reached(len(trainer.records), trainer.collapsed_at):
                self.pause(trainer, why)
            if slowest > stop.seconds_left():
                stop.request("the next epoch would not end in time")  # the trainer looks before it begins one
            began = time.monotonic()
            with self.energy.window("training", calls=lambda: trainer.calls):
                record = next(epochs)
            slowest = max(slowest, time.monotonic() - began)
            if self.world.leads:
                self.folder.log("epoch", **asdict(record))
            self._report_epoch(record.epoch, record.val_robust)
        return self.trained(trainer)

    def pause(self, trainer: Trainer, why: str) -> NoReturn:
        """Leave the training with what it has taken so far in `partial.json`."""
        with self.energy.window("training", calls=dict):
            trainer.leave()
        if self.world.leads:
            trained = self.trained(trainer)
            status = {"status": "paused", "why": why}
            self.folder.leave(self.head() | status | trained | {"training": self.trained_for(trained["training"])})
        self.world.barrier()
        raise stop.Paused(why)

    def trained(self, trainer: Trainer) -> dict[str, Any]:
        """The parts of the record that the training determines, as far as it has come."""
        recipe = self.recipe
        last, best, synthetic = trainer.records[-1], trainer.best, trainer.data.synthetic
        return {
            "environment": environment(self.device)
            | {"precision": trainer.precision.name, "processes": self.world.size, "arithmetic": trainer.arithmetic}
            | {"fast_paths": trainer.fast_paths}
            | {"physical_batch": trainer.physical.images or recipe.batch_size // self.world.size}
            | chosen(self.site),
            "dataset": {
                "name": self.dataset.name,
                "fingerprint": self.dataset.fingerprint,
                "train": len(trainer.data.rows),
                "validation": len(trainer.data.validation),
                "test": len(self.dataset.test),
                "synthetic": len(synthetic) if synthetic is not None else 0,
                "synthetic_fingerprint": sampled_fingerprint(synthetic) if synthetic is not None else None,
                "synthetic_fid": self.site.synthetic_fid,
            },
            "training": {
                "epochs": last.epoch,
                "steps": last.steps,
                "images_seen": last.images,
                "best_epoch": best.epoch if best is not None else None,
                "val_clean": best.val_clean if best is not None else None,
                "val_robust": best.val_robust if best is not None else None,
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
                cuda_graphs=self.site.cuda_graphs,
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
        recipe, threat = self.recipe, self.recipe.evaluation_threat
        low, high = verdicts.interval
        whole, asked = verdicts.total, {"evaluation": recipe.evaluation_id}
        kept = {f"evaluation_{way}": getattr(whole, way) for way in ("forward", "backward")}
        memory = max(peak_memory(), trained["environment"].get("memory_bytes", 0))  # an evaluation alone may take less
        return self.head() | {
            "status": "done",
            "environment": trained["environment"] | {"memory_bytes": memory},
            "dataset": trained["dataset"],
            "training": self.trained_for(trained["training"]),
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
            | stage_record(self._flops, verdicts.calls, self.energy.total("evaluation", **asked))
            | self._lost("evaluation", kept, **asked),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def head(self) -> dict[str, Any]:
        """What every record begins with."""
        recipe = self.recipe
        model = model_record(self._flops)
        return {"id": recipe.id, "slug": recipe.slug, "recipe": recipe.to_dict(), "model": model}

    def trained_for(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """What `trained` says of the training, with its cost."""
        images, steps, calls = training["images_seen"], training["steps"], training["calls"]
        energy = self.energy.total("training")
        cost = training_record(self.recipe, self._flops, calls, images=images, steps=steps, energy=energy)
        return dict(training) | cost | self._lost("training", calls)

    def _lost(self, stage: str, kept: Mapping[str, int], **about: Any) -> dict[str, Any]:
        """FLOPs of killed attempts, which no other figure of FLOPs has in it (their energy is in the stage's)."""
        lost = self.energy.lost(stage, kept, **about)
        flops = totals(self._flops, training_calls(self.recipe, lost.calls, steps=0))
        return {"flops_lost": sum(flops.values()), "flops_lost_how": lost.how}

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
