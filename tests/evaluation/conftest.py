"""The attack tests' small models serve here too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from torch import Tensor

_WHERE = Path(__file__).resolve().parents[1] / "attacks" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("small_models", _WHERE)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)

Small, blobs, train = _MODULE.Small, _MODULE.blobs, _MODULE.train
one_thread, small, images = _MODULE.one_thread, _MODULE.small, _MODULE.images


@pytest.fixture(scope="session")
def many() -> tuple[Tensor, Tensor]:
    """200 images, for statements about shares of images."""
    return blobs(200, 6, 8)


@pytest.fixture(scope="session")
def crowd() -> tuple[Tensor, Tensor]:
    """300 images, for statements about a few percent of them."""
    return blobs(300, 6, 9)
