"""One function from a name to a classifier, for our own architectures and for any that timm knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from robudget.errors import InputError, hint
from robudget.models.preact import Normalize, Normalized, PreActNet, WideResNet
from robudget.recipe import Recipe, wide_resnet

PUBLISHED_BASE = 16  # of every architecture: at this base its widths are those it was published with
# Offered in messages; any depth 6n + 4 and any width are allowed.
EXAMPLES = (
    "wrn-10-1",
    "wrn-16-1",
    "wrn-16-2",
    "wrn-16-4",
    "wrn-28-10",
    "wrn-34-10",
    "wrn-34-20",
    "wrn-70-16",
    "wrn-82-8",
    "wrn-94-16",
    "preact-resnet-18",
    "rawrn-70-16",
)


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

    return [*EXAMPLES, *(name for name in timm.list_models() if not name.startswith("robudget_"))]


def build(
    name: str,
    *,
    classes: int,
    image_size: int,
    channels: int = 3,
    activation: str = "relu",
    variant: str = "original",
    base: int = 16,
    patch: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A classifier with fresh weights: images (N, channels, image_size, image_size) in [0, 1] to logits (N, classes).

    `name` is `wrn-<depth>-<width>`, `preact-resnet-18`, `rawrn-70-16` or the name of a timm model. Widths are the
    published ones times `base`/16: of our own architectures, and of timm's ViT, XCiT and ConvNeXt (whole channels an
    attention head). `activation` and `variant` are for our own; RaWideResNet is SiLU and deepmind by definition.
    `patch` is the patch size of a timm transformer where it is not to be the published one.
    `mean` and `std` per channel go into the first layer; without them a timm model takes the ones it is published with
    and ours take 0.5 and 0.25. Weights come from torch's global generator: seed it (or fork it) outside. Raises
    InputError for an unknown name, with the nearest one, and for sizes that the model can't take.
    """
    if classes < 2:
        raise InputError(f"classes = {classes} (allowed: at least 2)")
    if not 8 <= image_size <= 1024:
        raise InputError(f"image_size = {image_size} (allowed: 8 to 1024 pixels)")
    key = name.lower()
    wrn = wide_resnet(key)
    if wrn is None and key not in EXAMPLES:
        return _timm(name, classes, image_size, channels, patch, base, mean, std)
    if patch is not None:
        raise InputError(f"model.patch = {patch} with model {name!r}, which has no patches")
    normalize = Normalize(mean or [0.5] * channels, std or [0.25] * channels)
    if key == "rawrn-70-16":
        # Peng et al. 2023, table 6: stem 96, depths 30-31-10, widths 216-432-864.
        widths = [round(base * share) for share in (13.5, 27, 54)]
        return PreActNet(
            6 * base,
            [30, 31, 10],
            widths,
            classes=classes,
            normalize=normalize,
            channels=channels,
            activation="silu",
            variant="deepmind",
            excite=True,
        )
    if key == "preact-resnet-18":
        return PreActNet(
            4 * base,
            [2, 2, 2, 2],
            [4 * base * 2**stage for stage in range(4)],
            classes=classes,
            normalize=normalize,
            channels=channels,
            activation=activation,
            variant=variant,
        )
    assert wrn is not None
    return WideResNet(
        *wrn,
        classes=classes,
        normalize=normalize,
        channels=channels,
        activation=activation,
        variant=variant,
        base=base,
    )


def build_for(recipe: Recipe, spec: ImageSpec) -> nn.Module:
    """The recipe's model for this dataset, weights by `recipe.seed`; the global generator stays as it was."""
    channels, height, width = spec.image_shape
    if height != width:
        raise InputError(f"images of {height}×{width} pixels are not square (set data.image_size)")
    part = recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build(
            part.name,
            classes=spec.classes,
            image_size=height,
            channels=channels,
            activation=part.activation,
            variant=part.variant,
            base=part.base,
            patch=part.patch,
            mean=spec.mean,
            std=spec.std,
        )


def _timm(
    name: str,
    classes: int,
    image_size: int,
    channels: int,
    patch: int | None,
    base: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> nn.Module:
    # timm takes a second to import, so only a name that is not ours pays for it.
    import timm

    if not timm.is_model(name):
        near = hint(name, [*EXAMPLES, *timm.list_models()])
        raise InputError(f"unknown model {name!r}{near} (allowed: {', '.join(EXAMPLES)}, or any timm model)")
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels} | _widths(name, base)
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image_size
    if patch is not None:
        options["patch_size"] = patch
    try:
        body = timm.create_model(name, pretrained=False, **options).eval()
        # Many models take any size to be built, and fail on the first image of a size that they can't process.
        with torch.no_grad():
            body(torch.zeros(1, channels, image_size, image_size))
    except (AssertionError, RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"model {name!r} can't take images of {image_size}×{image_size}×{channels}: {reason}"
        ) from None
    published_mean = published.mean if published is not None else (0.5,) * 3
    published_std = published.std if published is not None else (0.25,) * 3
    normalize = Normalize(
        mean or _per_channel(published_mean, channels),
        std or _per_channel(published_std, channels),
    )
    return Normalized(normalize, body).train()


def _widths(name: str, base: int) -> dict[str, Any]:
    """What makes timm's model so many sixteenths as wide as published. Raises InputError for a family that has no such
    settings."""
    if base == PUBLISHED_BASE:
        return {}
    import timm

    with torch.device("meta"):
        published: Any = timm.create_model(name)
    family = type(published).__name__
    if family == "ConvNeXt":
        return {"dims": tuple(max(1, stage["num_chs"] * base // PUBLISHED_BASE) for stage in published.feature_info)}
    if family in ("VisionTransformer", "Xcit"):
        heads = published.blocks[0].attn.num_heads
        # Xcit's position encoding takes even numbers alone.
        return {"embed_dim": heads * max(2, 2 * round(published.embed_dim * base / (2 * PUBLISHED_BASE * heads)))}
    raise InputError(
        f"model.base = {base} with model {name!r} ({family}), whose width can't be changed (allowed: {PUBLISHED_BASE}, "
        "or a ViT, an XCiT, a ConvNeXt, or one of ours)"
    )


def _per_channel(values: Sequence[float], channels: int) -> Sequence[float]:
    """Published statistics are for three channels; another number of channels takes their average."""
    return values if len(values) == channels else [sum(values) / len(values)] * channels
