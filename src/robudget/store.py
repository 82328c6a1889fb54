"""A run is a folder and a store is a folder of runs.

    <store>/<slug>-<id>/
        recipe.yaml        every choice, complete
        environment.json   versions, device, threads, precision as resolved
        log.jsonl          append-only events: epochs, energy windows, evaluation
        last.pt            where training resumes; best.safetensors  the weights to use
        evals/<id>/        verdicts.parquet and result.json of one evaluation
        run.json           the record: written last, atomically; its presence means done
        partial.json       the same of a training that a sweep has paused or ended early, as far as it came

Raw records are kept; `tables/read.py` derives the table's columns from them, so that another price or a corrected
formula needs no rerun. Imports neither torch nor pandas.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from robudget.errors import InputError
from robudget.files import allowed, local, to_plain, write_json, write_text
from robudget.lease import Busy, Lease, LeaseLost, share, take
from robudget.recipe import Recipe

__all__ = ["ENDED_EARLY", "Busy", "LeaseLost", "RunFolder", "Store", "WorkFolder", "read_record", "writing"]
FORMAT = 1
PARTIAL = "partial.json"
ENDED_EARLY = "ended early"


class WorkFolder:
    """A folder that one process at a time works in, with a log. Creating the object touches nothing."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @contextmanager
    def lock(self, *, guarding: Path | None = None, over: int = 0) -> Iterator[Lease]:
        """Hold the folder against every other process, of other machines too (`lease.py`); raises Busy where one holds
        it already. All writes into the folder (or `guarding`) then raise LeaseLost once another process has taken over.
        `over`: the number of a lease that has been found stale."""
        with writing(self.path):
            lease = take(self.path, guarding=guarding, over=over)
        try:
            yield lease
        finally:
            lease.release()

    @contextmanager
    def shared(self) -> Iterator[Lease]:
        """The lease that another process of the same run holds, for the writes of this one."""
        lease = share(self.path)
        try:
            yield lease
        finally:
            lease.release()

    def ranks(self) -> list[int]:
        """The processes that have a log here: 0 of `log.jsonl`, the others under torchrun."""
        others = (int(path.stem.removeprefix("log-")) for path in self.path.glob("log-*.jsonl"))
        return [0, *sorted(others)]

    def log(self, event: str, *, rank: int = 0, **fields: Any) -> None:
        """Append one line to the log, in one write, so that a kill leaves at most the last one incomplete."""
        line = json.dumps(to_plain({"event": event, "at": round(time.time(), 3)} | fields), allow_nan=False) + "\n"
        allowed(self._log(rank))
        with writing(self.path), self._log(rank).open("ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = "\n" + line  # a kill left the line before this one incomplete
            file.write(line.encode())

    def events(self, event: str | None = None, *, rank: int = 0) -> Iterator[dict[str, Any]]:
        """The logged events, in order; an incomplete line, which a kill leaves, is skipped."""
        path = self._log(rank)
        if not path.exists():
            return
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and (event is None or entry.get("event") == event):
                yield entry

    def _log(self, rank: int) -> Path:
        return self.path / ("log.jsonl" if rank == 0 else f"log-{rank}.jsonl")


class RunFolder(WorkFolder):
    """One run on disk. Creating the object touches nothing; `open` makes the folder."""

    @property
    def done(self) -> bool:
        return (self.path / "run.json").exists()

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def threads(self) -> int | None:
        """The CPU threads that this run began with, by environment.json; None where nothing says so."""
        try:
            threads = json.loads((self.path / "environment.json").read_text("utf-8"))["threads"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return threads if isinstance(threads, int) and threads > 0 else None

    @property
    def gpus(self) -> int:
        """How many GPUs this run was begun on, by environment.json and the logs of its processes."""
        try:
            device = json.loads((self.path / "environment.json").read_text("utf-8"))["device"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return len(self.ranks()) if device == "cuda" else 0

    @cached_property
    def recipe(self) -> Recipe:
        path = self.path / "recipe.yaml"
        try:
            text = path.read_text("utf-8")
        except OSError:
            raise InputError(f"{str(self.path)!r} is not a run folder: it has no recipe.yaml") from None
        return Recipe.from_yaml(text, where=str(path))

    def open(self, recipe: Recipe) -> None:
        """Make the folder and write the recipe, in place of one for another evaluation. Raises InputError where it
        cannot be written."""
        path, text = self.path / "recipe.yaml", recipe.to_yaml()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text("utf-8") != text:
                write_text(path, text)

    def has(self, recipe: Recipe) -> bool:
        """Is this recipe done here, its evaluation or a fuller one too? (A run can have been trained for another.)"""
        asked = {recipe.evaluation_id, recipe.evaluated_in_full.evaluation_id}
        return self.done and (self.record().get("evaluation") or {}).get("id") in asked

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write run.json: from here on the run is done."""
        with writing(self.path):
            write_json(self.path / "run.json", {"format": FORMAT, **record})

    def record(self) -> dict[str, Any]:
        """run.json, checked to be of this version."""
        return read_record(self.path / "run.json")

    # -- a training that was left before its last epoch ----------------------------------------------------------------

    def leave(self, record: Mapping[str, Any]) -> None:
        """Write partial.json: the training has paused, or (with the status `ENDED_EARLY`) will not go on by itself."""
        with writing(self.path):
            write_json(self.path / PARTIAL, {"format": FORMAT, **record})

    def partial(self) -> dict[str, Any] | None:
        """partial.json; None where the run is done, or nothing was left."""
        if self.done or not (self.path / PARTIAL).exists():
            return None
        return read_record(self.path / PARTIAL)

    @property
    def ended_early(self) -> str | None:
        """Why a sweep has ended this run early; None where none has, or where it was finished since."""
        record = self.partial()
        return str(record["why"]) if record is not None and record["status"] == ENDED_EARLY else None

    def go_on(self) -> None:
        """Forget that the training was left."""
        with writing(self.path):
            (self.path / PARTIAL).unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one line about `path`."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space left on the device",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "no write permission",
            errno.EPERM: "no write permission",
            errno.EROFS: "the file system is read-only",
            errno.ENOTDIR: "a part of the path is a file",
            errno.EEXIST: "a file of that name is in the way",
        }
        if error.errno not in reasons:
            raise
        raise InputError(f"cannot write {str(path)!r}: {reasons[error.errno]}") from None


class Store:
    """A folder of runs. Raises InputError for a URL, which is only read (`tables/remote.py`)."""

    def __init__(self, root: Path | str):
        self.root = local(Path(root))

    @property
    def away(self) -> bool:
        """Is there no such folder just now, or does its file server not answer?"""
        try:
            return not self.root.is_dir()
        except OSError:
            return True

    def folder(self, recipe: Recipe) -> RunFolder:
        return RunFolder(self.root / f"{recipe.slug}-{recipe.id}")

    def folders(self) -> list[RunFolder]:
        """Every run folder, done or not, by name."""
        if not self.root.is_dir():
            raise InputError(f"no such store: {str(self.root)!r} is not a folder")
        if (self.root / "recipe.yaml").exists():
            return [RunFolder(self.root)]
        return [RunFolder(p.parent) for p in sorted(self.root.glob("*/recipe.yaml"))]


def read_record(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"{str(path)!r} does not exist: this run is not finished") from None
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from None
    return checked_record(text, str(path))


def checked_record(text: str, where: str) -> dict[str, Any]:
    """The record that the text of a `run.json` says, checked to be of this version."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"cannot read {where!r}: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        number = record.get("format") if isinstance(record, dict) else None
        raise InputError(
            f"{where!r} is of format {number!r}, written by another version of robudget (this one reads {FORMAT})"
        )
    return record
