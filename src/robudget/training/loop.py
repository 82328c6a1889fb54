"""Adversarial training: craft, update, average, validate, keep the best; epoch after epoch, resumable at any step."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from robudget import losses
from robudget.data.augment import crop_flip, cutmix
from robudget.data.dataset import Dataset, to_unit
from robudget.data.keyed import generator_for
from robudget.data.prepare import prepare
from robudget.data.stream import Stream
from robudget.errors import InputError, RunFailed
from robudget.models.build import build_for
from robudget.recipe import Recipe
from robudget.training import checkpoint
from robudget.training.craft import CraftMode, craft, cross_entropy, divergence
from robudget.training.ema import Ema
from robudget.training.optim import build_optimizer, lr_at, peak_lr
from robudget.training.precision import resolve
from robudget.training.records import Best, EpochRecord
from robudget.training.validation import Validation, validate

EXPLODED = 1e4  # a mean cross-entropy that large means logits beyond any use
Window = Callable[[str], AbstractContextManager[object]]


class Trainer:
    """Trains `recipe` on `dataset`: iterate over it for one `EpochRecord` per epoch that is still to do.

        trainer = Trainer(recipe, data.load("digits"), folder=path)
        for record in trainer: print(record.epoch, record.val_robust)
        model = trainer.best_model()

    With a `folder` it writes `last.pt` after every epoch and `best.safetensors` whenever validation improves, and a new
    Trainer on the same folder goes on from there to the same bits. `records` holds all epochs, those before a resume
    too. `window(name)` is entered around each epoch's "train" and "validation". `notify` gets one-line notices.

    Raises InputError for a recipe, data set or checkpoint that can't be used, RunFailed when the loss diverges.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        *,
        synthetic_root: str | Path | None = None,
        device: str | torch.device = "cpu",
        folder: Path | None = None,
        window: Window | None = None,
        notify: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.recipe, self.dataset, self.folder = recipe, dataset, folder
        self.device = torch.device(device)
        self._window: Window = window or (lambda name: nullcontext())
        self._notify = notify

        self.data = prepare(recipe, dataset, synthetic_root)
        self._stream = Stream(
            self.data.train,
            self.data.synthetic,
            batch_size=recipe.batch_size,
            share=recipe.synthetic.share,
            seed=recipe.seed,
            device=self.device,
        )
        self._held_images = self.data.validation.images.to(self.device)
        self._held_labels = self.data.validation.labels.to(self.device)

        model = build_for(recipe, dataset)
        self.precision = resolve(recipe.precision, self.device, model)
        self.model: nn.Module = model.to(self.device).to(memory_format=self.precision.memory_format)
        self.ema = Ema(self.model, recipe.ema.decay, warmup=recipe.ema.warmup) if recipe.ema.decay else None
        self._peak_lr = peak_lr(recipe.optim, recipe.batch_size)
        self._optimizer = build_optimizer(self.model, recipe.optim, self._peak_lr)
        self._crafting = CraftMode(self.model, recipe.craft.batchnorm)
        self._autocast = self.precision.autocast

        self.steps_per_epoch = max(1, (recipe.epoch_images or len(self.data.train)) // recipe.batch_size)
        self.steps = recipe.epochs * self.steps_per_epoch
        self.step = 0
        self.best: Best | None = None
        self.records: list[EpochRecord] = []
        self.calls: Counter[str] = Counter()
        self._best_weights: dict[str, Tensor] = {}
        self._start_epoch()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            state = checkpoint.load_last(folder, notify)
            if state is not None:
                self._restore(state)

    # -- the loop ------------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def __iter__(self) -> Iterator[EpochRecord]:
        while not self.done:
            with self._window("train"):
                self._train_epoch()
            yield self._end_epoch()

    def _train_epoch(self) -> None:
        self.model.train()
        while self.step < (len(self.records) + 1) * self.steps_per_epoch:
            self._train_step()

    def _train_step(self) -> None:
        recipe, begun = self.recipe, time.perf_counter()
        lr = lr_at(recipe.optim, self._peak_lr, self.step, steps=self.steps, steps_per_epoch=self.steps_per_epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        x, labels, target = self._batch()
        prepared = time.perf_counter()
        x_adv = self._craft(x, labels) if recipe.adversarial else None
        crafted = time.perf_counter()
        loss = self._update(x, x_adv, labels, target)
        updated = time.perf_counter()
        if self.ema is not None:
            self.ema.update()
        self._losses[self.step % self.steps_per_epoch] = loss
        self.step += 1
        self._seconds["data"] += prepared - begun
        self._seconds["craft"] += crafted - prepared
        self._seconds["update"] += updated - crafted
        self._seconds["ema"] += time.perf_counter() - updated

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """(images in [0, 1], hard labels, what the loss is measured against)."""
        recipe = self.recipe
        batch = self._stream.batch(self.step)
        generator = generator_for(self.device, recipe.seed, "augment", self.step)
        images = crop_flip(batch.images, crop=recipe.data.crop, flip=recipe.data.flip, generator=generator)
        labels = target = batch.labels
        if recipe.data.cutmix:
            images, target = cutmix(images, losses.smooth(labels, self.dataset.classes, 0.0), generator=generator)
            labels = target.argmax(1)  # the adversary attacks the label that covers most of the image
        if recipe.label_smoothing:
            target = losses.smooth(target, self.dataset.classes, recipe.label_smoothing)
        return to_unit(images).contiguous(memory_format=self.precision.memory_format), labels, target

    def _craft(self, x: Tensor, labels: Tensor) -> Tensor:
        recipe = self.recipe
        with self._crafting():
            if recipe.loss == "trades":
                with torch.no_grad(), self._autocast():
                    objective = divergence(self.model(x).float())
                self.calls["craft_forward"] += len(x)
            else:
                objective = cross_entropy(labels)
            x_adv = craft(
                self.model,
                x,
                objective,
                recipe.threat.threat(),
                steps=recipe.craft.steps,
                step_size=recipe.craft.step_size_for(recipe.threat.eps),
                start=recipe.craft.start,
                generator=generator_for(self.device, recipe.seed, "craft", self.step),
                autocast=self._autocast,
            )
        self.calls["craft_forward"] += recipe.craft.steps * len(x)
        self.calls["craft_backward"] += recipe.craft.steps * len(x)
        return x_adv

    def _update(self, x: Tensor, x_adv: Tensor | None, labels: Tensor, target: Tensor) -> Tensor:
        """One step of the optimizer; returns the loss, still on the device."""
        recipe = self.recipe
        self._optimizer.zero_grad(set_to_none=True)
        clean = adversarial = None
        with self._autocast():
            if recipe.loss in ("standard", "trades", "mart"):
                clean = self.model(x)
            if x_adv is not None:
                adversarial = self.model(x_adv)
        if clean is not None:
            clean = clean.float()
            self._correct["clean"] += (clean.detach().argmax(1) == labels).sum()
        if adversarial is not None:
            adversarial = adversarial.float()
            self._correct["craft"] += (adversarial.detach().argmax(1) == labels).sum()
        loss = self._loss(clean, adversarial, target)
        torch.autograd.backward(loss)
        if recipe.optim.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optim.clip, foreach=True)
        self._optimizer.step()
        passes = (clean is not None) + (adversarial is not None)
        self.calls["update_forward"] += passes * len(x)
        self.calls["update_backward"] += passes * len(x)
        return loss.detach()

    def _loss(self, clean: Tensor | None, adversarial: Tensor | None, target: Tensor) -> Tensor:
        beta = self.recipe.beta
        if clean is not None and adversarial is not None:
            pair = losses.trades if self.recipe.loss == "trades" else losses.mart
            return pair(clean, adversarial, target, beta)
        if adversarial is not None:
            return losses.at(adversarial, target)
        assert clean is not None
        return losses.standard(clean, target)

    # -- the end of an epoch -------------------------------------------------------------------------------------------

    def _end_epoch(self) -> EpochRecord:
        recipe, epoch = self.recipe, len(self.records) + 1
        history = self._losses.tolist()
        self._check_loss(history)
        held = None
        if epoch % recipe.validation.every == 0 or self.done:
            begun = time.perf_counter()
            with self._window("validation"):
                held = self._validate()
            self._seconds["validation"] = time.perf_counter() - begun
        best = held is not None and self._keep_if_best(epoch, held)
        seen = self.steps_per_epoch * recipe.batch_size
        clean, crafted = int(self._correct["clean"]), int(self._correct["craft"])
        record = EpochRecord(
            epoch=epoch,
            steps=self.step,
            images=self.step * recipe.batch_size,
            train_loss=sum(history) / len(history),
            train_acc=clean / seen if recipe.loss in ("standard", "trades", "mart") else None,
            craft_acc=crafted / seen if recipe.adversarial else None,
            val_clean=held.clean if held else None,
            val_robust=held.robust if held else None,
            val_images=held.images if held else 0,
            lr=self._optimizer.param_groups[0]["lr"],
            best=best,
            seconds=dict(self._seconds),
            calls=dict(self.calls),
        )
        self.records.append(record)
        self._start_epoch()
        self.save()
        return record

    def _start_epoch(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(("data", "craft", "update", "ema", "validation"), 0.0)
        self._losses = torch.full((self.steps_per_epoch,), math.nan, device=self.device)
        self._correct = {name: torch.zeros((), dtype=torch.int64, device=self.device) for name in ("clean", "craft")}

    def _check_loss(self, history: list[float]) -> None:
        for index, loss in enumerate(history):
            if not abs(loss) < EXPLODED:
                step = len(self.records) * self.steps_per_epoch + index
                lr = self._optimizer.param_groups[0]["lr"]
                raise RunFailed(
                    f"the loss is {loss} at step {step} of {self.steps} (lr {lr:.3g}); the last good checkpoint is of "
                    f"epoch {len(self.records)}; try a smaller optim.lr, warm-up or optim.clip"
                )

    def _validate(self) -> Validation:
        recipe = self.recipe
        return validate(
            self._final_model(),
            self._held_images,
            self._held_labels,
            recipe.threat.threat(),
            steps=recipe.validation.steps,
            step_size=recipe.validation.step_size_for(recipe.threat.eps),
            seed=recipe.seed,
            batch_size=max(recipe.batch_size, 256),
            memory_format=self.precision.memory_format,
            autocast=self._autocast,
            calls=self.calls,
        )

    def _final_model(self) -> nn.Module:
        """What is validated and kept: the average where there is one."""
        return self.ema.model if self.ema is not None else self.model

    @property
    def selected_by(self) -> str:
        """Robust validation accuracy; clean for a standard loss, whose most robust epoch is the untrained one."""
        return "val_robust" if self.recipe.adversarial else "val_clean"

    def _keep_if_best(self, epoch: int, held: Validation) -> bool:
        now = Best(epoch, held.clean, held.robust)
        if self.best is not None and now.score(self.selected_by) <= self.best.score(self.selected_by):
            return False
        self.best = now
        weights = self._final_model().state_dict()
        if self.folder is None:
            self._best_weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        else:
            about = {key: str(value) for key, value in asdict(now).items()}
            checkpoint.save_weights(self.folder / checkpoint.BEST, weights, self.recipe, about)
        return True

    def best_model(self) -> nn.Module:
        """A new model in eval mode with the best checkpoint's weights, contiguous float32, on the Trainer's device."""
        if self.best is None:
            raise InputError("no epoch has been validated yet, so there is no best checkpoint")
        weights = self._best_weights
        if self.folder is not None:
            weights, _ = checkpoint.load_weights(self.folder / checkpoint.BEST)
        model = build_for(self.recipe, self.dataset)
        model.load_state_dict(weights)
        return model.to(self.device).eval()

    # -- going on ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `last.pt` (nothing without a folder)."""
        if self.folder is None:
            return
        state: checkpoint.State = {
            "recipe_id": self.recipe.id,
            "setting": self._setting(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "ema": self.ema.state() if self.ema is not None else None,
            "best": asdict(self.best) if self.best else None,
            "records": [asdict(record) for record in self.records],
            "calls": dict(self.calls),
            "seconds": self._seconds,
            "losses": self._losses,
            "correct": self._correct,
        }
        checkpoint.save_last(self.folder, state)

    def _setting(self) -> dict[str, str | int]:
        """What has to be the same for a resumed run to reach the same bits, beside the recipe."""
        return {
            "data": self.dataset.fingerprint,
            "device": self.device.type,
            "precision": self.precision.name,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else 0,
        }

    def _restore(self, state: checkpoint.State) -> None:
        where = f"checkpoint in {str(self.folder)!r}"
        if state["recipe_id"] != self.recipe.id:
            raise InputError(f"{where} is of recipe {state['recipe_id']}, not {self.recipe.id}")
        for name, mine in self._setting().items():
            if state["setting"][name] != mine:
                raise InputError(f"{where} was made with {name} = {state['setting'][name]}, this run has {mine}")
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load(state["ema"])
        self.step = state["step"]
        self.best = Best(**state["best"]) if state["best"] else None
        self.records = [EpochRecord(**record) for record in state["records"]]
        self.calls = Counter(state["calls"])
        self._seconds = dict(state["seconds"])
        self._losses = state["losses"].to(self.device)
        self._correct = {name: count.to(self.device) for name, count in state["correct"].items()}
