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
from robudget.datasets import Sizes
from robudget.forecast.passes import Schedule
from robudget.meter.conventions import exact_factor
from robudget.meter.cpu import machine_seconds, process_seconds
from robudget.meter.energy import JOULES_PER_KWH, Meter
from robudget.recipe import Recipe
from robudget.training import Trainer
from robudget.training.step import Adversary
from robudget.training.validation import Validator

_PROBE = 8  # images of the first, careful step; two of a model that takes so many FLOPs an image
_HEAVY = 1e9
_ENDLESS = 10  # a first step that takes so many times its share is the only one
_STEPS_EACH = 3  # one to warm up and two to time
_STEPS, _SECONDS = 200, 3.0  # at most so many timed steps a point, and so long
_HELD = 256  # validation runs in batches of at least so many images
_FIXED = ("standard", "fgsm-rs", "n-fgsm")  # losses whose steps are not free to choose
_DISK = 3e8  # bytes a second of a checkpoint, where none was written
_CLASS_IMAGES = 4  # a hold-out needs some of every class


@dataclass(frozen=True)
class Times:
    """Seconds on this machine: a training step with K attack steps takes `step` + K·`attack`; a validation takes
    `per_image` + K·`per_attack` for each image; the end of an epoch (checkpoint) `epoch`.

    `batch` below the recipe's means that a whole batch did not fit the time and was scaled up. `spread`: relative
    standard error of a step's time, NaN where there were too few.
    """

    step: float
    attack: float
    per_image: float
    per_attack: float
    epoch: float
    batch: int
    spread: float

    @classmethod
    def by_flops(cls, recipe: Recipe, trainer: Trainer, per_image: float) -> Times:
        """All from the seconds an image of one step with one attack step, in the proportion of their FLOPs."""
        pass_seconds = per_image / exact_factor(recipe.loss, 1)
        attack = 0.0 if recipe.loss in _FIXED else 2 * pass_seconds * recipe.batch_size
        kept = 12.0 * sum(p.numel() for p in trainer.model.parameters())  # weights twice and momentum, float32
        return cls(
            step=per_image * recipe.batch_size - attack,
            attack=attack,
            per_image=pass_seconds,
            per_attack=2 * pass_seconds,
            epoch=kept / _DISK,
            batch=trainer.recipe.batch_size,
            spread=math.nan,
        )

    def training_seconds(self, recipe: Recipe, schedule: Schedule) -> float:
        steps = recipe.craft.steps if recipe.adversarial else 0
        held = schedule.held_images * self.per_image + schedule.held_attacks * self.per_attack
        return schedule.steps * (self.step + steps * self.attack) + held + schedule.epochs * self.epoch


@dataclass(frozen=True)
class Calibration:
    """`times`, and the `watts` that this work drew by the meter, whose `how` and `method` these are. `others`: how many
    cores were busy with other processes meanwhile."""

    times: Times
    watts: float
    how: str
    method: str
    others: float


def key(recipe: Recipe) -> Hashable:
    """Recipes with the same key take the same time a step, but for the number of attack steps."""
    part = recipe.to_dict()
    kept = ("model", "loss", "metric", "batch_size", "precision", "ema", "awp", "optim", "label_smoothing")
    craft = {name: part["craft"][name] for name in ("batchnorm", "precision")}
    augment = {name: part["data"][name] for name in ("name", "cutmix", "randaugment", "image_size")}
    return str(({name: part[name] for name in kept}, craft, augment))


def calibrate(
    recipe: Recipe, sizes: Sizes, meter: Meter, *, device: str, forward: int, attack_steps: int, seconds: float
) -> Calibration:
    """Measure for about `seconds`. `forward`: the model's FLOPs an image; `attack_steps`: the most that will be asked
    for (the line through 1 and this many is used for every number between)."""
    begun, before = time.perf_counter(), machine_seconds() - process_seconds()
    noise = _noise(sizes, recipe.batch_size)
    with meter.window("calibration") as window:
        few = 2 if forward > _HEAVY else min(_PROBE, recipe.batch_size)
        probe, trainer = _time_steps(_variant(recipe, few, 1), noise, device, seconds / 10, least=1, most=2)
        per_image = min(probe) / few
        left = seconds - (time.perf_counter() - begun)
        times = Times.by_flops(recipe, trainer, per_image)
        if left > _STEPS_EACH * per_image * 2 * 3:  # batches of two, with one and with two attack steps
            times = _measure(recipe, noise, device, per_image, attack_steps, left)
    others = machine_seconds() - process_seconds() - before
    energy = window.energy
    return Calibration(
        times=times,
        watts=energy.kwh * JOULES_PER_KWH / energy.seconds,
        how=energy.how,
        method=energy.method,
        others=max(others, 0.0) / energy.seconds,
    )


