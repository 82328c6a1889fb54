"""Generated training images: from a mixture model fitted on the training images, or from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from robudget.data.dataset import Split
from robudget.data.keyed import key
from robudget.errors import InputError
from robudget.recipe import Recipe

_COMPONENTS = 24  # principal components that the mixtures live in
_MODES = 5  # Gaussians per class
_TIMES = 10  # images made where the recipe gives no amount, as a multiple of the real ones


def make(recipe: Recipe, train: Split, classes: int, root: str | Path | None) -> Split | None:
    """The recipe's synthetic images, or None where it has no source (or a fraction of 0)."""
    if recipe.synthetic.source is None or recipe.synthetic.fraction == 0:
        return None
    if recipe.synthetic.source == "mixture":
        return mixture(train, classes, recipe.synthetic.amount or _TIMES * len(train))
    raise InputError("synthetic.source = 'file' is not available yet (allowed: mixture)")


def mixture(train: Split, classes: int, amount: int, *, seed: int = 0) -> Split:
    """`amount` images from class-conditional Gaussian mixtures in the PCA space of `train`, classes as frequent there.

    A generator without a network: principal components of the training pixels, then per class a mixture of Gaussians
    with full covariances (scikit-learn). Deterministic in (train, classes, amount, seed); a smaller
    amount is not a prefix of a larger one.
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
