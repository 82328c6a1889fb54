"""ImageNet's validation images for an evaluation alone: all of them or a list, scaled and cut as a model wants it.

From `val/<wnid>/*.JPEG` (or the class folders themselves), or from parquet shards as on the Hub. Labels are the
positions of the classes' WordNet numbers among ImageNet's 1,000, also where a folder has fewer classes.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from robudget.data.dataset import Dataset, fingerprint
from robudget.data.decode import SUFFIXES, Part, decoded_part, folder_at, identity_of, opened
from robudget.data.layouts import FOLDER_TEST_NAMES, IMAGE_COLUMNS, LABEL_COLUMNS, SHARD_TEST_NAMES
from robudget.datasets import Preprocessing
from robudget.errors import InputError, hint

ROBUSTBENCH = "robustbench"  # the name of its list, which its package holds
_AT_ONCE = 64  # pictures decoded


def wnids() -> tuple[str, ...]:
    """The WordNet numbers of ImageNet's 1,000 classes, in the order of the labels (timm has them)."""
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo()
    return tuple(info.label_names())


def has_validation_alone(root: Path) -> bool:
    """Has this folder validation images of ImageNet, in folders named by WordNet numbers, and none to train on?"""
    return root.is_dir() and not (root / "train").is_dir() and any(_class_folders(_validation(root)))


def load(
    root: str | Path | None,
    *,
    image_list: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    cache: str | Path | None = None,
) -> Dataset:
    """The validation images of `root` as a data set without training images, decoded once.

    `image_list`: a file in RobustBench's format (a line `<wnid>/<file>` per image), or `robustbench` for the one in its
    package; the images come in the list's order. Raises InputError where the list and the folder do not match.
    """
    folder = folder_at(Path(root) if root is not None else None, "imagenet")
    how, names = preprocessing or Preprocessing(), wnids()
    wanted = None if image_list is None else read_list(image_list, names)
    shards = sorted(p for p in folder.rglob("*.parquet") if _split_of(p) in SHARD_TEST_NAMES)
    found = _in_shards(folder, shards) if shards else _in_folders(folder, names)
    if not found:
        raise InputError(
            f"{str(folder)!r} holds no validation images of ImageNet (allowed: val/<wnid>/*.JPEG, parquet)"
        )
    pictures = found if wanted is None else _listed(found, wanted, folder)
    labels = np.array([names.index(picture.wnid) for picture in pictures], dtype=np.int64)
    part = Part(labels, lambda: _processed(pictures, how))
    files = shards or [picture.path for picture in pictures]
    identity = f"{identity_of(folder, files)}|{how}|{'|'.join(picture.name for picture in pictures)}"
    test = decoded_part(
        "imagenet-val", identity, part, image_size=None, folder=Path(cache) if cache is not None else None
    )
    return Dataset("imagenet", test[:0], test, names, fingerprint(test), evaluation_only=True)


@dataclass(frozen=True)
class _Picture:
    """An image: its class, its name, and how to get at it: the path of a file, or of a shard with the row in it."""

    wnid: str
    name: str
    path: Path
    read: Callable[[], Any]


# -- the list ----------------------------------------------------------------------------------------------------------


