"""Decoded images, kept: a dataset is decoded once into uint8 arrays on disk and memory-mapped ever after."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robudget import files
from robudget.data.dataset import Dataset, Split, fingerprint
from robudget.data.keyed import key
from robudget.data.picture import decode, shape_of
from robudget.data.source import Part, Source
from robudget.errors import InputError

LAYOUT = 1  # raise it when what is stored, or how it is decoded, changes
_CHUNK = 512


def default_folder() -> Path:
    """`$ROBUDGET_CACHE`, else `$XDG_CACHE_HOME/robudget`, else `~/.cache/robudget`."""
    if own := os.environ.get("ROBUDGET_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robudget"


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
    entry = (folder or default_folder()) / f"{name}-{key(LAYOUT, name, identity, str(image_size)):016x}"
    if not (entry / "about.json").exists():
        _write(entry, parts, about, image_size)
    try:
        facts = json.loads((entry / "about.json").read_text("utf-8"))
        return {part: _open(entry, part) for part in parts}, facts
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
            splits[name] = _open(draft, name)
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


def _open(entry: Path, name: str) -> Split:
    # Copy-on-write: pages come from the disk when they are read, and nothing is ever written back.
    images = np.load(entry / f"{name}_images.npy", mmap_mode="c", allow_pickle=False)
    labels = np.load(entry / f"{name}_labels.npy", allow_pickle=False)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))
