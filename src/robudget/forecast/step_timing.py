"""Seconds that a step, a validation and a checkpoint of a recipe take on this machine, measured in a calibration.

It trains for a few seconds on images of noise, with the trainer that will do the work.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robudget.backend.batch_size import validation_size
from robudget.backend.device import current
from robudget.data.dataset import Dataset, Split, to_unit
from robudget.datasets import Sizes
from robudget.forecast.passes import TrainingPasses
from robudget.losses import LOSSES, LossName
from robudget.meter.conventions import exact_factor
from robudget.meter.cpu import machine_seconds, process_seconds
from robudget.meter.energy import JOULES_PER_KWH, Meter
from robudget.recipe import Recipe, wide_resnet
from robudget.training import Trainer
from robudget.training.craft import Adversary
from robudget.training.validation import Validator

_PROBE_IMAGES, _PROBE_IMAGES_LARGE_MODEL = 8, 2  # of the first step, whose time nobody knows yet
_PROBE_IMAGES_GPU = 128  # fewer would time the launch of kernels
_LARGE_MODEL_FLOPS = 1e9  # of one image's forward pass
_SLOW, _SLOW_GPU = 1e10, 1e12  # FLOP a second that a machine is sure to do
_TOO_SLOW = 10  # a first step that takes so many times the seconds that it should is the only one
_LEAST_STEPS = 3  # one to warm up and two to time
_MOST_STEPS, _MOST_SECONDS = 200, 3.0  # timed for one number of attack steps
_DISK_BYTES_PER_SECOND = 3e8  # of a checkpoint, where none was written
_IMAGES_PER_CLASS = 4  # a hold-out needs some of every class


@dataclass(frozen=True)
class Work:
    """What a recipe's times go with: its loss, the FLOPs of one image's forward pass, batch size and parameters."""

    name: str
    loss: LossName
    forward: int
    batch_size: int
    parameters: int
    on_gpu: bool = False

    @property
    def update(self) -> float:
        """FLOPs of a step without its attack steps, which come on top where their number is free."""
        attack = 0.0 if LOSSES[self.loss].steps is not None else 2.0
        return (exact_factor(self.loss, 1) - attack) * self.forward * self.batch_size

    @property
    def probe_images(self) -> int:
        most = _PROBE_IMAGES_LARGE_MODEL if self.forward > _LARGE_MODEL_FLOPS else _PROBE_IMAGES
        most = _PROBE_IMAGES_GPU if self.on_gpu else most
        return min(most, self.batch_size)

    @property
    def slow_probe_seconds(self) -> float:
        """What the shortest measurement, two steps of a few images, takes on a slow machine."""
        flops = 2 * exact_factor(self.loss, 1) * self.forward * self.probe_images
        return flops / (_SLOW_GPU if self.on_gpu else _SLOW)


@dataclass(frozen=True)
class Times:
    """Seconds on this machine: a training step with K attack steps takes `step` + K·`attack`; a validation takes
    `per_image` + K·`per_attack` for each image; the end of an epoch (checkpoint) `epoch`.

    `batch_size` below the recipe's: a whole batch took too long, and the times are scaled up from this many images.
    `start`: what a GPU's first step takes beyond another one, for the choice of kernels and graphs.
    """

    step: float
    attack: float
    per_image: float
    per_attack: float
    epoch: float
    batch_size: int
    start: float = 0.0

    @classmethod
    def by_flops(cls, recipe: Recipe, trainer: Trainer, per_image: float) -> Times:
        """All from the seconds an image of one step with one attack step, in the proportion of their FLOPs."""
        pass_seconds = per_image / exact_factor(recipe.loss, 1, aligned=recipe.craft.grad_align > 0)
        attack = 0.0 if LOSSES[recipe.loss].steps is not None else 2 * pass_seconds * recipe.batch_size
        size = 12.0 * sum(p.numel() for p in trainer.model.parameters())  # bytes: weights twice and momentum, float32
        return cls(
            step=per_image * recipe.batch_size - attack,
            attack=attack,
            per_image=pass_seconds,
            per_attack=2 * pass_seconds,
            epoch=size / _DISK_BYTES_PER_SECOND,
            batch_size=trainer.recipe.batch_size,
        )

    def scaled(self, before: Work, now: Work) -> Times:
        """These times, of `before`, in the proportion of FLOPs to `now`; a checkpoint's in that of parameters."""
        forward, step = now.forward / before.forward, self.step * now.update / before.update
        if LOSSES[now.loss].steps is not None:
            attack = 0.0
        elif self.attack > 0:
            attack = self.attack * forward * now.batch_size / before.batch_size
        else:  # the loss before has one step by definition, which is in its update
            attack = step * 2 * now.forward * now.batch_size / now.update
        return Times(
            step=step,
            attack=attack,
            per_image=self.per_image * forward,
            per_attack=self.per_attack * forward,
            epoch=self.epoch * now.parameters / before.parameters,
            batch_size=now.batch_size,
            start=self.start,
        )

    def training_seconds(self, recipe: Recipe, plan: TrainingPasses) -> float:
        steps = recipe.craft.steps if recipe.adversarial else 0
        validation = plan.validated_images * self.per_image + plan.validated_attacks * self.per_attack
        return self.start + plan.steps * (self.step + steps * self.attack) + validation + plan.epochs * self.epoch


