"""scikit-learn's digits (1,797 real 8×8 images, Alpaydin & Kaynak 1998): real data that needs no download."""

from __future__ import annotations

import numpy as np
import torch

from robudget.data.dataset import Dataset, Split, fingerprint, hold_out

TEST_SHARE = 400 / 1797  # of each class, rounded
_SPLIT_SEED = 1998  # fixed: the split is part of what "digits" means


def load_digits() -> Dataset:
    """1,396 training and 401 test images, 8×8×1, stratified. Pixels 0…16 become round(v·255/16)."""
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    pixels = np.rint(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    both = Split(torch.from_numpy(pixels), torch.from_numpy(raw.target.astype(np.int64)))
    train, test = hold_out(both, TEST_SHARE, 10, seed=_SPLIT_SEED)
    return Dataset("digits", train, test, tuple(str(d) for d in range(10)), fingerprint(train, test))
