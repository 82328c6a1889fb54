"""Corruptions from the library, image by image as its own loop makes them, and from files in CIFAR-10-C's layout."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robudget.data.corruptions import KINDS, computed, kinds_of, read
from robudget.data.dataset import Split
from robudget.data.keyed import key
from robudget.errors import InputError
from robudget.evaluation.corruptions import Corruptions, corruptions, merge_corruptions


@pytest.fixture(scope="module")
def split() -> Split:
    random = np.random.default_rng(0)
    smooth = random.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8).repeat(4, 2).repeat(4, 3)
    return Split(torch.from_numpy(smooth), torch.arange(12) % 10)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))


FAST = ["gaussian_noise", "impulse_noise", "fog", "contrast", "jpeg_compression"]


def test_computed_as_the_librarys_own_loop_and_by_row_alone(split: Split) -> None:
    library = pytest.importorskip("imagecorruptions")
    source = computed(split, FAST, seed=3)
    before = np.random.get_state()[1].copy()
    for kind in FAST:
        found = source.images(kind, 4, range(2, 7))
        assert np.array_equal(np.random.get_state()[1], before)  # the global generator is left alone
        assert found.dtype == torch.uint8
        assert torch.equal(found[3:], source.images(kind, 4, range(5, 7)))
        for n, row in enumerate(range(2, 7)):
            number = key(3, "corruption", kind, 4, row) % 2**32
            np.random.seed(number)
            more = {"seed": number} if kind == "impulse_noise" else {}
            picture = split.images[row].permute(1, 2, 0).contiguous().numpy()
            theirs = library.corrupt(picture, corruption_name=kind, severity=4, **more)
            assert np.array_equal(found[n].permute(1, 2, 0).numpy(), theirs)
        np.random.set_state(("MT19937", before, 624))
    assert not torch.equal(source.images("fog", 4, range(3)), computed(split, FAST, seed=4).images("fog", 4, range(3)))


def write(root: Path, split: Split, kinds: list[str]) -> None:
    """CIFAR-10-C's layout: severity s of an image is the image plus s."""
    root.mkdir()
    clean = split.images.permute(0, 2, 3, 1).numpy()
    for number, kind in enumerate(kinds):
        np.save(root / f"{kind}.npy", np.concatenate([clean // 2 + 10 * number + s for s in range(1, 6)]))
    np.save(root / "labels.npy", np.tile(split.labels.numpy(), 5))


def test_read_in_the_layout_of_cifar10c(split: Split, model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path / "CIFAR-10-C", split, ["fog", "snow"])
    source = read(tmp_path / "CIFAR-10-C", split, ["fog", "snow"])
    assert torch.equal(source.images("snow", 3, range(4, 9)), split.images[4:9] // 2 + 13)
    found = corruptions(model, split.images, split.labels, source.images, source.kinds)
    for number, kind in enumerate(source.kinds):
        for severity in range(1, 6):
            x = (split.images // 2 + 10 * number + severity).float() / 255
            assert found.accuracy(kind, severity) == float((model(x).argmax(1) == split.labels).float().mean())
            low, high = found.interval(kind, severity)
            assert low <= found.accuracy(kind, severity) <= high
    assert found.mean == pytest.approx(np.mean([found.accuracy(k, s) for k in source.kinds for s in range(1, 6)]))
    assert found.mean_interval[0] <= found.mean <= found.mean_interval[1]
    assert found.calls["fog_forward"] >= 5 * 12
    # Saved and read back, and in parts.
    kept = Corruptions.load(found.save(tmp_path / "out"))
    assert kept.summary() == found.summary()
    parts = [
        corruptions(
            model,
            split.images[rows.start : rows.stop],
            split.labels[rows.start : rows.stop],
            lambda kind, severity, some, start=rows.start: source.images(
                kind, severity, range(start + some.start, start + some.stop)
            ),
            source.kinds,
            index=torch.arange(rows.start, rows.stop),
        )
        for rows in (range(5), range(5, 12))
    ]
    assert (merge_corruptions(parts).frame == found.frame).all().all()


def test_relative_to_a_reference(split: Split, model: nn.Module, tmp_path: Path) -> None:
    write(tmp_path / "c", split, ["fog", "snow"])
    source = read(tmp_path / "c", split, ["fog", "snow"])
    mine = corruptions(model, split.images, split.labels, source.images, source.kinds, about={"source": "c"})
    assert mine.relative_to(mine) == 1
    torch.manual_seed(7)
    other = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    theirs = corruptions(other, split.images, split.labels, source.images, source.kinds, about={"source": "c"})
    by_hand = np.mean([(1 - mine.of_kind(k)) / (1 - theirs.of_kind(k)) for k in ("fog", "snow")])
    assert math.isclose(mine.relative_to(theirs), by_hand)
    fog = corruptions(model, split.images, split.labels, source.images, ["fog"], about={"source": "c"})
    with pytest.raises(InputError, match="lacks snow"):
        mine.relative_to(fog)


def test_kinds_and_what_does_not_fit(split: Split, tmp_path: Path) -> None:
    assert kinds_of([]) == KINDS
    assert kinds_of(["gaussian-noise"]) == ("gaussian_noise",)
    with pytest.raises(InputError, match="did you mean 'fog'"):
        kinds_of(["fogg"])
    with pytest.raises(InputError, match="each once"):
        kinds_of(["fog", "fog"])
    with pytest.raises(InputError, match=r"of 8×8 pixels|is not installed"):
        computed(Split(split.images[..., :8, :8].contiguous(), split.labels), ["fog"])
    root = tmp_path / "c"
    with pytest.raises(InputError, match="cannot read"):
        read(root, split, [])
    write(root, split, ["fog"])
    with pytest.raises(InputError, match=r"lacks gaussian_noise\.npy"):
        read(root, split, [])
    with pytest.raises(InputError, match="other labels"):
        read(root, Split(split.images, split.labels.flip(0)), ["fog"])
    np.save(root / "fog.npy", np.zeros((60, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="allowed: uint8"):
        read(root, split, ["fog"])
