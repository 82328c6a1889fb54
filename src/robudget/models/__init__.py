"""Classifiers: images in [0, 1] to logits, their input normalisation inside. `build(name, …)` makes any of them."""

from robudget.models.build import build, build_for, names
from robudget.models.preact import Normalize, Normalized, PreActNet, WideResNet

__all__ = ["Normalize", "Normalized", "PreActNet", "WideResNet", "build", "build_for", "names"]
