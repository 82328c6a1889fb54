"""Generated training images: from a mixture model fitted on the training images, or from files.

An npz is read as the field ships it: `image` uint8 (N, H, W, C) and `label` (N,) or (N, classes). Arrays are mapped
from inside the archive where they lie there uncompressed (np.savez), so that a million of them cost no memory;
compressed ones are unpacked once into the cache. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from robudget.cache import home
from robudget.data.dataset import Dataset, Split
from robudget.data.decode import decoded_part, identity_of
from robudget.data.keyed import key
from robudget.data.layouts import class_folders_part, classes_in, shards_part
from robudget.errors import InputError
from robudget.recipe import Recipe

_COMPONENTS = 24  # principal components that the mixtures live in
_MODES = 5  # Gaussians per class
_TIMES = 10  # images made where the recipe gives no amount, as a multiple of the real ones


def make(
    recipe: Recipe,
    train: Callable[[], Split],
    dataset: Dataset,
    root: str | Path | None,
    cache: str | Path | None = None,
) -> Split | None:
    """The recipe's synthetic images, or None where it has no source (or a fraction of 0). `train` hands over the
    training images where a generator is to be fitted. Raises InputError."""
    if recipe.synthetic.share == 0:
        return None
    if recipe.synthetic.source == "mixture":
        images = train()
        return mixture(images, dataset.classes, recipe.synthetic.amount or _TIMES * len(images))
    if root is None:
        raise InputError("synthetic.source = 'file' needs synthetic.root=<npz, parquet or folder>")
    split = read(Path(root), dataset, cache=Path(cache) if cache is not None else None)
    return split.first(recipe.synthetic.amount)


def read(root: Path, dataset: Dataset, *, cache: Path | None) -> Split:
    """Images of `root`: an npz, a parquet file, a folder of parquet shards, or a folder of class sub-folders.

    Class sub-folders are called as the dataset's classes are, or by their numbers. Raises InputError where the files
    can't be read, or don't fit the dataset in size or classes.
    """
    if not root.exists():
        raise InputError(f"synthetic.root = {str(root)!r} does not exist")
    shards = [root] if root.suffix == ".parquet" else sorted(root.rglob("*.parquet")) if root.is_dir() else []
    if root.suffix == ".npz":
        split = read_npz(root, classes=dataset.classes, cache=cache)
    elif shards:
        part = shards_part(shards)
        split = decoded_part("synthetic", identity_of(root, shards), part, image_size=None, folder=cache)
    elif root.is_dir() and (names := classes_in(root)):
        wanted = dataset.class_names
        if names not in (tuple(sorted(wanted)), tuple(sorted(str(i) for i in range(dataset.classes)))):
            raise InputError(
                f"synthetic.root = {str(root)!r} has classes {', '.join(names[:5])}, … (allowed: {wanted})"
            )
        order = wanted if set(names) == set(wanted) else tuple(str(i) for i in range(dataset.classes))
        part, paths = class_folders_part(root, order)
        split = decoded_part("synthetic", identity_of(root, paths), part, image_size=None, folder=cache)
    else:
        raise InputError(
            f"synthetic.root = {str(root)!r} can't be read (allowed: an npz, parquet files, or class sub-folders)"
        )
    return _fits(split, dataset, root)


def _fits(split: Split, dataset: Dataset, root: Path) -> Split:
    shape = tuple(split.images.shape[1:])
    if shape != dataset.image_shape:
        raise InputError(
            f"synthetic.root = {str(root)!r} has images (C, H, W) = {shape} "
            f"(allowed: {dataset.image_shape}, as the dataset's)"
        )
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= dataset.classes:
        raise InputError(f"synthetic.root = {str(root)!r}: labels span {low}…{high} (allowed: 0…{dataset.classes - 1})")
    return split


def mixture(train: Split, classes: int, amount: int, *, seed: int = 0) -> Split:
    """`amount` images from class-conditional Gaussian mixtures in the PCA space of `train`, classes as frequent there.

    A generator without a network: principal components of the training pixels, then per class a mixture of Gaussians
    with full covariances (scikit-learn). Deterministic in (train, classes, amount, seed); a smaller amount is not a
    prefix of a larger one.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    pixels = train.images.flatten(1).numpy().astype(np.float64) / 255
    labels = train.labels.numpy()
    components = min(_COMPONENTS, pixels.shape[1], len(pixels) - 1)
    pca = PCA(components, svd_solver="full").fit(pixels)
    codes = pca.transform(pixels)
    random = np.random.default_rng(key(seed, "mixture"))
    chosen = random.choice(labels, size=amount)
    out = np.empty((amount, pixels.shape[1]), dtype=np.uint8)
    for label in range(classes):
        rows = np.flatnonzero(chosen == label)
        if len(rows) == 0:
            continue
        own = codes[labels == label]
        modes = max(1, min(_MODES, len(own) // (2 * components)))
        model = GaussianMixture(
            modes, covariance_type="full", reg_covar=1e-4, random_state=int(random.integers(2**31)), max_iter=50
        ).fit(own)
        samples, _ = model.sample(len(rows))
        images = pca.inverse_transform(samples)
        out[rows] = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return Split(torch.from_numpy(out).view(amount, *train.images.shape[1:]), torch.from_numpy(chosen.astype(np.int64)))


# -- npz --------------------------------------------------------------------------------------------------------------


def read_npz(path: Path, *, classes: int, cache: Path | None) -> Split:
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
    folder = cache or home()
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
