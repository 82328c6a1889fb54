"""One evaluation of any classifier: the model, the data, the ensemble, the meter around it, and a folder of results."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from robudget import data
from robudget.errors import InputError
from robudget.evaluation.evaluator import Evaluator
from robudget.evaluation.examples import Examples, Replay, replay
from robudget.evaluation.load import load_classifier
from robudget.evaluation.specification import Precision, Specification
from robudget.evaluation.state import FILE as STATE
from robudget.evaluation.state import Progress
from robudget.evaluation.verdicts import Verdicts, merge
from robudget.execution import Site
from robudget.files import write_json
from robudget.meter import flops
from robudget.meter.energy import Energy, Meter
from robudget.meter.machine import open_meter
from robudget.runner import environment, resolve_device
from robudget.store import RunFolder, writing
from robudget.threat import CUSTOMARY, Threat


@dataclass(frozen=True)
class Judgement:
    """`verdicts` per image and the `bill` (FLOPs, seconds, energy; as in run.json), both kept in `folder`."""

    folder: Path
    verdicts: Verdicts
    bill: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), **self.verdicts.summary(), "bill": self.bill}


def judge(
    source: str,
    *,
    dataset: str | None = None,
    threat: Threat | None = None,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    images: int | None = None,
    shard: tuple[int, int] = (1, 1),
    seed: int = 0,
    batch_size: int = 500,
    precision: str = "auto",
    model: str | None = None,
    out: str | Path | None = None,
    examples: bool = False,
    restart: bool = False,
    site: Site | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Judgement:
    """Put a classifier through the ensemble on a test split and keep the verdicts; resumes what was begun.

    `source` is a run's folder, whose recipe then gives dataset and threat, or anything that `load_classifier` takes;
    `threat` None is then the dataset's customary one.
    `attacks` (`["pgd:steps=50,loss=cw"]`) replaces the version. `images`: the first n of the test split. `shard` =
    (i, n): the i-th of n contiguous parts, from 1; noise goes with an image's row in the split, so shards give the
    verdicts of the whole. `examples` keeps the adversarial examples in examples.npz; `restart` forgets what was begun.
    Raises InputError.
    """
    site = site or Site()
    device = resolve_device(site.device)
    if site.threads:
        torch.set_num_threads(site.threads)
    classifier, read, run = _load(source, dataset, model, site)
    threat = threat or (run.recipe.evaluation_threat if run is not None else CUSTOMARY.get(read.name))
    if threat is None:
        raise InputError("an evaluation needs its threat (--norm linf --eps 8/255)")
    chosen = read.test.first(images)
    first, last = _part(len(chosen), shard)
    part = read.test[first:last]
    specification = Specification(
        threat, version, attacks, seed, batch_size, cast(Precision, precision), examples=examples
    )
    what = version if attacks is None else "+".join(str(member) for member in specification.members)
    name = f"{Path(source).name}-{read.name}-{threat}-{what}-{seed}-n{len(chosen)}"
    name += f"-{shard[0]}of{shard[1]}" if shard[1] > 1 else ""
    home = run.path / "evals" if run is not None else Path("evals")
    folder = Path(out) if out is not None else home / re.sub(r"[^\w.-]+", "-", name)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if restart:
            (folder / "state" / STATE).unlink(missing_ok=True)
    with _swept(folder), open_meter(str(device)) as meter, _Bill(folder, meter) as bill:
        evaluator = Evaluator(
            classifier,
            specification,
            device=device,
            state=folder / "state",
            progress=bill.watching(progress),
            window=meter.window,
        )
        index = torch.arange(first, last)
        verdicts = evaluator.run(part.unit(), part.labels, index=index, classes=read.classes)
    verdicts = replace(verdicts, about={**verdicts.about, "dataset": read.name})
    counted = _counted(classifier, read.image_shape)
    if counted is not None:
        verdicts = verdicts.with_flops(counted.forward, counted.input_backward)
    with writing(folder):
        verdicts.save(folder)
        total = bill.write(verdicts, counted, environment(device))
    return Judgement(folder, verdicts, total)


def transfer(
    source: str,
    examples: Path,
    *,
    dataset: str | None = None,
    batch_size: int = 500,
    model: str | None = None,
    site: Site | None = None,
) -> Replay:
    """Show kept adversarial examples (examples.npz, or the evaluation's folder it is in) to another classifier."""
    site = site or Site()
    device = resolve_device(site.device)
    classifier, read, _ = _load(source, dataset, model, site)
    kept = Examples.load(examples / "examples.npz" if examples.is_dir() else examples)
    if kept.x_adv.shape[1:] != read.image_shape or (len(kept) and int(kept.label.max()) >= read.classes):
        raise InputError(
            f"{str(examples)!r} holds images {kept.x_adv.shape[1:]}, not of {read.name} {read.image_shape}"
        )
    if isinstance(classifier, nn.Module):
        classifier.to(device)
    return replay(classifier, kept, batch_size=batch_size, device=device)


def merged(shards: Sequence[Path], out: Path | None) -> tuple[Verdicts, Path]:
    """The shards' verdicts as one, and where it is written: `out`, or beside the first shard as `…-merged`."""
    verdicts = merge([Verdicts.load(path) for path in shards])
    target = out or shards[0].with_name(re.sub(r"-\d+of\d+$", "", shards[0].name) + "-merged")
    with writing(target):
        verdicts.save(target)
    return verdicts, target


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` → (2, 4). Raises InputError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise InputError(f"shard = {text!r} (allowed: i/n, e.g. 2/4)")
    return int(match[1]), int(match[2])


def _load(
    source: str, dataset: str | None, model: str | None, site: Site
) -> tuple[Callable[[Tensor], Tensor], data.Dataset, RunFolder | None]:
    """The classifier, its data, and the run that it is from."""
    run = RunFolder(source) if Path(source).is_dir() else None
    if run is not None:
        dataset = dataset or run.recipe.data.name
    if dataset is None and Path(source).suffix != ".safetensors" and ":" not in source and not Path(source).exists():
        raise InputError(f"nothing to evaluate at {source!r}, or no --data for it (robudget eval --help)")
    if dataset is None:
        raise InputError("an evaluation needs its data (--data cifar10 --data-root FOLDER)")
    size = run.recipe.data.image_size if run is not None else None
    read = data.load(dataset, root=site.data_root, image_size=size)
    if run is None:
        return load_classifier(source, read, model=model), read, None
    if not run.best.exists():
        raise InputError(f"{str(run.path)!r} has no best.safetensors yet: train it first (robudget run)")
    return load_classifier(str(run.best), read, model=model), read, run


@contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """Input that was refused leaves no empty folder behind."""
    try:
        yield
    except InputError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise


def _counted(classifier: Callable[[Tensor], Tensor], image_shape: tuple[int, int, int]) -> flops.PassFlops | None:
    """FLOPs of a pass; None (unknown) of a plain function, and of a module that the counter cannot follow."""
    if not isinstance(classifier, nn.Module):
        return None
    try:
        return flops.count(classifier, image_shape)
    # A stranger's model can fail on stand-in tensors in any way; its verdicts are there and must not be lost for that.
    except Exception as error:
        warnings.warn(f"FLOPs unknown: the model cannot be counted ({type(error).__name__}: {error})", stacklevel=2)
        return None


class _Bill:
    """Energy of the whole evaluation, noted every few seconds, so that an attempt that was killed is billed too."""

    NOTE_SECONDS = 10.0

    def __init__(self, folder: Path, meter: Meter) -> None:
        self.path, self.state = folder / "bill.json", folder / "state" / STATE
        self.before: Energy | None = None
        if self.state.exists() and self.path.exists():
            self.before = Energy.from_dict(json.loads(self.path.read_text("utf-8"))["energy"])
        self._context = meter.window("evaluation")

    def __enter__(self) -> _Bill:
        self.window = self._context.__enter__()
        self.noted = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        with writing(self.path):
            self._note()

    def watching(self, progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
        """`progress`, and a note now and then."""

        def told(now: Progress) -> None:
            if time.monotonic() - self.noted > self.NOTE_SECONDS:
                self._note()
            if progress is not None:
                progress(now)

        return told

    @property
    def energy(self) -> Energy:
        return self.window.energy if self.before is None else self.before + self.window.energy

    def _note(self) -> None:
        self.noted = time.monotonic()
        if self.state.exists():  # else there is nothing yet that another attempt would go on from
            write_json(self.path, {"energy": self.energy.to_dict(), "seconds": self.energy.seconds})

    def write(self, verdicts: Verdicts, counted: flops.PassFlops | None, about: dict[str, Any]) -> dict[str, Any]:
        """The final bill."""
        energy = self.energy
        bill: dict[str, Any] = {"energy": energy.to_dict(), "seconds": energy.seconds, "flops_how": "unknown"}
        if counted is not None:
            bill = flops.stage_record(counted, verdicts.calls, energy)
        write_json(self.path, bill | {"environment": about})
        return bill


def _part(n: int, shard: tuple[int, int]) -> tuple[int, int]:
    """[first, last) of the i-th of `count` contiguous parts of n rows."""
    i, count = shard
    if not 1 <= i <= count <= n:
        raise InputError(f"shard = {i}/{count} of {n} images (allowed: 1/n to n/n, n at most the number of images)")
    return n * (i - 1) // count, n * i // count
