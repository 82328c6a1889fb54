"""One function from a name to a classifier, for our own architectures and for any that timm knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from robudget.errors import InputError, unknown
from robudget.models.layers import ACTIVATIONS, Normalize, Normalized
from robudget.models.wide_resnet import WideResNet
from robudget.recipe import Recipe

# Offered in messages and in `robudget` listings; any depth 6n + 4 and any width are allowed.
EXAMPLES = (
    "wrn-10-1",
    "wrn-16-2",
    "wrn-16-4",
    "wrn-28-10",
    "wrn-34-10",
    "wrn-34-20",
    "wrn-70-16",
    "wrn-82-8",
    "wrn-94-16",
)

_WRN = re.compile(r"wrn-(\d+)-(\d+)")


class ImageSpec(Protocol):
    """What a model has to know of a dataset; `robudget.data.Dataset` has these."""

    @property
    def classes(self) -> int: ...
    @property
    def image_shape(self) -> tuple[int, int, int]: ...  # (channels, height, width)
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


def names() -> list[str]:
    """Our own names (examples of the families) followed by every model of the installed timm."""
    import timm

    return [*EXAMPLES, *timm.list_models()]


def build(
    name: str,
    *,
    classes: int,
    image_size: int,
    channels: int = 3,
    activation: str = "relu",
    variant: str = "original",
    base: int = 16,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A classifier with fresh weights: images (N, channels, image_size, image_size) in [0, 1] to logits (N, classes).

    `name` is `wrn-<depth>-<width>` or the name of a timm model. `activation`, `variant` and `base` are for our own
    architectures. `mean` and `std` per channel go into the first layer; without them a timm model takes the ones it
    is published with and ours take 0.5 and 0.25. Weights come from torch's global generator: seed it (or fork it)
    outside. Raises InputError for an unknown name, with the nearest one, and for sizes that the model can't take.
    """
    if classes < 2:
        raise InputError(f"classes = {classes} (allowed: at least 2)")
    if not 8 <= image_size <= 1024:
        raise InputError(f"image_size = {image_size} (allowed: 8 to 1024 pixels)")
    if match := _WRN.fullmatch(name.lower()):
        normalize = Normalize(mean or [0.5] * channels, std or [0.25] * channels)
        return WideResNet(
            int(match[1]),
            int(match[2]),
            classes=classes,
            normalize=normalize,
            channels=channels,
            activation=activation,
            variant=variant,
            base=base,
        )
    return _timm(name, classes, image_size, channels, activation, mean, std)


def build_for(recipe: Recipe, spec: ImageSpec) -> nn.Module:
    """The recipe's model for this dataset, weights drawn from `recipe.seed`; the global generator stays as it was."""
    channels, height, width = spec.image_shape
    if height != width:
        raise InputError(f"images of {height}×{width} pixels are not square")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build(
            recipe.model.name,
            classes=spec.classes,
            image_size=height,
            channels=channels,
            activation=recipe.model.activation,
            variant=recipe.model.variant,
            base=recipe.model.base,
            mean=spec.mean,
            std=spec.std,
        )


def _timm(
    name: str,
    classes: int,
    image_size: int,
    channels: int,
    activation: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> nn.Module:
    # timm takes a second to import, so only a name that is not ours pays for it.
    import timm

    if not timm.is_model(name):
        raise unknown("model", name, names())
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image_size
    try:
        body = timm.create_model(name, pretrained=False, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"model {name!r} can't be built for {image_size}×{image_size}×{channels}: {error}") from None
    published_mean = published.mean if published is not None else (0.5,) * 3
    published_std = published.std if published is not None else (0.25,) * 3
    normalize = Normalize(
        mean or _per_channel(published_mean, channels),
        std or _per_channel(published_std, channels),
    )
    return Normalized(normalize, body)


def _per_channel(values: Sequence[float], channels: int) -> Sequence[float]:
    """Published statistics are for three channels; another number of channels takes their average."""
    return values if len(values) == channels else [sum(values) / len(values)] * channels
