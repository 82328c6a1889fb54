"""From a recipe and a dataset to what a training reads: training images, held-out images, synthetic images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robudget.data import synthetic
from robudget.data.dataset import Dataset, Split, hold_out
from robudget.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Prepared:
    train: Split
    validation: Split
    synthetic: Split | None


def prepare(
    recipe: Recipe, dataset: Dataset, synthetic_root: str | Path | None = None, cache: str | Path | None = None
) -> Prepared:
    """Hold out the validation images, take the first `data.amount` of the rest, then make or read the synthetic ones.

    In this order the validation images are the same for every recipe on this dataset, and a generator fitted here has
    seen only images that are trained on. `validation: paper` holds out nothing and validates on the test split.
    """
    if recipe.validation.split == "paper":
        rest, held = dataset.train, dataset.test
    else:
        rest, held = hold_out(dataset.train, recipe.validation.fraction, dataset.classes)
    train = rest.first(recipe.data.amount)
    generated = synthetic.make(recipe, train, dataset, synthetic_root, cache)
    return Prepared(train, held.first(recipe.validation.images), generated)
