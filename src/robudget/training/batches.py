"""What a step trains on: augmented, mixed images in [0, 1] with their targets, a teacher's for generated images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robudget.data.augment import crop_flip, cutmix, randaugment
from robudget.data.dataset import Dataset, Split, to_unit
from robudget.data.idbh import idbh
from robudget.data.keyed import generator_for
from robudget.data.stream import Prepared, Stream, prepare
from robudget.errors import InputError
from robudget.models.build import build_for
from robudget.recipe import Recipe
from robudget.training import losses
from robudget.training.checkpoint import load_weights, misfit
from robudget.training.distributed import World, first_on_node


class Batches:
    """`batches(step)` → this process's (images float32 in [0, 1], hard labels, what the loss is measured against).

    A function of (recipe, step): nothing is remembered between calls, and the whole batch is the same whatever the
    number of processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        classes: int,
        *,
        device: torch.device,
        world: World,
        memory_format: torch.memory_format,
    ) -> None:
        self._recipe, self._classes, self._device, self._world = recipe, classes, device, world
        self._format = memory_format
        steps = steps_of_epoch(recipe, prepared)
        self._stream = Stream(
            prepared.real,
            prepared.synthetic,
            rows=prepared.rows,
            classes=classes,
            batch_size=recipe.batch_size,
            share=recipe.synthetic.phases[0][1],
            later=[(round(epochs * steps), share) for epochs, share in recipe.synthetic.phases[1:]],
            seed=recipe.seed,
            device=device,
            mine=world.mine,
        )

    def rows(self, step: int) -> Tensor:
        """int64 (N,): which of the real images trained on are batch `step`, where all of it are real."""
        return self._stream.rows(step)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        part, total, mine = self._recipe.data, self._recipe.batch_size, self._world.mine
        batch = self._stream.batch(step)
        generator = generator_for(self._device, self._recipe.seed, "augment", step)
        share: dict[str, Any] = {"generator": generator, "rows": mine, "total": total}
        if part.idbh is not None:
            images = idbh(batch.images, part.idbh, **share)
        else:
            images = crop_flip(batch.images, crop=part.crop, flip=part.flip, **share)
        if part.randaugment:
            images = randaugment(images, part.randaugment, **share)
        labels = batch.labels
        target = labels if batch.soft is None else batch.soft
        if part.cutmix:
            whole, targets = (self._world.whole(t) for t in (images, losses.smooth(target, self._classes, 0.0)))
            images, target = (t[mine] for t in cutmix(whole, targets, generator=generator))
            labels = target.argmax(1)  # the adversary attacks the label that covers most of the image
        if self._recipe.label_smoothing:
            target = losses.smooth(target, self._classes, self._recipe.label_smoothing)
        return to_unit(images).contiguous(memory_format=self._format), labels, target


def steps_of_epoch(recipe: Recipe, prepared: Prepared) -> int:
    """Updates of an epoch: whole batches of the mixed stream, at least one."""
    return max(1, (recipe.epoch_images or len(prepared.rows)) // recipe.batch_size)


def prepare_once(recipe: Recipe, dataset: Dataset, synthetic_root: str | Path | None, world: World) -> Prepared:
    """`prepare` of every process. Files are decoded into the cache by the first one of each machine before the others
    read them there; a mixture is fitted by the first of all, which gives its images to the others."""
    if recipe.synthetic.source != "mixture" or world.size == 1:
        return first_on_node(world, lambda: prepare(recipe, dataset, synthetic_root))
    prepared = prepare(recipe if world.leads else recipe.with_({"synthetic.source": None}), dataset)
    made = prepared.synthetic
    images, labels, soft = world.given([made.images, made.labels, made.soft] if made is not None else None)
    assert images is not None
    assert labels is not None
    return replace(prepared, synthetic=Split(images, labels, soft))


def relabel(
    prepared: Prepared,
    recipe: Recipe,
    dataset: Dataset,
    teacher: str | Path | None,
    device: torch.device,
    world: World = World(),  # noqa: B008 (frozen)
) -> Prepared:
    """`prepared` with the synthetic labels replaced by the teacher's, where the recipe says so.

    `teacher`: weights as safetensors with their recipe in the metadata, as a run leaves them. Raises InputError where
    there is none, or where it was trained for other classes or images. The processes of `world` share the work.
    """
    if not recipe.synthetic.relabel or prepared.synthetic is None:
        return prepared
    if teacher is None:
        raise InputError("synthetic.relabel = true needs synthetic.teacher=<best.safetensors of a run>")
    model = load_teacher(Path(teacher), dataset).to(device)
    return replace(prepared, synthetic=_labelled(prepared.synthetic, model, device, world))


def load_teacher(path: Path, dataset: Dataset) -> nn.Module:
    """The classifier of `path` in eval mode. Raises InputError where it carries no recipe or doesn't fit `dataset`."""
    weights, about = load_weights(path)
    if "recipe" not in about:
        raise InputError(f"teacher {str(path)!r} carries no recipe, so its model is unknown (allowed: a run's weights)")
    recipe = Recipe.from_yaml(about["recipe"], where=f"the recipe in {path.name}")
    model = build_for(recipe, dataset)
    if why := misfit(weights, model):
        raise InputError(
            f"teacher {str(path)!r} was trained for other classes or images than {dataset.name} with "
            f"{dataset.classes} classes: {why}"
        )
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def _labelled(split: Split, model: nn.Module, device: torch.device, world: World, batch_size: int = 512) -> Split:
    labels = torch.zeros(len(split), dtype=torch.int64, device=device)
    for number, first in enumerate(range(0, len(split), batch_size)):
        if number % world.size == world.rank:  # whole batches, so that many processes label as one does
            rows = slice(first, first + batch_size)
            labels[rows] = model(to_unit(split.images[rows].to(device))).argmax(1)
    return Split(split.images, world.total(labels).cpu())
