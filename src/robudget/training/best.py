"""The model that a training leaves behind."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from robudget.models.build import ImageSpec, build_for
from robudget.recipe import Recipe
from robudget.training.checkpoint import load_weights


def best_model(recipe: Recipe, spec: ImageSpec, path: Path) -> nn.Module:
    """A new model in eval mode with the weights of `path` (a run's best.safetensors), contiguous float32, on the CPU.

    Raises InputError where they are missing or damaged.
    """
    model = build_for(recipe, spec)
    weights, _ = load_weights(path)
    model.load_state_dict(weights)
    return model.eval()