@dataclass(frozen=True)
class Calibration:
    """`times`, and the `watts` that this work drew by the meter, whose `how` and `method` these are. `others`: how many
    cores were busy with other processes meanwhile. `scaled_from`: the recipe that was timed instead of this one."""

    times: Times
    watts: float
    how: str
    method: str
    others: float
    scaled_from: str = ""

    def scaled(self, before: Work, now: Work) -> Calibration:
        return replace(self, times=self.times.scaled(before, now), scaled_from=before.name)


def layer_kind(recipe: Recipe) -> Hashable:
    """Models of one kind have the same layers in other numbers and widths, so that their times go with their FLOPs."""
    part, family = recipe.model, "wrn" if wide_resnet(recipe.model.name) else recipe.model.name
    return (
        family,
        part.activation,
        part.variant,
        recipe.precision,
        recipe.craft.batchnorm,
        recipe.data.name,
        recipe.differentiates_twice,
    )


def timing_key(recipe: Recipe) -> Hashable:
    """Recipes with the same key take the same time a step, but for the number of attack steps."""
    part = recipe.with_({"model.init": None}).to_dict()
    names = ("model", "loss", "metric", "batch_size", "precision", "ema", "awp", "optim", "label_smoothing")
    craft = {name: part["craft"][name] for name in ("batchnorm", "precision", "objective", "grad_align")}
    augment = {name: part["data"][name] for name in ("name", "cutmix", "randaugment", "idbh", "image_size")}
    return str(({name: part[name] for name in names}, craft, augment))


def calibrate(
    recipe: Recipe, sizes: Sizes, meter: Meter, *, device: str, work: Work, attack_steps: int, seconds: float
) -> Calibration:
    """Measure for about `seconds`. `attack_steps`: the most that will be asked for (the straight line through 1 and
    this many is used for every number between)."""
    start, others = time.perf_counter(), machine_seconds() - process_seconds()
    noise = _noise(sizes, recipe.batch_size)
    with current(torch.device(device)), meter.window("calibration") as window:
        images = work.probe_images
        steps, trainer, _ = _time_steps(_variant(recipe, images, 1), noise, device, seconds / 10, least=1, most=2)
        per_image = min(steps) / images
        seconds -= time.perf_counter() - start
        times = Times.by_flops(recipe, trainer, per_image)
        if seconds > _LEAST_STEPS * per_image * 2 * 3:  # batches of two, with one and with two attack steps
            times = _measure(recipe, noise, device, per_image, attack_steps, seconds)
    others = machine_seconds() - process_seconds() - others
    energy = window.energy
    return Calibration(
        times=times,
        watts=energy.kwh * JOULES_PER_KWH / energy.seconds,
        how=energy.how,
        method=energy.method,
        others=max(others, 0.0) / energy.seconds,
    )


