"""Labels for generated images by a trained classifier (pseudo-labels; Carmon et al. 2019)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from robudget.data.dataset import Dataset, Split, to_unit
from robudget.data.stream import Prepared
from robudget.errors import InputError
from robudget.models.build import build_for
from robudget.recipe import Recipe
from robudget.training.checkpoint import load_weights


def relabel(
    prepared: Prepared, recipe: Recipe, dataset: Dataset, teacher: str | Path | None, device: torch.device
) -> Prepared:
    """`prepared` with the synthetic labels replaced by the teacher's, where the recipe says so.

    `teacher`: weights as safetensors with their recipe in the metadata, as a run leaves them. Raises InputError where
    there is none, or where it was trained for other classes or images.
    """
    if not recipe.synthetic.relabel or prepared.synthetic is None:
        return prepared
    if teacher is None:
        raise InputError("synthetic.relabel = true needs synthetic.teacher=<best.safetensors of a run>")
    model = load_teacher(Path(teacher), dataset).to(device)
    return replace(prepared, synthetic=_labelled(prepared.synthetic, model, device))


def load_teacher(path: Path, dataset: Dataset) -> nn.Module:
    """The classifier of `path` in eval mode. Raises InputError where it carries no recipe or doesn't fit `dataset`."""
    weights, about = load_weights(path)
    if "recipe" not in about:
        raise InputError(f"teacher {str(path)!r} carries no recipe, so its model is unknown (allowed: a run's weights)")
    recipe = Recipe.from_yaml(about["recipe"], where=f"the recipe in {path.name}")
    model = build_for(recipe, dataset)
    wanted = model.state_dict()
    odd = [name for name in wanted if name not in weights or weights[name].shape != wanted[name].shape]
    if odd or len(weights) != len(wanted):
        name = odd[-1] if odd else next(name for name in weights if name not in wanted)
        present, needed = (tuple(w[name].shape) if name in w else None for w in (weights, wanted))
        raise InputError(
            f"teacher {str(path)!r} was trained for other classes or images: {name} is {present}, but {dataset.name} "
            f"with {dataset.classes} classes needs {needed}"
        )
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def _labelled(split: Split, model: nn.Module, device: torch.device, batch_size: int = 512) -> Split:
    labels = [
        model(to_unit(split.images[first : first + batch_size].to(device))).argmax(1).cpu()
        for first in range(0, len(split), batch_size)
    ]
    return Split(split.images, torch.cat(labels))
