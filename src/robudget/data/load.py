"""Names to datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from robudget.data.dataset import Dataset
from robudget.data.digits import load_digits
from robudget.errors import unknown

DATASETS: dict[str, Callable[[Path | None, Path | None], Dataset]] = {
    "digits": lambda root, cache: load_digits(),
}


def names() -> list[str]:
    """Every dataset that `load` knows."""
    return list(DATASETS)


def load(name: str, *, root: str | Path | None = None, cache: str | Path | None = None) -> Dataset:
    """The dataset called `name`, read from the folder or file `root` (digits need none).

    `cache`: where decoded images are kept; default `$ROBUDGET_CACHE`, else `$XDG_CACHE_HOME/robudget`, else
    `~/.cache/robudget`. Raises InputError for an unknown name, and for a source that is missing, empty or corrupt.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    return DATASETS[name](Path(root) if root is not None else None, Path(cache) if cache is not None else None)
