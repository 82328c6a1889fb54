"""What several test folders share: recipes that train and are attacked in a second or two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The suite runs on small models, which more threads only slow down; children (sweep workers) inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from robudget.recipe import Recipe

SHARED = Path(__file__).resolve().parents[2] / "shared"

TINY = {
    "model.name": "wrn-10-1",
    "model.base": 2,
    "epochs": 2,
    "epoch_images": 256,
    "batch_size": 64,
    "craft.steps": 1,
    "validation.images": 20,
    "validation.steps": 2,
    "evaluation.images": 12,
}


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """Digits, a WideResNet of some thousand parameters, two short epochs, twelve images for the full ensemble."""
    return Recipe.load("digits", TINY)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published runs, CIFAR-10 and the reference model, where there is one beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return SHARED
