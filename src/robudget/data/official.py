"""CIFAR-10, CIFAR-100, SVHN and Tiny-ImageNet in the files that their authors publish.

Archives, python batches and SVHN's files are checked against their published MD5s; CIFAR's pickles are only then read,
by an unpickler that knows arrays and nothing else. For extracted binary CIFAR files no MD5s are published; their sizes
and labels are checked.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robudget.data.decode import Part, Source, identity_of
from robudget.errors import InputError

# -- CIFAR (Krizhevsky 2009): python or binary, archive or extracted --------------------------------------------------

_SHAPE = (3, 32, 32)
_PIXELS = 3072


@dataclass(frozen=True)
class CifarLayout:
    """Where one form of one dataset keeps its images. `md5` of a member is None where none is published."""

    archive: str
    archive_md5: str
    folder: str
    train: dict[str, str | None]
    test: dict[str, str | None]
    names: str  # the file with the class names
    binary: bool
    label_bytes: int = 1  # before the pixels of a binary record; the last one is the label that is used
    label_key: bytes = b"labels"
    names_key: bytes = b"label_names"
    images_per_file: int = 10_000
    test_images: int = 10_000


CIFAR10 = (
    CifarLayout(
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
        "batches.meta",
        binary=False,
    ),
    CifarLayout(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        {f"data_batch_{i}.bin": None for i in range(1, 6)},
        {"test_batch.bin": None},
        "batches.meta.txt",
        binary=True,
    ),
)
CIFAR100 = (
    CifarLayout(
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        {"train": "16019d7e3df5f24257cddd939b257f8d"},
        {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        "meta",
        binary=False,
        label_key=b"fine_labels",
        names_key=b"fine_label_names",
        images_per_file=50_000,
    ),
    CifarLayout(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        {"train.bin": None},
        {"test.bin": None},
        "fine_label_names.txt",
        binary=True,
        label_bytes=2,
        images_per_file=50_000,
    ),
)


def find_cifar(root: Path, layouts: tuple[CifarLayout, ...]) -> tuple[Path, CifarLayout] | None:
    """(archive or folder, its layout) at `root` or directly in it, or None."""
    for layout in layouts:
        if root.is_file():
            if root.name == layout.archive or _md5(root.read_bytes()) == layout.archive_md5:
                return root, layout
            continue
        for folder in (root, root / layout.folder):
            if all((folder / name).is_file() for name in (*layout.train, *layout.test)):
                return folder, layout
        if (root / layout.archive).is_file():
            return root / layout.archive, layout
    return None


def read_cifar(name: str, at: Path, layout: CifarLayout) -> Source:
    """A source over what `find_cifar` returned. Raises InputError for anything that is not as published."""
    contents = _from_archive(at, layout) if at.is_file() else _from_folder(at, layout)
    parts = []
    for members, count in ((layout.train, layout.images_per_file), (layout.test, layout.test_images)):
        blocks = [_block(f"{at.name}/{member}", contents[member], layout, count) for member in members]
        images = np.concatenate([pixels for pixels, _ in blocks]).reshape(-1, *_SHAPE)
        labels = np.concatenate([labels for _, labels in blocks])
        parts.append(Part.of_arrays(at.name, images, labels))
    class_names = _class_names(contents[layout.names], layout)
    identity = identity_of(at, [at] if at.is_file() else [at / m for m in contents])
    return Source(name, parts[0], parts[1], class_names, identity)


def _from_archive(path: Path, layout: CifarLayout) -> dict[str, bytes]:
    whole = path.read_bytes()
    if _md5(whole) != layout.archive_md5:
        raise InputError(
            f"archive {str(path)!r} is corrupt: its MD5 is {_md5(whole)}, the published one {layout.archive_md5}"
        )
    wanted = {f"{layout.folder}/{name}": name for name in (*layout.train, *layout.test, layout.names)}
    contents = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(whole), mode="r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name in wanted and member.isfile() else None
                if file is not None:
                    contents[wanted[member.name]] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"archive {str(path)!r} is corrupt: {error}") from None
    if missing := set(wanted.values()) - set(contents):
        raise InputError(f"archive {str(path)!r} lacks {', '.join(sorted(missing))}")
    return contents


def _from_folder(folder: Path, layout: CifarLayout) -> dict[str, bytes]:
    contents = {}
    for name in (*layout.train, *layout.test, layout.names):
        path = folder / name
        if not path.is_file():
            raise InputError(f"{str(folder)!r} lacks {name}")
        contents[name] = path.read_bytes()
        expected = (layout.train | layout.test).get(name)
        if expected is not None and _md5(contents[name]) != expected:
            raise InputError(f"{str(path)!r} is corrupt: its MD5 is not the published {expected}")
    return contents


def _block(where: str, content: bytes, layout: CifarLayout, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(pixels (count, 3072), labels (count,)) of one batch file."""
    if layout.binary:
        record = layout.label_bytes + _PIXELS
        if len(content) != count * record:
            raise InputError(f"{where} has {len(content)} bytes (allowed: {count * record}); the file is corrupt")
        table = np.frombuffer(content, dtype=np.uint8).reshape(count, record)
        return table[:, layout.label_bytes :], table[:, layout.label_bytes - 1].astype(np.int64)
    batch = _unpickle(where, content)
    pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[layout.label_key], dtype=np.int64)
    if pixels.shape != (count, _PIXELS) or pixels.dtype != np.uint8 or labels.shape != (count,):
        raise InputError(f"{where} holds {pixels.dtype} {pixels.shape} (allowed: uint8 {(count, _PIXELS)})")
    return pixels, labels


