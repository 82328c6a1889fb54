"""Generated images as the field ships them: an npz with `image` uint8 (N, H, W, C) and `label` (N,) or (N, classes).

Arrays are mapped from inside the archive where they lie there uncompressed (np.savez), so that a million of them cost
no memory; compressed ones are unpacked once into the cache. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from robudget.data.cache import default_folder
from robudget.data.dataset import Split
from robudget.data.keyed import key
from robudget.data.source import identity_of
from robudget.errors import InputError


def read(path: Path, *, classes: int, cache: Path | None) -> Split:
    """The images and labels of `path`, memory-mapped. Labels are whole numbers, or a teacher's probabilities.

    Raises InputError for a file that is truncated or no npz, for objects, for wrong dtypes and shapes, and for labels
    out of range.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {
                name: _array(path, archive, name, cache)
                for name in ("image", "label")
                if f"{name}.npy" in archive.namelist()
            }
            stored = [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, struct.error) as error:
        raise InputError(f"npz {str(path)!r} is damaged or truncated: {error}") from None
    if missing := {"image", "label"} - set(arrays):
        raise InputError(
            f"npz {str(path)!r} has {stored} (allowed: image and label; {', '.join(sorted(missing))} missing)"
        )
    images, labels = arrays["image"], arrays["label"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(f"npz {str(path)!r}: image is {images.dtype} {images.shape} (allowed: uint8 (N, H, W, C))")
    if len(labels) != len(images) or len(images) == 0:
        raise InputError(f"npz {str(path)!r}: {len(images)} images and {len(labels)} labels (allowed: as many, some)")
    hard, soft = split_labels(labels, classes, f"npz {str(path)!r}")
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2), hard, soft)


def split_labels(labels: NDArray[Any], classes: int, where: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(int64 (N,), None) of whole numbers, or (largest class, probabilities) of a teacher's (N, classes)."""
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise InputError(f"{where}: labels span {low}…{high} (allowed: 0…{classes - 1})")
        return torch.from_numpy(np.array(labels, dtype=np.int64)), None
    if labels.ndim == 2 and np.issubdtype(labels.dtype, np.floating):
        soft = torch.from_numpy(np.array(labels, dtype=np.float32))
        if soft.shape[1] != classes:
            raise InputError(f"{where}: probabilities for {soft.shape[1]} classes (allowed: {classes})")
        if not bool((soft >= 0).all()) or not torch.allclose(soft.sum(1), torch.ones(len(soft)), atol=1e-3):
            raise InputError(f"{where}: the rows of label are no probabilities (allowed: at least 0, summing to 1)")
        return soft.argmax(1), soft
    raise InputError(
        f"{where}: label is {labels.dtype} {labels.shape} (allowed: whole numbers (N,) or probabilities (N, {classes}))"
    )


def _array(path: Path, archive: zipfile.ZipFile, name: str, cache: Path | None) -> NDArray[Any]:
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        unpacked: NDArray[Any] = np.load(_unpacked(path, archive, name, cache), mmap_mode="c", allow_pickle=False)
        return unpacked
    with path.open("rb") as file:
        # The local header repeats the name and has an extra field of its own length: only it says where the data is.
        file.seek(info.header_offset)
        header = file.read(30)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        file.seek(info.header_offset + 30 + name_length + extra_length)
        shape, fortran, dtype = _header(path, name, file)
        offset = file.tell()
    if fortran:
        raise InputError(f"npz {str(path)!r}: {name} is in Fortran order (allowed: C order)")
    if offset + dtype.itemsize * int(np.prod(shape)) > path.stat().st_size:
        raise InputError(f"npz {str(path)!r} is damaged or truncated: {name} goes past the end of the file")
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="c", offset=offset, shape=shape)


def _header(path: Path, name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise InputError(f"npz {str(path)!r}: {name} is no array: {error}") from None
    if dtype.hasobject:
        raise InputError(f"npz {str(path)!r}: {name} holds Python objects, which could run code (allowed: numbers)")
    return shape, fortran, dtype


def _unpacked(path: Path, archive: zipfile.ZipFile, name: str, cache: Path | None) -> Path:
    """The member as a file of its own in the cache, appearing there in one step."""
    folder = cache or default_folder()
    out = folder / f"npz-{key(identity_of(path, [path]), name):016x}.npy"
    if out.exists():
        return out
    with archive.open(f"{name}.npy") as packed:
        _header(path, name, packed)
    draft: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=f".{out.stem}-", dir=folder)
        with os.fdopen(handle, "wb") as file, archive.open(f"{name}.npy") as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
        os.replace(draft, out)
    finally:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
    return out