def read_list(image_list: str | Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """(wnid, file name) of each line. Raises InputError."""
    path = _robustbench_list() if str(image_list) == ROBUSTBENCH else Path(image_list)
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the image list {str(path)!r}: {error}") from None
    out, known = [], set(names)
    for number, line in enumerate(lines, 1):
        wnid, slash, name = line.partition("/")
        if not slash or not name or wnid not in known:
            raise InputError(
                f"image list {str(path)!r}, line {number}: {line[:60]!r} (allowed: e.g. "
                f"n01440764/ILSVRC2012_val_00000293.JPEG{hint(wnid, names, 0.8)})"
            )
        out.append((wnid, name))
    if not out:
        raise InputError(f"image list {str(path)!r} is empty")
    most, times = Counter(out).most_common(1)[0]
    if times > 1:
        raise InputError(f"image list {str(path)!r} has {'/'.join(most)} {times} times (allowed: once)")
    return out


def _robustbench_list() -> Path:
    package = importlib.util.find_spec("robustbench")
    places = [] if package is None else list(package.submodule_search_locations or ())
    for place in places:
        if (path := Path(place) / "helper_files" / "imagenet_test_image_ids.txt").exists():
            return path
    raise InputError(
        "RobustBench's list of images comes with its package, which is not installed "
        "(pip install 'robudget[robustbench]'; or name a file)"
    )


def _listed(found: Sequence[_Picture], wanted: Sequence[tuple[str, str]], root: Path) -> list[_Picture]:
    """The pictures of the list, in its order."""
    by_name = {_number_of(picture.name): picture for picture in found}
    missing = [f"{wnid}/{name}" for wnid, name in wanted if _number_of(name) not in by_name]
    if missing:
        raise InputError(
            f"the image list does not match {str(root)!r}: {len(missing)} of its {len(wanted)} images are not there "
            f"({missing[0]} first)"
        )
    out = [by_name[_number_of(name)] for _, name in wanted]
    for (wnid, name), picture in zip(wanted, out, strict=True):
        if picture.wnid != wnid:
            raise InputError(
                f"the image list does not match {str(root)!r}: {name} is of {wnid} there and of {picture.wnid} here"
            )
    return out


def _number_of(name: str) -> str:
    """`ILSVRC2012_val_00000293`, which names an image whatever its file is called."""
    match = re.search(r"ILSVRC2012_val_\d{8}", name)
    return match[0] if match else Path(name).stem


# -- where the pictures are --------------------------------------------------------------------------------------------


def _validation(root: Path) -> Path:
    return next((root / name for name in FOLDER_TEST_NAMES if (root / name).is_dir()), root)


def _class_folders(root: Path) -> Iterator[Path]:
    return (p for p in sorted(root.iterdir()) if p.is_dir() and re.fullmatch(r"n\d{8}", p.name))


def _in_folders(root: Path, names: Sequence[str]) -> list[_Picture]:
    known, out = set(names), []
    for folder in _class_folders(_validation(root)):
        if folder.name not in known:
            raise InputError(f"{str(folder)!r} is no class of ImageNet's 1,000{hint(folder.name, names, 0.8)}")
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
            out.append(_Picture(folder.name, path.name, path, lambda path=path: path))  # type: ignore[misc]
    return out


def _in_shards(root: Path, shards: Sequence[Path]) -> list[_Picture]:
    out, names = [], wnids()
    for shard in shards:
        file = pq.ParquetFile(shard)
        image, label = (
            next((name for name in allowed if name in file.schema_arrow.names), None)
            for allowed in (IMAGE_COLUMNS, LABEL_COLUMNS)
        )
        if image is None or label is None:
            raise InputError(f"{str(shard)!r} has columns {file.schema_arrow.names} (allowed: an image and a label)")
        row = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[f"{image}.path", label])
            for value, number in zip(table[image].to_pylist(), table[label].to_pylist(), strict=True):
                if not 0 <= number < len(names):
                    raise InputError(f"{str(shard)!r} row {row}: label {number} (allowed: 0 to {len(names) - 1})")
                name = value.get("path") or f"{shard.name} row {row}"
                within = row - sum(file.metadata.row_group(g).num_rows for g in range(group))
                out.append(_Picture(names[number], name, shard, _Row(shard, image, group, within)))
                row += 1
    return out


@dataclass(frozen=True)
class _Row:
    """The bytes of a picture in a shard; a group of rows is read at a time, and the last one is kept."""

    shard: Path
    column: str
    group: int
    row: int

    def __call__(self) -> bytes:
        return _group(self.shard, self.column, self.group)[self.row]


@lru_cache(maxsize=1)
def _group(shard: Path, column: str, group: int) -> list[bytes]:
    values = pq.ParquetFile(shard).read_row_group(group, columns=[f"{column}.bytes"])[column].to_pylist()
    return [value["bytes"] for value in values]


def _split_of(path: Path) -> str:
    return path.name.split("-")[0].split(".")[0].lower()


# -- from a picture to an input ----------------------------------------------------------------------------------------


def _processed(pictures: Sequence[_Picture], how: Preprocessing) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(name, uint8 (3, H, W)) of each, a bounded number at a time."""
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(pictures), _AT_ONCE):
            some = pictures[first : first + _AT_ONCE]
            contents = [picture.read() for picture in some]
            where = [f"{picture.wnid}/{picture.name}" for picture in some]
            yield from zip(where, pool.map(process, where, contents, [how] * len(some)), strict=True)


def process(where: str, picture: Any, how: Preprocessing) -> NDArray[np.uint8]:
    """A picture (a path, or the bytes of a file) as uint8 (3, H, W), as torchvision's Resize and CenterCrop make it,
    bit for bit. Raises InputError for one that cannot be decoded, or is smaller than the cut."""
    try:
        image = opened(where, picture).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"corrupt image {where}: {error}") from None
    width, height = image.size
    if how.resize is not None:
        short, long = min(width, height), max(width, height)
        other = how.resize if how.square else int(how.resize * long / short)
        size = (how.resize, other) if width <= height else (other, how.resize)
        filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        image = image.resize(size, filters[how.interpolation])
    if how.crop is not None:
        width, height = image.size
        if min(width, height) < how.crop:
            raise InputError(f"image {where} has {height}×{width} pixels (allowed: at least {how.crop} to cut {how})")
        left, top = round((width - how.crop) / 2.0), round((height - how.crop) / 2.0)
        image = image.crop((left, top, left + how.crop, top + how.crop))
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
