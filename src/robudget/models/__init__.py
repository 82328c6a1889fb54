"""Classifiers: images in [0, 1] to logits, their input normalisation inside. `build(name, …)` makes any of them."""

from robudget.models.build import build, build_for, names
from robudget.models.layers import Normalize, Normalized
from robudget.models.wide_resnet import WideResNet

__all__ = ["Normalize", "Normalized", "WideResNet", "build", "build_for", "names"]
