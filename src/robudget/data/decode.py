"""From pictures in files to uint8 arrays: decoded once, kept on the disk, memory-mapped ever after.

Every reader of a file layout returns a `Source`: what it found, not decoded.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from robudget import files
from robudget.cache import home
from robudget.data.dataset import Dataset, Split, fingerprint
from robudget.data.keyed import key
from robudget.errors import InputError

# -- what a reader of a file layout returns ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One split: int64 labels (N,) and, in the same order, an iterator of (where, picture).

    A picture is a path, the bytes of an image file, or a uint8 array (C, H, W); `where` names it in messages.
    """

    labels: NDArray[np.int64]
    pictures: Callable[[], Iterator[tuple[str, Any]]]

    @classmethod
    def of_arrays(cls, where: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Part:
        """Of images (N, C, H, W) in memory, which `where` holds."""
        return cls(labels, lambda: ((f"{where} row {row}", image) for row, image in enumerate(images)))

    @classmethod
    def of_files(cls, root: Path, paths: list[Path], labels: NDArray[np.int64]) -> Part:
        """Of image files below `root`."""
        return cls(labels, lambda: ((str(path.relative_to(root)), path) for path in paths))


@dataclass(frozen=True)
class Source:
    """`identity` changes when the files do: their names, sizes and modification times."""

    name: str
    train: Part
    test: Part
    class_names: tuple[str, ...]
    identity: str


def identity_of(root: Path, paths: Iterable[Path]) -> str:
    """Names under `root`, sizes and modification times, as one string."""
    facts = []
    for path in sorted(paths):
        stat = path.stat()
        facts.append(f"{path.relative_to(root) if path != root else path.name}:{stat.st_size}:{stat.st_mtime_ns}")
    return f"{root.resolve()}|" + "|".join(facts)


def folder_at(root: Path | None, name: str) -> Path:
    """`root`, which must exist and hold something, or its folder called `name` where it has one, so that one
    root serves several datasets. Raises InputError."""
    if root is None:
        raise InputError(
            f"dataset {name!r} needs data.root=PATH, or --data-root PATH of robudget eval (nothing is downloaded)"
        )
    if not root.exists():
        raise InputError(f"data.root = {str(root)!r} does not exist")
    if root.is_dir() and not any(root.iterdir()):
        raise InputError(f"data.root = {str(root)!r} is an empty folder")
    return root / name if (root / name).is_dir() else root


# -- one picture ------------------------------------------------------------------------------------------------------

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def shape_of(where: str, picture: Any, image_size: int | None) -> tuple[int, int, int]:
    """(channels, height, width) that the first picture sets for all: its own, or the size that is asked for.

    Grey pictures stay at one channel; everything else is RGB.
    """
    if isinstance(picture, np.ndarray):
        c, h, w = picture.shape
        if image_size is not None and (h, w) != (image_size, image_size):
            raise InputError(f"data.image_size = {image_size}: {where} is stored as {h}×{w} pixels")
        return c, h, w
    image = opened(where, picture)
    channels = 1 if image.mode in ("1", "L", "I;16") else 3
    return (channels, image_size, image_size) if image_size else (channels, image.height, image.width)


def decode(where: str, picture: Any, shape: tuple[int, int, int], *, resize: bool) -> NDArray[np.uint8]:
    """uint8 of `shape`. With `resize` the shorter side is scaled and the centre cut out; else the size must match.

    Raises InputError naming `where` for a picture that can't be decoded.
    """
    if isinstance(picture, np.ndarray):
        if picture.shape != shape or picture.dtype != np.uint8:
            raise InputError(f"{where} is {picture.dtype} {picture.shape} (allowed: uint8 {shape})")
        return picture
    channels, height, width = shape
    try:
        image = opened(where, picture).convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"corrupt image {where}: {error}") from None
    if resize and (image.height, image.width) != (height, width):
        scale = max(height / image.height, width / image.width)
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    if (image.height, image.width) != (height, width):
        raise InputError(
            f"image {where} has {image.height}×{image.width} pixels, the first one {height}×{width} "
            "(set data.image_size to scale them all)"
        )
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def opened(where: str, picture: Any) -> Image.Image:
    """A path or the bytes of a file as a picture that is not decoded yet. Raises InputError."""
    try:
        return Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture))
    except UnidentifiedImageError:
        raise InputError(f"corrupt image {where}: not a picture that can be read") from None
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise InputError(f"corrupt image {where}: {error}") from None


# -- the cache --------------------------------------------------------------------------------------------------------

LAYOUT = 1  # raise it when what is stored, or how it is decoded, changes
_CHUNK = 512  # pictures decoded at once


