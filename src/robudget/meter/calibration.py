"""How long this machine takes for a step, a validation and a checkpoint of a recipe: measured for a few seconds on
pictures of noise, with the trainer that will do the work."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from robudget.data.dataset import Dataset, Split, to_unit
from robudget.meter.energy import JOULES_PER_KWH, Meter
from robudget.meter.schedule import Schedule, Sizes
from robudget.meter.share import machine_seconds, process_seconds
from robudget.recipe import Recipe
from robudget.training import Trainer
from robudget.training.validation import validate

_PROBE = 8  # images of the first, careful step
_STEPS, _SECONDS = 200, 3.0  # at most so many timed steps a point, and so long
_HELD = 256  # validation runs in batches of at least so many images
_CLASS_IMAGES = 4  # a hold-out needs some of every class


@dataclass(frozen=True)
class Calibration:
    """Seconds on this machine: a training step with K attack steps takes `step` + K·`attack`; a validation takes
    `per_image` + K·`per_attack` for each image; the end of an epoch (checkpoint) `epoch`.

    `watts`: what this work drew, by the meter, whose `how` and `method` these are. `batch` below the recipe's means
    that a whole batch did not fit the time and was scaled up. `spread`: relative standard error of the step's time.
    `others`: how many cores were busy with other processes meanwhile.
    """

    step: float
    attack: float
    per_image: float
    per_attack: float
    epoch: float
    watts: float
    how: str
    method: str
    batch: int
    spread: float
    others: float

    def training_seconds(self, recipe: Recipe, schedule: Schedule, right: float) -> float:
        steps = recipe.craft.steps if recipe.adversarial else 0
        held = (
            schedule.validations * schedule.held * (self.per_image + right * recipe.validation.steps * self.per_attack)
        )
        return schedule.steps * (self.step + steps * self.attack) + held + schedule.epochs * self.epoch


def key(recipe: Recipe) -> Hashable:
    """Recipes with the same key take the same time a step, but for the number of attack steps."""
    part = recipe.to_dict()
    kept = ("model", "loss", "batch_size", "precision", "ema", "optim", "label_smoothing")
    return (recipe.data.name, recipe.data.cutmix, recipe.craft.batchnorm, str({name: part[name] for name in kept}))


def calibrate(
    recipe: Recipe, sizes: Sizes, meter: Meter, *, device: str, attack_steps: int, seconds: float
) -> Calibration:
    """Measure for about `seconds`. `attack_steps`: the most that will be asked for (the line through 1 and this many is
    used for every number between)."""
    noise = _noise(sizes, recipe.batch_size)
    few_images = min(_PROBE, recipe.batch_size)
    probe, _ = _time_steps(_variant(recipe, few_images, 1), noise, device, seconds / 10, most=2)
    per_image = min(probe) / few_images
    many = max(attack_steps, 2) if recipe.adversarial else 1
    # Three steps of each kind, one of them to warm up, in half of the time; K attack steps cost up to K times one.
    batch = int(max(2, min(recipe.batch_size, seconds / 2 / (3 * per_image * (1 + many)))))
    if batch < recipe.batch_size:
        many = min(many, 2)
        batch = int(max(2, min(recipe.batch_size, seconds / 2 / (3 * per_image * (1 + many)))))
    scale = recipe.batch_size / batch
    before = machine_seconds() - process_seconds()
    with meter.window("calibration") as window:
        few, trainer = _time_steps(_variant(recipe, batch, 1), noise, device, seconds / 4)
        more = few
        if recipe.adversarial:
            more, trainer = _time_steps(_variant(recipe, batch, many), noise, device, seconds / 4)
    others = machine_seconds() - process_seconds() - before
    one, all_ = statistics.median(few) * scale, statistics.median(more) * scale
    attack = max(all_ - one, 0.0) / (many - 1) if recipe.adversarial else 0.0
    energy = window.energy
    count = int(max(2, min(max(recipe.batch_size, _HELD), seconds / 8 / per_image)))
    validation, per_attack = _time_validation(trainer, noise, count)
    return Calibration(
        step=one - attack,
        attack=attack,
        per_image=validation,
        per_attack=per_attack,
        epoch=_time_checkpoint(trainer),
        watts=energy.kwh * JOULES_PER_KWH / energy.seconds,
        how=energy.how,
        method=energy.method,
        batch=batch,
        spread=_spread(few, more),
        others=max(others, 0.0) / energy.seconds,
    )


def _variant(recipe: Recipe, batch: int, steps: int) -> Recipe:
    """The recipe with one step an epoch, no validation and no end, at a learning rate that changes nothing."""
    return recipe.with_(
        {
            "batch_size": batch,
            "epoch_images": batch,
            "epochs": 10**6,
            "optim.lr": 1e-9,
            "optim.warmup_epochs": 0,
            "craft.steps": steps,
            "data.amount": None,
            "synthetic.source": None,
            "validation.split": "holdout",
            "validation.fraction": 0.25,
            "validation.images": None,
            "validation.every": 10**6,
        }
    )


def _time_steps(
    recipe: Recipe, noise: Dataset, device: str, seconds: float, *, most: int = _STEPS
) -> tuple[list[float], Trainer]:
    """Seconds of single steps after one to warm up (as many as fit, two at least), and the trainer that made them."""
    trainer = Trainer(recipe, noise, device=device)
    epochs = iter(trainer)
    next(epochs)
    times: list[float] = []
    while len(times) < 2 or (sum(times) < min(seconds, _SECONDS) and len(times) < most):
        begun = time.perf_counter()
        next(epochs)
        times.append(time.perf_counter() - begun)
    return times, trainer


def _time_validation(trainer: Trainer, noise: Dataset, count: int) -> tuple[float, float]:
    """(seconds an image, seconds an image and attack step) of a validation in which the model is right everywhere."""
    images = noise.train.images[torch.arange(count) % len(noise.train)].to(trainer.device)
    memory_format, autocast = trainer.precision.memory_format, trainer.precision.autocast
    trainer.model.eval()
    with torch.no_grad(), autocast():
        labels = trainer.model(to_unit(images).contiguous(memory_format=memory_format)).argmax(1)

    def run(steps: int) -> float:
        begun = time.perf_counter()
        validate(
            trainer.model,
            images,
            labels,
            trainer.recipe.threat.threat(),
            steps=steps,
            step_size=1e-6,
            seed=0,
            batch_size=max(trainer.recipe.batch_size, _HELD),
            memory_format=memory_format,
            autocast=autocast,
            calls=Counter(),
        )
        return time.perf_counter() - begun

    run(1)
    short, long = run(1), run(4)
    attack = max(long - short, 0.0) / 3
    return max(short - attack, 0.0) / count, attack / count


def _time_checkpoint(trainer: Trainer) -> float:
    """Seconds of writing where to resume, as every epoch does."""
    with tempfile.TemporaryDirectory() as folder:
        trainer.folder = Path(folder)
        begun = time.perf_counter()
        trainer.save()
        return time.perf_counter() - begun


def _noise(sizes: Sizes, batch: int) -> Dataset:
    count = max(_CLASS_IMAGES * sizes.classes, 2 * batch)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *sizes.image_shape), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(count) % sizes.classes)
    return Dataset("noise", split, split, tuple(str(c) for c in range(sizes.classes)), "noise")


def _spread(*samples: Sequence[float]) -> float:
    """The largest relative standard error of the means."""
    return max(float(statistics.stdev(s)) / statistics.fmean(s) / math.sqrt(len(s)) for s in samples)
