"""Stores and tables behind a URL (s3://, gs://, memory://, file://, …): read through fsspec, never written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from robudget.errors import InputError
from robudget.store import checked_record


def records(url: str) -> list[tuple[str, dict[str, Any]]]:
    """The finished runs of the store at `url`, or the one whose folder it is: each folder's URL and its `run.json`.

    In the order of the folders' names; an empty list where the folder holds no finished run. Raises InputError where
    there is no such folder, where it cannot be read, and where the file system's package is not installed.
    """
    url = url.rstrip("/")
    with _reading(url):
        files, root = _file_system(url)
        own = f"{root}/run.json"
        paths = [own] if files.exists(own) else sorted(files.glob(f"{root}/*/run.json"))
        if not paths and not files.isdir(root):
            raise InputError(f"no such store: {url!r} is not a folder")
        texts = files.cat(paths) if paths else {}  # all at once where the file system can
    found = []
    for path in paths:
        where = url if path == own else f"{url}/{path.split('/')[-2]}"
        found.append((where, checked_record(texts[path].decode("utf-8", errors="replace"), f"{where}/run.json")))
    return found


def is_folder(url: str) -> bool:
    """Is there a folder at `url`? Raises InputError where that cannot be asked."""
    with _reading(url):
        files, path = _file_system(url)
        return bool(files.isdir(path))


def read(url: str) -> bytes:
    """The file at `url`. Raises InputError where it cannot be read."""
    with _reading(url):
        files, path = _file_system(url)
        return bytes(files.cat_file(path))


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    return files, str(path)


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Every file system has errors of its own (botocore's, gcsfs's): all of them become one line about `url`."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"cannot read {url!r}: there is no such file") from None
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read {url!r}: {said}") from None