def _class_names(content: bytes, layout: CifarLayout) -> tuple[str, ...]:
    if layout.binary:
        return tuple(content.decode("ascii").split())
    return tuple(name.decode("ascii") for name in _unpickle(layout.names, content)[layout.names_key])


class _Arrays(pickle.Unpickler):
    """Unpickles dicts, lists, strings, numbers and numpy arrays; anything that could run code is refused."""

    _ALLOWED = frozenset(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy", "_codecs")
        for name in ("_reconstruct", "ndarray", "dtype", "encode")
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return super().find_class(module, name)


def _unpickle(where: str, content: bytes) -> dict[bytes, Any]:
    unpickle: Callable[[], Any] = _Arrays(io.BytesIO(content), encoding="bytes").load
    try:
        batch = unpickle()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, ImportError, IndexError) as error:
        raise InputError(f"{where} is corrupt: {error}") from None
    if not isinstance(batch, dict):
        raise InputError(f"{where} is corrupt: it holds no dict")
    return batch


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# -- SVHN -------------------------------------------------------------------------------------------------------------

SVHN = {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"}


def read_svhn(name: str, root: Path) -> Source | None:
    """A source over the two files in `root`, or None where they are not. The digit 0 is published as label 10."""
    paths = [root / file for file in SVHN]
    if not all(path.is_file() for path in paths):
        return None
    train, test = (_svhn_part(path) for path in paths)
    return Source(name, train, test, tuple("0123456789"), identity_of(root, paths))


def _svhn_part(path: Path) -> Part:
    from scipy.io import loadmat

    content = path.read_bytes()
    if (digest := _md5(content)) != SVHN[path.name]:
        raise InputError(f"{str(path)!r} is corrupt: its MD5 is {digest}, the published one {SVHN[path.name]}")
    table = loadmat(path)
    images = np.ascontiguousarray(table["X"].transpose(3, 2, 0, 1))
    return Part.of_arrays(path.name, images, table["y"].reshape(-1).astype(np.int64) % 10)


# -- Tiny-ImageNet ----------------------------------------------------------------------------------------------------


def read_tiny_imagenet(name: str, root: Path) -> Source | None:
    """A source over the official folder; its labelled validation images are the test split. None for other layouts."""
    home = next((p for p in (root, root / "tiny-imagenet-200") if (p / "val" / "val_annotations.txt").is_file()), None)
    if home is None:
        return None
    classes = sorted(p.name for p in (home / "train").iterdir() if p.is_dir())
    index = {wnid: label for label, wnid in enumerate(classes)}
    train = [(p, index[w]) for w in classes for p in sorted((home / "train" / w / "images").glob("*.JPEG"))]
    test = []
    for number, line in enumerate((home / "val" / "val_annotations.txt").read_text("utf-8").splitlines(), 1):
        file, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid not in index:
            raise InputError(f"val_annotations.txt line {number}: class {wnid!r} has no folder in train/")
        test.append((home / "val" / "images" / file, index[wnid]))
    parts = (_files(home, train), _files(home, test))
    return Source(name, *parts, tuple(classes), identity_of(home, [path for path, _ in [*train, *test]]))


def _files(home: Path, labelled: list[tuple[Path, int]]) -> Part:
    paths, labels = zip(*labelled, strict=True) if labelled else ((), ())
    return Part.of_files(home, list(paths), np.asarray(labels, dtype=np.int64))