def _measure(recipe: Recipe, noise: Dataset, device: str, per_image: float, attack_steps: int, seconds: float) -> Times:
    most = 1 if LOSSES[recipe.loss].steps is not None else max(attack_steps, 2)
    batch_size = _affordable(recipe, seconds, per_image, most)
    if batch_size < recipe.batch_size:
        most = min(most, 2)
        batch_size = _affordable(recipe, seconds, per_image, most)
    scale, attack = recipe.batch_size / batch_size, 0.0
    times, trainer, begin = _time_steps(_variant(recipe, batch_size, 1), noise, device, seconds / 4)
    one = statistics.median(times) * scale
    if most > 1:
        times, trainer, begin = _time_steps(_variant(recipe, batch_size, most), noise, device, seconds / 4)
        attack = max(statistics.median(times) * scale - one, 0.0) / (most - 1)
    count = int(max(2, min(validation_size(recipe.batch_size), seconds / 8 / per_image)))
    validation, per_attack = _time_validation(trainer, noise, count)
    return Times(one - attack, attack, validation, per_attack, _time_checkpoint(trainer), batch_size, begin)


def _affordable(recipe: Recipe, seconds: float, per_image: float, most: int) -> int:
    """The largest batch of which three steps with one attack step and three with `most` take half of the time."""
    cost = _LEAST_STEPS * per_image * (1 + most)
    return int(max(2, min(recipe.batch_size, seconds / 2 / cost)))


def _variant(recipe: Recipe, batch_size: int, steps: int) -> Recipe:
    """The recipe with one step an epoch, no validation and no end, at a learning rate that changes nothing."""
    return recipe.with_(
        {
            "batch_size": batch_size,
            "epoch_images": batch_size,
            "epochs": 10**6,
            "optim.lr": 1e-9,
            "optim.warmup_epochs": 0,
            "optim.cooldown_epochs": 0,
            "craft.steps": steps,
            "craft.method": None,  # whose one step costs what one of PGD does
            "threat.warmup_epochs": 0,
            "model.init": None,
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
    recipe: Recipe, noise: Dataset, device: str, seconds: float, *, least: int = 2, most: int = _MOST_STEPS
) -> tuple[list[float], Trainer, float]:
    """Seconds of single steps after one to warm up, as many as fit; their trainer; what the first one took beyond them
    on a GPU, 0 on a CPU."""
    trainer = Trainer(recipe, noise, device=device)
    epochs = iter(trainer)

    def step() -> float:
        start = time.perf_counter()
        next(epochs)
        return time.perf_counter() - start

    first, on_gpu = step(), trainer.device.type == "cuda"
    if first > _TOO_SLOW * seconds and least == 1 and not on_gpu:  # a GPU's first step chooses kernels
        return [first], trainer, 0.0
    times: list[float] = []
    while len(times) < least or (sum(times) < min(seconds, _MOST_SECONDS) and len(times) < most):
        times.append(step())
    return times, trainer, max(first - statistics.median(times), 0.0) if on_gpu else 0.0


def _time_validation(trainer: Trainer, noise: Dataset, count: int) -> tuple[float, float]:
    """(seconds an image, seconds an image and attack step) of a validation in which every image is right."""
    images = noise.train.images[torch.arange(count) % len(noise.train)].to(trainer.device)
    trainer.model.eval()
    with torch.no_grad(), trainer.precision.autocast():
        x = to_unit(images).contiguous(memory_format=trainer.precision.memory_format)
        labels = trainer.model(x).argmax(1)
    size = validation_size(trainer.recipe.batch_size)
    validator = Validator(images, labels, 0, size, trainer.precision, trainer.world, Counter())

    def run(steps: int) -> float:
        start = time.perf_counter()
        validator(trainer.model, Adversary(trainer.recipe.threat.threat(), steps, 1e-6))
        return time.perf_counter() - start

    run(1)
    short, long = run(1), run(4)
    attack = (long - short) / 3
    if not 0 < attack < short:  # hidden by other work: in the proportion of FLOPs, a step being two passes
        attack = 2 * short / 3
    return (short - attack) / count, attack / count


def _time_checkpoint(trainer: Trainer) -> float:
    """Seconds that a checkpoint keeps a training waiting: a large one is written beside it."""
    with tempfile.TemporaryDirectory() as folder:
        trainer._saver.folder = Path(folder)
        start = time.perf_counter()
        trainer.save()
        seconds = time.perf_counter() - start
        trainer._saver.wait()
        return seconds


def _noise(sizes: Sizes, batch_size: int) -> Dataset:
    count = max(_IMAGES_PER_CLASS * sizes.classes, 2 * batch_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *sizes.image_shape), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(count) % sizes.classes)
    return Dataset("noise", split, split, tuple(str(c) for c in range(sizes.classes)), "noise")
