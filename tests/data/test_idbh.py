"""IDBH against Pillow and torchvision, operation by operation, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional as tv

from robudget.data import idbh as module
from robudget.data.idbh import idbh
from robudget.errors import InputError


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    """Smooth colour images, none of whose pixels is black."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(small, 32, mode="bilinear").mul(230).add(20).to(torch.uint8)


def pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("name", module._FACTORS)
def test_colours_are_pillows(name: str) -> None:
    images, factors = pictures(6), torch.tensor([0.1, 0.5, 0.9, 1.0, 1.4, 1.9])
    ours = module._blended(images, name, factors)
    enhance = {"saturation": "Color"}.get(name, name.capitalize())
    for image, factor, mine in zip(images, factors.tolist(), ours, strict=True):
        theirs = tensor(getattr(ImageEnhance, enhance)(pillow(image)).enhance(factor))
        assert (mine.int() - theirs.int()).abs().max() <= 1, (name, factor)


def choices(kind: str, strength: float, sign: float = 0.9, axis: float = 0.9, n: int = 4) -> torch.Tensor:
    """The uniform numbers by which every image gets this operation."""
    number = (module.COLOURS.index(kind) + 0.5) / len(module.COLOURS)
    return torch.tensor([[number], [strength], [sign], [axis]]).expand(4, n)


def test_histograms_are_pillows() -> None:
    images = pictures(4)
    for kind, plain in (("autocontrast", ImageOps.autocontrast), ("equalize", ImageOps.equalize)):
        ours = module._changed(images, choices(kind, 0.5))
        for image, mine in zip(images, ours, strict=True):
            assert (mine.int() - tensor(plain(pillow(image))).int()).abs().max() <= 1


@pytest.mark.parametrize("sign", [0.1, 0.9])
def test_rotations_and_shears_are_torchvisions(sign: float) -> None:
    """To the pixel, but for those whose source lies on the edge between two."""
    images, towards = pictures(4), -1 if sign < 0.5 else 1
    ours = module._changed(images, choices("rotate", 0.65, sign))
    theirs = tv.rotate(images, towards * 7.0)
    same = [float((ours == other).float().mean()) for other in (theirs, tv.rotate(images, -towards * 7.0))]
    assert max(same) > 0.97
    assert float((ours == 0).float().mean()) == pytest.approx(float((theirs == 0).float().mean()), abs=0.01)
    for axis in (0.1, 0.9):
        degrees = towards * float(np.degrees(0.1))
        ours = module._changed(images, choices("shear", 0.5, sign, axis))
        pair = [degrees, 0.0] if axis < 0.5 else [0.0, degrees]
        both = [tv.affine(images, 0.0, [0, 0], 1.0, [turn * angle for angle in pair]) for turn in (1, -1)]
        assert max(float((ours == other).float().mean()) for other in both) > 0.97


def test_crop_shift_is_a_window_somewhere_in_a_black_image() -> None:
    n = 400
    images = torch.arange(1, 33, dtype=torch.uint8).expand(n, 1, 32, 32).contiguous()  # each column its number
    lines = images.transpose(2, 3)
    u = torch.rand(7, n, generator=torch.Generator().manual_seed(0))
    moved, down = module._moved(images, u), module._moved(lines, u)
    cuts = set()
    for row in range(n):
        columns, rows = (m[row, 0].amax(axis) for m, axis in ((moved, 0), (down, 1)))
        width, height = int((columns > 0).sum()), int((rows > 0).sum())
        cuts.add((32 - height, 32 - width))
        assert 0 <= 64 - height - width <= module.SHIFT
        steps = columns[columns > 0].int().diff()
        assert bool((steps == (1 if u[0, row] >= 0.5 else -1)).all())  # whole, mirrored or not
        assert bool((rows[rows > 0].int().diff() == 1).all())
        assert int((moved[row, 0] > 0).sum()) == width * height
    sizes = [sum(cut) for cut in cuts]
    assert (min(sizes), max(sizes)) == (0, module.SHIFT)
    assert len(cuts) > 50  # of the 66 that there are


@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_erasing(strength: str) -> None:
    n = 600
    images = torch.full((n, 3, 32, 32), 9, dtype=torch.uint8)
    u = torch.rand(23, n, generator=torch.Generator().manual_seed(0))
    black = (module._erased(images, module.STRENGTHS[strength], u) == 0).all(1)
    erased = black.flatten(1).any(1)
    assert float(erased.float().mean()) == pytest.approx(module.STRENGTHS[strength], abs=0.06)
    areas = black.flatten(1).sum(1)[erased] / 1024
    assert float(areas.min()) > 0.01
    assert float(areas.max()) < 0.36
    for image in black[erased][:100]:
        where = image.nonzero()
        assert len(where) == (where.amax(0) - where.amin(0) + 1).prod()  # a full rectangle


def test_a_share_of_a_batch_is_augmented_as_in_the_whole() -> None:
    images = pictures(16)

    def run(part: torch.Tensor, rows: slice) -> torch.Tensor:
        return idbh(part, "strong", generator=torch.Generator().manual_seed(3), rows=rows, total=16)

    whole = run(images, slice(None))
    assert torch.equal(run(images[1::2], slice(1, None, 2)), whole[1::2])
    assert whole.dtype == torch.uint8
    assert float((whole != images).flatten(1).any(1).float().mean()) > 0.9
    with pytest.raises(InputError, match=r"data\.idbh = weak with images of 8×8 pixels"):
        idbh(images[:, :, :8, :8], "weak", generator=torch.Generator())
