"""From a recipe and a dataset to what a training reads: training images, held-out images, synthetic images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from robudget.data import synthetic
from robudget.data.dataset import HOLDOUT_SEED, Dataset, Split, stratified_rows
from robudget.errors import InputError
from robudget.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Prepared:
    """`real` is the published training split, of which the `rows` (int64) are trained on: a list of rows and no copy,
    since the images may be memory-mapped and larger than the memory."""

    real: Split
    rows: Tensor
    validation: Split
    synthetic: Split | None

    @cached_property
    def train(self) -> Split:
        """The images trained on, copied out."""
        return self.real[self.rows]


def prepare(
    recipe: Recipe, dataset: Dataset, synthetic_root: str | Path | None = None, cache: str | Path | None = None
) -> Prepared:
    """Hold out the validation images, take the first `data.amount` of the rest, then make or read the synthetic ones.

    In this order the validation images are the same for every recipe on this dataset, and a generator fitted here has
    seen only images that are trained on. `validation: paper` holds out nothing and validates on the test split.
    """
    real, images, amount = dataset.train, recipe.validation.images, recipe.data.amount
    if recipe.validation.split == "paper":
        rows, held = torch.arange(len(real)), dataset.test.first(images)
    else:
        rows, chosen = stratified_rows(real.labels, recipe.validation.fraction, dataset.classes, seed=HOLDOUT_SEED)
        _enough(images, len(chosen), "validation.images", "are held out")
        held = real[chosen[:images]]
    _enough(amount, len(rows), "data.amount", "are left to train on")
    without = Prepared(real, rows[:amount], held, None)
    generated = synthetic.make(recipe, lambda: without.train, dataset, synthetic_root, cache)
    return replace(without, synthetic=generated)


def _enough(asked: int | None, there: int, key: str, what: str) -> None:
    if asked is not None and asked > there:
        raise InputError(f"{key} = {asked}, but only {there} images {what}")
