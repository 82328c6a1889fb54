"""Common corruptions (Hendrycks & Dietterich 2019): computed by a library, or read from files in CIFAR-10-C's layout.

The library is imagecorruptions, in the fork that is kept up with today's numpy and scikit-image
(imagecorruptions-imaug; the original was last released in 2020). It has ImageNet-C's constants whatever the size of the
images, and needs 32 pixels or more; CIFAR-10-C was made with milder ones. So accuracies on corruptions that were
computed are not comparable with those on CIFAR-10-C.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robudget.data.dataset import Split
from robudget.data.keyed import key
from robudget.errors import InputError, unknown

KINDS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
MORE_KINDS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # for validation, in the paper's words
SEVERITIES = (1, 2, 3, 4, 5)
LEAST_PIXELS = 32
_SEEDED = ("glass_blur", "impulse_noise")  # draw from a generator of their own, seeded by an argument


@dataclass(frozen=True)
class Corrupted:
    """A test split under corruptions: `images(kind, severity, rows)` are uint8 (n, C, H, W), `source` says from where
    they come and `made` how: "computed" or "read"."""

    source: str
    made: str
    kinds: tuple[str, ...]
    images: Callable[[str, int, range], Tensor]


def kinds_of(names: Sequence[str]) -> tuple[str, ...]:
    """The kinds by these names (hyphens will do), the 15 of the benchmark without any. Raises InputError."""
    out = []
    for name in names:
        kind = name.replace("-", "_").lower()
        if kind not in (*KINDS, *MORE_KINDS):
            raise unknown("corruption", name, (*KINDS, *MORE_KINDS))
        out.append(kind)
    if len(set(out)) < len(out):
        raise InputError(f"corruptions = {', '.join(out)} (allowed: each once)")
    return tuple(out) or KINDS


def computed(split: Split, kinds: Sequence[str], *, seed: int = 0) -> Corrupted:
    """The split's images corrupted by the library. What is random in it depends on the seed, the kind, the severity and
    an image's row. Raises InputError where the library is not installed or the images are too small."""
    wanted = kinds_of(kinds)
    try:
        from importlib.metadata import version

        from imagecorruptions import corrupt
    except ImportError:
        raise InputError(
            "imagecorruptions, which computes corruptions, is not installed (pip install 'robudget[corruptions]'; or "
            "--corruption-root, a folder in CIFAR-10-C's layout)"
        ) from None
    channels, height, width = split.images.shape[1:]
    if min(height, width) < LEAST_PIXELS:
        raise InputError(f"corruptions of images of {height}×{width} pixels (allowed: those of {LEAST_PIXELS} or more)")

    def images(kind: str, severity: int, rows: range) -> Tensor:
        out = np.empty((len(rows), channels, height, width), dtype=np.uint8)
        # The library draws from numpy's global generator: it is seeded for each image, and put back.
        before = np.random.get_state()
        try:
            with redirect_stdout(io.StringIO()):  # it prints that it handles an exception
                for n, row in enumerate(rows):
                    number = key(seed, "corruption", kind, severity, row) % 2**32
                    np.random.seed(number)
                    picture = np.ascontiguousarray(split.images[row].numpy().transpose(1, 2, 0))
                    more: dict[str, Any] = {"seed": number} if kind in _SEEDED else {}
                    changed = corrupt(picture, corruption_name=kind, severity=severity, **more)
                    out[n] = changed.transpose(2, 0, 1)[:channels]
        finally:
            np.random.set_state(before)
        return torch.from_numpy(out)

    return Corrupted(f"imagecorruptions-imaug {version('imagecorruptions-imaug')}", "computed", wanted, images)


def read(root: Path, split: Split, kinds: Sequence[str]) -> Corrupted:
    """The split's images as the files of `root` have them: `<kind>.npy`, uint8 (5·N, H, W, C), severity by severity,
    and `labels.npy`, which have to be those of the split. Raises InputError for what is missing or does not fit."""
    wanted = kinds_of(kinds)
    n, (channels, height, width) = len(split), split.images.shape[1:]
    labels = _array(root / "labels.npy")
    if len(labels) not in (n, 5 * n) or not np.array_equal(labels[:n], split.labels.numpy()):
        raise InputError(f"{str(root / 'labels.npy')!r} has other labels than the {n} images of the test split")
    missing = [kind for kind in wanted if not (root / f"{kind}.npy").exists()]
    if missing:
        raise InputError(f"{str(root)!r} lacks {', '.join(f'{kind}.npy' for kind in missing)} (name the kinds it has)")
    arrays = {kind: _array(root / f"{kind}.npy") for kind in wanted}
    for kind, array in arrays.items():
        if array.shape != (5 * n, height, width, channels) or array.dtype != np.uint8:
            raise InputError(
                f"{root / kind!s}.npy is {array.dtype} {array.shape} "
                f"(allowed: uint8 {(5 * n, height, width, channels)}, five severities of the test split)"
            )

    def images(kind: str, severity: int, rows: range) -> Tensor:
        first = (severity - 1) * n
        part = arrays[kind][first + rows.start : first + rows.stop]
        return torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2)))

    return Corrupted(root.name, "read", wanted, images)


def _array(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from None
