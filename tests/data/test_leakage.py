"""Nearest neighbours of test images, exact and in blocks, and near-duplicates that were planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from robudget import data
from robudget.data import leakage
from robudget.data.dataset import Dataset, Split
from robudget.errors import InputError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


@pytest.mark.parametrize("block", [1 << 26, 3 * 4 * 48])
def test_nearest_neighbours_are_those_of_all_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "BLOCK_BYTES", block)
    generator = torch.Generator().manual_seed(0)
    mine, others = (torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=generator) for n in (7, 20))
    others[13], others[5] = mine[2], mine[4].flip(2)  # a copy, and an image upside down, which is none
    found = leakage.nearest(mine, others)
    for row in range(7):
        squares = [
            min(int((image.long() - other.long()).square().sum()) for image in (mine[row], mine[row].flip(2)))
            for other in others
        ]
        assert int(found.rows[row]) == int(np.argmin(squares))
        assert float(found.levels[row]) == pytest.approx((min(squares) / 48) ** 0.5, rel=1e-12)
    assert (int(found.rows[2]), float(found.levels[2])) == (13, 0.0)


def planted(digits: Dataset, copies: int) -> Split:
    """Training images moved by a pixel, among them near-copies of the first test images, one of them mirrored."""
    images = digits.train.images.roll(1, 3).clone()
    noise = torch.randint(-3, 4, (copies, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    near = (digits.test.images[:copies].long() + noise).clamp(0, 255).to(torch.uint8)
    near[:1] = near[:1].flip(3)
    images[100 : 100 + copies] = near
    return Split(images, digits.train.labels)


@pytest.mark.parametrize("copies", [0, 5])
def test_planted_near_duplicates_are_found_and_nothing_else(digits: Dataset, copies: int, tmp_path: Path) -> None:
    found = leakage.audit(planted(digits, copies), digits, within=4)
    assert found.near == copies
    assert f"{copies} of 401 test images of digits have one of 1,396 generated images within 4 levels" in found.page()
    pairs = found.pairs(5)
    if copies:
        assert sorted((pair["test"], pair["generated"]) for pair in pairs) == [(n, 100 + n) for n in range(5)]
        assert all(pair["levels"] < 4 < pair["training_levels"] for pair in pairs)
    found.save(tmp_path)
    table = pd.read_csv(tmp_path / "nearest.csv")
    assert (len(table), int((table.generated_levels <= 4).sum())) == (401, copies)
    assert json.loads((tmp_path / "leakage.json").read_text("utf-8"))["near"] == copies
    assert Image.open(tmp_path / "pairs.png").size == (3 * 8 * 3, 20 * 8 * 3)


def test_the_command(digits: Dataset, tmp_path: Path, robudget_command: Run) -> None:
    split = planted(digits, 2)
    np.savez(tmp_path / "g.npz", image=split.images.permute(0, 2, 3, 1).numpy(), label=split.labels.numpy())
    words = ("leakage", str(tmp_path / "g.npz"), "--data", "digits", "--samples", "50", "--within", "4")
    code, out, error = robudget_command(*words, "--json", "--out", str(tmp_path / "found"))
    assert code == 0, error
    assert (json.loads(out)["near"], json.loads(out)["test"]) == (2, 50)
    assert (tmp_path / "found" / "pairs.png").exists()
    code, out, error = robudget_command(*words[:-1], "-1")
    assert (code, error) == (2, "error: within = -1 (allowed: 0 or more levels of 255)\n")
    code, out, error = robudget_command("leakage", str(tmp_path / "h.npz"), "--data", "digits")
    assert code == 2
    assert error.count("\n") == 1


def test_more_test_images_than_there_are(digits: Dataset) -> None:
    with pytest.raises(InputError, match="402 images asked for, but the split has 401"):
        leakage.audit(digits.train, digits, samples=402)