def _measure(recipe: Recipe, noise: Dataset, device: str, per_image: float, attack_steps: int, seconds: float) -> Times:
    many = 1 if recipe.loss in _FIXED else max(attack_steps, 2)
    batch = _affordable(recipe, seconds, per_image, many)
    if batch < recipe.batch_size:
        many = min(many, 2)
        batch = _affordable(recipe, seconds, per_image, many)
    scale = recipe.batch_size / batch
    few, trainer = _time_steps(_variant(recipe, batch, 1), noise, device, seconds / 4)
    more = few
    if many > 1:
        more, trainer = _time_steps(_variant(recipe, batch, many), noise, device, seconds / 4)
    one, all_ = statistics.median(few) * scale, statistics.median(more) * scale
    attack = max(all_ - one, 0.0) / (many - 1) if many > 1 else 0.0
    count = int(max(2, min(max(recipe.batch_size, _HELD), seconds / 8 / per_image)))
    validation, per_attack = _time_validation(trainer, noise, count)
    return Times(one - attack, attack, validation, per_attack, _time_checkpoint(trainer), batch, _spread(few, more))


def _affordable(recipe: Recipe, seconds: float, per_image: float, many: int) -> int:
    """The largest batch of which three steps with one attack step and three with `many` take half of the time."""
    cost = _STEPS_EACH * per_image * (1 + many)
    return int(max(2, min(recipe.batch_size, seconds / 2 / cost)))


def _variant(recipe: Recipe, batch: int, steps: int) -> Recipe:
    """The recipe with one step an epoch, no validation and no end, at a learning rate that changes nothing."""
    return recipe.with_(
        {
            "batch_size": batch,
            "epoch_images": batch,
            "epochs": 10**6,
            "optim.lr": 1e-9,
            "optim.warmup_epochs": 0,
            "optim.cooldown_epochs": 0,
            "craft.steps": steps,
            "data.amount": None,
            "synthetic.source": None,
            "validation.split": "holdout",
            "validation.fraction": 0.25,
            "validation.images": None,
            "validation.every": 10**6,
            "collapse.action": "off",
            "awp.after_epochs": 0,
        }
    )


def _time_steps(
    recipe: Recipe, noise: Dataset, device: str, seconds: float, *, least: int = 2, most: int = _STEPS
) -> tuple[list[float], Trainer]:
    """Seconds of single steps after one to warm up, as many as fit, and the trainer that made them."""
    trainer = Trainer(recipe, noise, device=device)
    epochs = iter(trainer)
    begun = time.perf_counter()
    next(epochs)
    if (warm := time.perf_counter() - begun) > _ENDLESS * seconds and least == 1:
        return [warm], trainer
    times: list[float] = []
    while len(times) < least or (sum(times) < min(seconds, _SECONDS) and len(times) < most):
        begun = time.perf_counter()
        next(epochs)
        times.append(time.perf_counter() - begun)
    return times, trainer


def _time_validation(trainer: Trainer, noise: Dataset, count: int) -> tuple[float, float]:
    """(seconds an image, seconds an image and attack step) of a validation in which the model is right everywhere."""
    images = noise.train.images[torch.arange(count) % len(noise.train)].to(trainer.device)
    trainer.model.eval()
    with torch.no_grad(), trainer.precision.autocast():
        x = to_unit(images).contiguous(memory_format=trainer.precision.memory_format)
        labels = trainer.model(x).argmax(1)
    size = max(trainer.recipe.batch_size, _HELD)
    validator = Validator(images, labels, 0, size, trainer.precision, trainer.world, Counter())

    def run(steps: int) -> float:
        begun = time.perf_counter()
        validator(trainer.model, Adversary(trainer.recipe.threat.threat(), steps, 1e-6))
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