def decoded(source: Source, *, image_size: int | None, folder: Path | None) -> Dataset:
    """The dataset of `source`, from the cache where it has been decoded before.

    An entry is named by what was read: the files' paths, sizes and modification times, and the image size. It appears
    under its name in one step when it is complete, so a killed decoder leaves nothing that is trusted later. Raises
    InputError for a corrupt image and for a cache folder that can't be written.
    """
    parts = {"train": source.train, "test": source.test}

    def about(splits: dict[str, Split]) -> dict[str, Any]:
        # A Dataset is made here for its checks: what is not one never gets a name in the cache.
        print_ = fingerprint(*splits.values())
        whole = Dataset(source.name, splits["train"], splits["test"], source.class_names, print_)
        return {"class_names": list(whole.class_names), "fingerprint": whole.fingerprint}

    splits, facts = _entry(source.name, source.identity, parts, about, image_size=image_size, folder=folder)
    return Dataset(source.name, splits["train"], splits["test"], tuple(facts["class_names"]), facts["fingerprint"])


def decoded_part(name: str, identity: str, part: Part, *, image_size: int | None, folder: Path | None) -> Split:
    """A single split, kept in the same way."""
    splits, _ = _entry(name, identity, {"all": part}, lambda splits: {}, image_size=image_size, folder=folder)
    return splits["all"]


def _entry(
    name: str,
    identity: str,
    parts: dict[str, Part],
    about: Callable[[dict[str, Split]], dict[str, Any]],
    *,
    image_size: int | None,
    folder: Path | None,
) -> tuple[dict[str, Split], dict[str, Any]]:
    """The parts decoded, and what `about` says of them; read back if this entry is complete, else written first."""
    entry = (folder or home()) / f"{name}-{key(LAYOUT, name, identity, str(image_size)):016x}"
    if not (entry / "about.json").exists():
        _write(entry, parts, about, image_size)
    try:
        facts = json.loads((entry / "about.json").read_text("utf-8"))
        return {part: _mapped(entry, part) for part in parts}, facts
    except (OSError, ValueError) as error:
        raise InputError(f"the cached images {str(entry)!r} are damaged: {error} (delete that folder)") from None


def _write(
    entry: Path,
    parts: dict[str, Part],
    about: Callable[[dict[str, Split]], dict[str, Any]],
    image_size: int | None,
) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    except OSError as error:
        raise InputError(
            f"cannot write the image cache {str(entry.parent)!r}: {error.strerror} (set ROBUDGET_CACHE to a folder)"
        ) from None
    try:
        splits, shape = {}, None
        for name, part in parts.items():
            shape = _fill(draft, name, part.pictures(), part.labels, image_size, shape)
            splits[name] = _mapped(draft, name)
        files.write_json(draft / "about.json", about(splits))
        del splits
        try:
            draft.rename(entry)
        except OSError:
            # Another process was faster; its entry is the same, byte for byte.
            if not (entry / "about.json").exists():
                raise
    except OSError as error:
        raise InputError(f"cannot write the image cache {str(entry)!r}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(
    folder: Path,
    name: str,
    pictures: Iterator[tuple[str, Any]],
    labels: NDArray[np.int64],
    image_size: int | None,
    shape: tuple[int, int, int] | None,
) -> tuple[int, int, int]:
    """Decode `pictures` into `<name>_images.npy`, a chunk at a time, so that any number of them fits."""
    out: np.memmap[Any, Any] | None = None
    row = 0
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        while chunk := list(islice(pictures, _CHUNK)):
            shape = shape or shape_of(*chunk[0], image_size)
            if out is None:
                path = folder / f"{name}_images.npy"
                out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(labels), *shape))
            out[row : row + len(chunk)] = _stack(pool, chunk, shape, image_size)
            row += len(chunk)
    if out is None or shape is None or row != len(labels):
        raise InputError(f"the {name} split has {row} images and {len(labels)} labels (allowed: as many, at least one)")
    out.flush()
    np.save(folder / f"{name}_labels.npy", labels)
    return shape


def _stack(
    pool: ThreadPoolExecutor, chunk: Sequence[tuple[str, Any]], shape: tuple[int, int, int], image_size: int | None
) -> NDArray[np.uint8]:
    resize = image_size is not None
    return np.stack(list(pool.map(lambda item: decode(item[0], item[1], shape, resize=resize), chunk)))


def _mapped(entry: Path, name: str) -> Split:
    # Copy-on-write: pages come from the disk when they are read, and nothing is ever written back.
    images = np.load(entry / f"{name}_images.npy", mmap_mode="c", allow_pickle=False)
    labels = np.load(entry / f"{name}_labels.npy", allow_pickle=False)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))
