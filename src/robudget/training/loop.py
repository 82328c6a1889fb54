"""Adversarial training: craft, update, average, validate, keep the best; epoch after epoch, resumable at any step."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from robudget import stop
from robudget.backend.batch_size import Physical, keep_freed_memory, validation_size
from robudget.backend.fast_paths import FastPaths
from robudget.backend.precision import check_training, float32_as, gains_in_training, resolve
from robudget.data.dataset import Dataset, sampled_fingerprint
from robudget.errors import InputError
from robudget.execution import Site
from robudget.files import make_folder
from robudget.losses import LOSSES
from robudget.models.build import build_for
from robudget.models.preact import checkpoint_activations
from robudget.recipe import Recipe
from robudget.training import checkpoint
from robudget.training.batches import Batches, prepare_once, relabel, steps_of_epoch
from robudget.training.batchnorm import synchronise_batchnorm
from robudget.training.class_means import ClassMeans
from robudget.training.clock import Looks, Stopwatch
from robudget.training.distributed import current
from robudget.training.memory import FittingStep, chosen_batch
from robudget.training.optimisation import average_of, build_optimizer, lr_at, peak_lr
from robudget.training.prior import Memory
from robudget.training.records import PHASES, Best, Course, EpochRecord
from robudget.training.saver import SAVE_SECONDS, Saver
from robudget.training.step import Step
from robudget.training.sums import EpochSums
from robudget.training.validation import Validator, check_collapse, check_losses, validation_adversary

Window = Callable[[str], AbstractContextManager[object]]


class Trainer:
    """Trains `recipe` on `dataset`: iterate over it for one `EpochRecord` per epoch that is still to do.

        trainer = Trainer(recipe, data.load("digits"), folder=path)
        for record in trainer: print(record.epoch, record.val_robust)
        model = trainer.best_model()

    With a `folder` it writes `last.pt` after every epoch (and within one, every `save_seconds`) and `best.safetensors`
    whenever validation improves; a new Trainer on the same folder goes on from there to the same bits. Large
    checkpoints are copied to the CPU's memory and written while the training goes on, a minute apart or more: a kill
    loses at most `save_seconds` and the time of one writing. Asked to stop (`robudget.stop`), it saves after the step
    at hand and raises stop.Stopped, in all processes at the same step. `records` holds all epochs, those before a
    resume too. Of the `site`, which does not change what is trained: `synthetic_root`, `teacher` (weights as
    safetensors with their recipe) and `weights` for recipes that ask for them, the latter only where there is no
    checkpoint to go on from; `checkpointing` recomputes activations in the backward pass to save memory.
    `window(name)` is entered around each epoch's "train" and "validation". `notify` gets one-line notices.
    `activation_bytes`: what an update keeps of one image in float32; from it and a GPU's free memory the physical batch
    is chosen where the site names none.

    Under an initialised torch.distributed every process makes the same Trainer, on its own `device`, and gets the same
    records: the batch is shared out, only the first one writes. With `site.sync_batchnorm` (default) BatchNorm's
    statistics are those of the whole batch, so that the result does not depend on the number of processes.

    Raises InputError for a recipe, data or checkpoint that can't be used, RunFailed when the loss diverges,
    stop.Stopped.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        site: Site = Site(),  # noqa: B008 (frozen)
        *,
        device: str | torch.device = "cpu",
        folder: Path | None = None,
        window: Window | None = None,
        notify: Callable[[str], None] = warnings.warn,
        save_seconds: float = 600.0,
        activation_bytes: int | None = None,
    ) -> None:
        self.recipe, self.dataset, self.site = recipe, dataset, site
        self.device, self.world = torch.device(device), current()
        self._window: Window = window or (lambda name: nullcontext())
        self._notify, self._save_seconds = notify, save_seconds
        if self.device.type == "cpu":
            keep_freed_memory()
        if recipe.batch_size % self.world.size:
            raise InputError(f"batch_size = {recipe.batch_size} can't be shared by {self.world.size} processes")

        data = prepare_once(recipe, dataset, site.synthetic_root, self.world)
        self.data = relabel(data, recipe, dataset, site.teacher, self.device, self.world)
        synthetic = self.data.synthetic
        self._synthetic = sampled_fingerprint(synthetic) if synthetic is not None else "none"
        self.steps_per_epoch = steps_of_epoch(recipe, self.data)
        self.steps = recipe.epochs * self.steps_per_epoch

        model = build_for(recipe, dataset)
        if recipe.model.init is not None and not checkpoint.begun(folder):
            checkpoint.start_from(model, recipe, site.weights)
        if self.world.size > 1 and site.sync_batchnorm:
            synchronise_batchnorm(model)
        if site.checkpointing and recipe.differentiates_twice:
            raise InputError(
                "checkpointing = true with a penalty on gradients, whose passes it would repeat (allowed: false)"
            )
        if site.checkpointing:
            checkpoint_activations(model, recipe.model.name)
        gains = partial(gains_in_training, model)
        check_training(recipe.precision, self.device)
        check_training(recipe.craft.precision, self.device)
        self.precision = craft_precision = resolve(recipe.precision, self.device, gains)
        if recipe.craft.precision != "same":
            craft_precision = resolve(recipe.craft.precision, self.device, gains)
        self.model: nn.Module = model.to(self.device).to(memory_format=self.precision.memory_format)
        self.ema = average_of(self.model, recipe.ema, steps_per_epoch=self.steps_per_epoch)
        self._craft_precision = craft_precision
        self._peak_lr = peak_lr(recipe.optim, recipe.batch_size)
        self._optimizer = build_optimizer(self.model, recipe.optim, self._peak_lr)
        self._batches = Batches(
            recipe,
            self.data,
            dataset.classes,
            device=self.device,
            world=self.world,
            memory_format=self.precision.memory_format,
        )
        self._calls: Counter[str] = Counter(dict.fromkeys(PHASES, 0))
        self._backwards = 0
        self._watch = Stopwatch(self.device)
        self._sums = EpochSums(self.steps_per_epoch, self.world, self.device)
        self.physical = Physical(site.physical_batch)
        if not site.physical_batch and activation_bytes is not None and not site.checkpointing:
            batch = recipe.batch_size // self.world.size
            self.physical.images = chosen_batch(recipe, batch, activation_bytes, model, self.precision, notify)
        self._fast = FastPaths(recipe, site, self.model, self.device, self.world.size, notify)
        self._step = Step(
            recipe,
            self.model,
            self._optimizer,
            self.ema,
            precision=self.precision,
            craft_precision=craft_precision,
            world=self.world,
            watch=self._watch,
            calls=self._calls,
            steps_per_epoch=self.steps_per_epoch,
            physical=self.physical,
            graphs=self._fast.graphs,
            update=self._fast.update,
        )
        if LOSSES[recipe.loss].remembers:
            if self.world.size > 1:
                raise InputError(
                    f"loss = {recipe.loss!r} on {self.world.size} processes: what it remembers is in one (allowed: 1)"
                )
            self._step.rows_of, self._step.images = self._batches.rows, len(self.data.rows)
        self._fitting_step = FittingStep(
            self._step,
            self.model,
            self._optimizer,
            self.physical,
            world=self.world,
            calls=self._calls,
            notify=notify,
        )
        self._validator = Validator(
            self.data.validation.images.to(self.device),
            self.data.validation.labels.to(self.device),
            recipe.seed,
            validation_size(recipe.batch_size),
            craft_precision,
            self.world,
            self._calls,
            physical=self.physical,
        )

        self.step = 0
        self._course = Course(recipe, notify)
        copies = 2 + (self.ema is not None)
        size = copies * sum(4 * p.numel() for p in self.model.parameters())
        self._saver = Saver(recipe, folder, leads=self.world.leads, size_bytes=size)
        self._looks = Looks(self.world, self.device)
        if folder is not None:
            if self.world.leads:
                make_folder(folder)
            state = checkpoint.load_last(folder, notify)
            if state is not None:
                self._restore(state)

    # -- the loop --------------------------------------------------------------------------------------------------

    @property
    def records(self) -> list[EpochRecord]:
        return self._course.records

    @property
    def best(self) -> Best | None:
        """The best validated epoch."""
        return self._course.best

    @property
    def stopped(self) -> str | None:
        """Why it ended before its epochs did."""
        return self._course.stopped

    @property
    def selected_by(self) -> str:
        return self._course.selected_by

    @property
    def done(self) -> bool:
        return self.step >= self.steps or self.stopped is not None

    @property
    def arithmetic(self) -> dict[str, str]:
        """What each part of the training multiplies in."""
        wide = "TensorFloat-32" if self.site.tf32 and self.device.type == "cuda" else "IEEE float32"
        update, craft = (wide if p.name == "float32" else p.name for p in (self.precision, self._craft_precision))
        low = self._craft_precision.name != "float32"
        return {"craft": craft, "update": update, "validation": craft if low else "IEEE float32"}

    @property
    def fast_paths(self) -> dict[str, str]:
        """Each one's name: "on", or "off" and why."""
        layout = "on" if self.precision.memory_format == torch.channels_last else "off: the update is in float32"
        return {"channels-last": layout} | self._fast.record

    @property
    def calls(self) -> dict[str, int]:
        """Image-passes so far by phase, as in `EpochRecord.calls`, of this process."""
        return dict(self._calls)

    @property
    def collapsed_at(self) -> list[int]:
        """Epochs (from 1) after which the collapse watch fired."""
        return [record.epoch for record in self.records if record.collapsed]

    def __iter__(self) -> Iterator[EpochRecord]:
        try:
            while not self.done:
                if self.step > 0:
                    self._stop_where_asked()
                with self._window("train"), float32_as(tf32=self.site.tf32), self._fast.tuned():
                    self._train_epoch()
                yield self._end_epoch()
        finally:
            self._saver.wait()

    def _train_epoch(self) -> None:
        self.model.train()
        last = (len(self.records) + 1) * self.steps_per_epoch
        self._watch.start()
        self._looks.begin(self.step)
        while self.step < last:
            self._train_step()
            if self.step < last and self._looks.due(self.step):
                self._look()

    def _train_step(self) -> None:
        recipe = self.recipe
        lr = lr_at(recipe.optim, self._peak_lr, self.step, steps=self.steps, steps_per_epoch=self.steps_per_epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * self._course.lr_scale
        x, labels, target = self._batches(self.step)
        self._watch.lap("data")
        outcome = self._fitting_step(x, labels, target, self.step)
        self._count_recomputed()
        self._sums.add(self.step % self.steps_per_epoch, outcome)
        self.step += 1

    def _count_recomputed(self) -> None:
        """With checkpointing, every pass with a backward has run its forward twice."""
        backwards = sum(count for name, count in self._calls.items() if name.endswith("_backward"))
        if self.site.checkpointing:
            self._calls["recompute_forward"] += backwards - self._backwards
        self._backwards = backwards

    def _look(self) -> None:
        """Now and then within an epoch: is the loss finite, is it time to save, was a stop asked for?"""
        self._mean_losses()
        save, asked = self._looks.agree(self.step, late=self._saver.seconds > self._save_seconds)
        if save and not asked:
            self.save()
            self._watch.lap("checkpoint")
        self._stop(asked)

    def _stop_where_asked(self) -> None:
        """Between epochs: to be called by all processes."""
        self._stop(bool(self.world.largest((stop.requested(),), self.device)[0]))

    def _stop(self, asked: bool) -> None:
        """`leave`, and raise stop.Stopped, where one of the processes was `asked` to."""
        if asked:
            self.leave()
            stop.request("another process was asked to stop")
            stop.check()

    # -- the end of an epoch ---------------------------------------------------------------------------------------

    def _end_epoch(self) -> EpochRecord:
        recipe, epoch = self.recipe, len(self.records) + 1
        history = self._mean_losses()
        validation, collapse = None, None
        self._watch.start()
        with self._window("validation"), float32_as(tf32=False):
            if epoch % recipe.validation.every == 0 or self.done:
                validation = self._validator(self.final_model, validation_adversary(recipe))
            if recipe.adversarial and recipe.collapse.action != "off":
                collapse = check_collapse(self.model, self._validator, recipe, self._course.multi_step)
        self._count_recomputed()
        self._watch.lap("validation")
        best = False
        if validation is not None:
            found = Best(epoch, validation.clean, validation.robust)
            best = self._course.is_best(found)
            if best:
                self._saver.keep_best(found, self.final_model.state_dict())
        images = self.steps_per_epoch * recipe.batch_size
        clean, crafted = self._sums.correct()
        record = EpochRecord(
            epoch=epoch,
            steps=self.step,
            images=self.step * recipe.batch_size,
            train_loss=sum(history) / len(history),
            train_acc=clean / images if LOSSES[recipe.loss].clean else None,
            craft_acc=crafted / images if recipe.adversarial else None,
            val_clean=validation.clean if validation else None,
            val_robust=validation.robust if validation else None,
            val_images=validation.images if validation else 0,
            lr=self._optimizer.param_groups[0]["lr"],
            best=best,
            one_step=collapse.one_step if collapse else None,
            multi_step=collapse.multi_step if collapse else None,
            collapsed=collapse is not None and collapse.collapsed,
            seconds=self._watch.read(),
            calls=self.world.totals(self._calls, self.device),
        )
        self._course.add(record, lambda: checkpoint.copied(self._weights()), self._load)
        self._watch.clear()
        self._sums.clear()
        if not self._saver.large or self.done or best or self._long_ago(SAVE_SECONDS):
            self.save()
        if self.done:
            self._saver.wait()
        return record

    def _long_ago(self, seconds: float) -> bool:
        """Was the last checkpoint so long ago, by the clock of any process?"""
        return bool(self.world.largest((self._saver.seconds > seconds,), self.device)[0])

    def _mean_losses(self) -> list[float]:
        """This epoch's losses so far, by step, averaged over the processes. Raises RunFailed where they diverge."""
        history = self._sums.losses()
        check_losses(
            history,
            first=len(self.records) * self.steps_per_epoch,
            steps=self.steps,
            lr=self._optimizer.param_groups[0]["lr"],
            epoch=len(self.records),
            precision=self.precision.name,
        )
        return history

    @property
    def final_model(self) -> nn.Module:
        """What is validated and saved: the average where there is one and the recipe says so."""
        return self.ema.model if self.ema is not None and self.recipe.ema.evaluate else self.model

    def best_model(self) -> nn.Module:
        """A new model in eval mode with the best checkpoint's weights, contiguous float32, on the Trainer's device."""
        if self.best is None:
            raise InputError("no epoch has been validated yet, so there is no best checkpoint")
        return self._saver.best_model(self.dataset).to(self.device)

    # -- going on --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `last.pt` (nothing without a folder), a large one in the background. Every process calls it, the first
        one writes."""
        if self._saver.folder is None:
            return
        delta, calls = self._step.delta, self.world.totals(self._calls, self.device)
        state: checkpoint.State = {
            "recipe_id": self.recipe.id,
            "setting": self._setting(),
            "processes": self.world.size,
            "step": self.step,
            **self._weights(),
            "delta": self.world.whole(delta) if delta is not None else None,
            "memory": vars(memory) if (memory := self._step.memory) is not None else None,
            "class_means": vars(means) if (means := self._step.class_means) is not None else None,
            **self._course.state(),
            "calls": calls,
            "seconds": self._watch.read(),
            **self._sums.state(),
        }
        self._saver.save(state)

    def leave(self) -> None:
        """Save what is not saved yet, and wait until it is on the disk. Every process calls it."""
        if self._saver.step != self.step:
            self.save()
        self._saver.wait()

    def _weights(self) -> checkpoint.State:
        """Everything that an update changes."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "ema": self.ema.state() if self.ema is not None else None,
        }

    def _load(self, weights: checkpoint.State) -> None:
        self.model.load_state_dict(weights["model"])
        self._optimizer.load_state_dict(weights["optimizer"])
        if self.ema is not None:
            self.ema.load(weights["ema"])

    def _setting(self) -> dict[str, str | int | bool]:
        """What has to be the same for a resumed run to reach the same bits, beside the recipe."""
        return {
            "data": self.dataset.fingerprint,
            "synthetic images": self._synthetic,
            "device": self.device.type,
            "precision": self.arithmetic["update"].removeprefix("IEEE "),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
            "synchronised BatchNorm": self.site.sync_batchnorm,
        }

    def _restore(self, state: checkpoint.State) -> None:
        checkpoint.check_setting(state, self.recipe.id, self._setting(), f"checkpoint in {str(self._saver.folder)!r}")
        before = state.get("processes", state["setting"].get("processes"))
        if before != self.world.size:
            self._notify(
                f"begun on {before} processes, going on with {self.world.size}: equal up to rounding, not bit for bit"
            )
        self._load(state)
        if state["delta"] is not None:
            delta = state["delta"][self.world.mine].to(self.device)
            self._step.delta = delta.contiguous(memory_format=self.precision.memory_format)
        if (memory := state.get("memory")) is not None:  # a checkpoint of an earlier version has no such key
            self._step.memory = Memory(**{name: value.to(self.device) for name, value in memory.items()})
        if (means := state.get("class_means")) is not None:
            self._step.class_means = ClassMeans(**{name: value.to(self.device) for name, value in means.items()})
        self.step = state["step"]
        self._course.restore(state)
        if self.world.leads:  # the others go on counting from nothing, since totals are sums
            self._calls.update(state["calls"])
            self._backwards = sum(n for name, n in self._calls.items() if name.endswith("_backward"))
        self._watch.clear(state["seconds"])
        self._sums.restore(state)
