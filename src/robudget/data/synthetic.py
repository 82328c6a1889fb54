"""Generated training images: from a mixture model fitted on the training images, or from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from robudget.data import folders, npz, parquet
from robudget.data.cache import decoded_part
from robudget.data.dataset import Dataset, Split
from robudget.data.keyed import key
from robudget.data.source import identity_of
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
        split = npz.read(root, classes=dataset.classes, cache=cache)
    elif shards:
        part = parquet.read_part(shards)
        split = decoded_part("synthetic", identity_of(root, shards), part, image_size=None, folder=cache)
    elif root.is_dir() and (names := folders.classes_in(root)):
        wanted = dataset.class_names
        if names not in (tuple(sorted(wanted)), tuple(sorted(str(i) for i in range(dataset.classes)))):
            raise InputError(
                f"synthetic.root = {str(root)!r} has classes {', '.join(names[:5])}, … (allowed: {wanted})"
            )
        order = wanted if set(names) == set(wanted) else tuple(str(i) for i in range(dataset.classes))
        part, paths = folders.read_part(root, order)
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
    made = random.choice(labels, size=amount)
    out = np.empty((amount, pixels.shape[1]), dtype=np.uint8)
    for label in range(classes):
        rows = np.flatnonzero(made == label)
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
    return Split(torch.from_numpy(out).view(amount, *train.images.shape[1:]), torch.from_numpy(made.astype(np.int64)))
