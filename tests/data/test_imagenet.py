"""ImageNet's validation images as RobustBench takes them: its list, its scaling and cutting; folders and parquet."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from robudget.attacks.build import rows_of
from robudget.attacks.ensemble import Member
from robudget.data.imagenet import load, process, wnids
from robudget.datasets import Preprocessing
from robudget.errors import InputError
from robudget.evaluation.load import preprocessing_of

Run = Callable[..., tuple[int, str, str]]
CLASSES = (0, 7, 412)  # a folder with some classes alone
NETWORK = """
import torch
from torch import nn

def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), nn.Linear(192, 1000))
"""


def picture(number: int) -> bytes:
    """A JPEG of waves and blocks, of a size of its own."""
    random = np.random.default_rng(number)
    height, width = 230 + 13 * number, 300 - 9 * number
    down, right = np.mgrid[:height, :width]
    waves = [np.sin(down / random.uniform(5, 40) + right / random.uniform(5, 40)) for _ in range(3)]
    pixels = 127 + 90 * np.stack(waves, -1) + random.normal(0, 12, (height, width, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """`<wnid>/<file>` → a picture: two of each class."""
    names = wnids()
    return {
        f"{names[label]}/ILSVRC2012_val_{2 * n + k + 1:08d}.JPEG": picture(2 * n + k)
        for n, label in enumerate(CLASSES)
        for k in range(2)
    }


@pytest.fixture
def root(tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUDGET_CACHE", str(tmp_path / "cache"))
    for name, content in pictures.items():
        path = tmp_path / "imagenet" / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "imagenet"


@pytest.mark.parametrize("name", ["Res256Crop224", "BicubicRes256Crop224", "Crop224", "Res224", "BicubicRes235Crop200"])
def test_pictures_are_scaled_and_cut_as_by_torchvision(name: str, pictures: dict[str, bytes]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    how = Preprocessing.parse(name)
    assert str(how) == name
    steps = []
    if how.resize is not None:
        size = [how.resize, how.resize] if how.square else how.resize
        steps.append(transforms.Resize(size, interpolation=transforms.InterpolationMode(how.interpolation)))
    if how.crop is not None:
        steps.append(transforms.CenterCrop(how.crop))
    for content in pictures.values():
        theirs = transforms.Compose(steps)(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(process("x", content, how), np.asarray(theirs).transpose(2, 0, 1))


def test_a_list_gives_its_images_in_its_order_with_imagenets_labels(root: Path, pictures: dict[str, bytes]) -> None:
    names = list(pictures)
    (root / "list.txt").write_text("\n".join([names[4], names[0], names[3]]))
    found = load(root, image_list=root / "list.txt")
    assert found.test.labels.tolist() == [412, 0, 7]
    assert (found.classes, found.image_shape) == (1000, (3, 224, 224))
    for n, name in enumerate([names[4], names[0], names[3]]):
        assert np.array_equal(found.test.images[n].numpy(), process("x", pictures[name], Preprocessing()))
    whole = load(root, preprocessing=Preprocessing.parse("Res64"))
    assert whole.test.labels.tolist() == [0, 0, 7, 7, 412, 412]
    assert whole.image_shape == (3, 64, 64)


def test_from_parquet_as_from_folders(root: Path, tmp_path: Path, pictures: dict[str, bytes]) -> None:
    (root / "list.txt").write_text("\n".join(reversed(pictures)))
    rows = [
        # The Hub's file names end with the class.
        {"image": {"bytes": content, "path": f"{Path(name).stem}_{name[:9]}.JPEG"}, "label": wnids().index(name[:9])}
        for name, content in pictures.items()
    ]
    (tmp_path / "hub").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "hub" / "validation-00000-of-00001.parquet", row_group_size=4)
    for asked in (None, root / "list.txt"):
        shards, folders = load(tmp_path / "hub", image_list=asked), load(root, image_list=asked)
        assert torch.equal(shards.test.images, folders.test.images)
        assert torch.equal(shards.test.labels, folders.test.labels)


def test_robustbenchs_own_list_is_read_from_its_package(
    root: Path, tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "robustbench" not in sys.modules and not (tmp_path / "robustbench").exists():
        with pytest.raises(InputError, match=r"is not installed|does not match"):
            load(root, image_list="robustbench")
    package = tmp_path / "site" / "robustbench"
    (package / "helper_files").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "helper_files" / "imagenet_test_image_ids.txt").write_text("\n".join(list(pictures)[:3]))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert load(root, image_list="robustbench").test.labels.tolist() == [0, 0, 7]


def test_each_model_has_its_own_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    published = timm.get_pretrained_cfg("resnet18")
    wanted = preprocessing_of("resnet18")
    assert wanted.crop == published.input_size[1] == 224
    assert wanted.resize == int(224 / published.crop_pct)
    assert wanted.interpolation == published.interpolation
    assert preprocessing_of("my_model.py:load") == Preprocessing()
    zoo, enums = ModuleType("robustbench.model_zoo"), ModuleType("robustbench.model_zoo.enums")
    zoo.model_dicts = {"imagenet": {"Linf": {"A": {"preprocessing": "Crop288"}}}}  # type: ignore[attr-defined]
    enums.BenchmarkDataset = enums.ThreatModel = str  # type: ignore[attr-defined]
    for name, module in (("robustbench", ModuleType("robustbench")), (zoo.__name__, zoo), (enums.__name__, enums)):
        monkeypatch.setitem(sys.modules, name, module)
    assert preprocessing_of("robustbench:imagenet/Linf/A") == Preprocessing(None, 288)


def test_targets_are_the_largest_logits_of_a_thousand() -> None:
    logits = torch.randn(3, 1000)
    rows = rows_of(Member("apgd-t"), torch.arange(3), logits)
    assert len(rows) == 27
    order = logits.sort(dim=1, descending=True).indices
    for image, target, rank in zip(rows.image.tolist(), rows.target.tolist(), rows.rank.tolist(), strict=True):
        assert target == order[image, rank]


def test_evaluated_at_full_resolution_as_typed(
    root: Path, pictures: dict[str, bytes], robudget_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)
    (tmp_path / "list.txt").write_text("\n".join(list(pictures)[1:]))
    asked = ["eval", "network.py:load", "--data", "imagenet", "--data-root", str(root)]
    short = ["--attack", "apgd-t:steps=2", "--json"]
    code, out, err = robudget_command(*asked, "--image-list", "list.txt", *short)
    assert code == 0, err
    found = json.loads(out)
    assert (found["n"], found["norm"], found["eps"]) == (5, "linf", 4 / 255)
    code, out, err = robudget_command(*asked, "--preprocessing", "Res224", *short)
    assert code == 0, err
    assert json.loads(out)["n"] == 6
    for more, said in [
        (["--image-list", "nothing.txt"], "cannot read the image list"),
        (["--preprocessing", "Res256Krop224"], "did you mean 'Res256Crop224'"),
        (["--preprocessing", "Crop288"], "at least 288 to cut"),
    ]:
        code, out, err = robudget_command(*asked, *more, *short)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    code, _, err = robudget_command("eval", "network.py:load", "--data", "digits", "--image-list", "list.txt", *short)
    assert code == 2
    assert "with digits (allowed: with imagenet)" in err


def test_a_list_that_does_not_match_is_one_line(root: Path, pictures: dict[str, bytes]) -> None:
    first = next(iter(pictures))
    for text, words in [
        ("", "is empty"),
        (f"{first}\n{first}", "2 times"),
        ("hello", "line 1: 'hello'"),
        ("n01440765/ILSVRC2012_val_00000001.JPEG", "did you mean 'n01440764'"),
        (f"{first}\nn01440764/ILSVRC2012_val_00049999.JPEG", "1 of its 2 images are not there"),
        (f"n01443537/{first.split('/')[1]}", "is of n01443537 there and of n01440764 here"),
    ]:
        (root / "list.txt").write_text(text)
        with pytest.raises(InputError, match=words):
            load(root, image_list=root / "list.txt")
    with pytest.raises(InputError, match="holds no validation images"):
        load(root / "val" / "n01440764")
