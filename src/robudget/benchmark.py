"""The evaluation of any classifier that a user can name, composed: its data, the attacks, the meter, a folder."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from robudget import data
from robudget.attacks.victim import Model
from robudget.data import imagenet
from robudget.datasets import Preprocessing
from robudget.energy_log import EnergyLog
from robudget.environment import computing, environment
from robudget.errors import InputError
from robudget.evaluation.comparison import Comparison
from robudget.evaluation.comparison import compare as compare_verdicts
from robudget.evaluation.examples import Examples, Replay, replay
from robudget.evaluation.load import load_classifier, load_surrogate, preprocessing_of
from robudget.evaluation.specification import Specification
from robudget.evaluation.state import FILE as STATE
from robudget.evaluation.state import Progress, identity_of_state
from robudget.evaluation.verdicts import Verdicts, merge
from robudget.evaluation.victims import surrogate_of
from robudget.execution import Site
from robudget.files import write_json
from robudget.meter.energy import Energy
from robudget.meter.flops import PassFlops, count, stage_record, totals
from robudget.meter.machine import open_meter
from robudget.metered import evaluate_metered, part_of
from robudget.store import RunFolder, WorkFolder, writing
from robudget.threads import claimed
from robudget.threat import CUSTOMARY, Threat

ON_OTHERS = ("apgd-ce", "apgd-t:targets=3")  # what makes the examples of a model that are shown to another (ours)


def _is_validation(dataset: str, site: Site) -> bool:
    """Are these validation images of ImageNet without any to train on?"""
    return dataset == "imagenet" and site.data_root is not None and imagenet.has_validation_alone(Path(site.data_root))


@dataclass(frozen=True)
class Candidate:
    """A classifier by the name that the user gave it, the data to evaluate it on, and the run that it is from."""

    source: str
    model: Model
    dataset: data.Dataset
    run: RunFolder | None
    surrogate: Model | None = None
    """What gradients are taken through (`attacks.victim.Victim`), by the name `backward`; None: the model."""
    backward: str = "own"

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dataset: str | None = None,
        model: str | None = None,
        backward: str = "own",
        image_list: str | None = None,
        preprocessing: str | None = None,
        site: Site,
    ) -> Candidate:
        """`source` is a run's folder, whose recipe then gives dataset and threat, or anything that `load_classifier`
        takes. `backward` names the surrogate as `load_surrogate` takes it; `own`: the model's own `surrogate()`, where
        it has that method; `none`: no surrogate. `image_list` and `preprocessing` (default: the model's own) are of
        ImageNet's validation images. Raises InputError."""
        run = RunFolder(source) if Path(source).is_dir() else None
        dataset = dataset or (run.recipe.data.name if run is not None else None)
        if dataset is None:
            if Path(source).suffix == ".safetensors" or ":" in source or Path(source).exists():
                raise InputError("an evaluation needs its data (--data cifar10 --data-root FOLDER)")
            raise InputError(f"nothing to evaluate at {source!r}, or no --data for it (robudget eval --help)")
        size = run.recipe.data.image_size if run is not None else None
        if image_list is not None or preprocessing is not None or (run is None and _is_validation(dataset, site)):
            if dataset != "imagenet":
                raise InputError(f"an image list or preprocessing with {dataset} (allowed: with imagenet)")
            how = Preprocessing.parse(preprocessing) if preprocessing is not None else preprocessing_of(source)
            images = imagenet.load(site.data_root, image_list=image_list, preprocessing=how)
        else:
            images = data.load(dataset, root=site.data_root, image_size=size)
        classifier = load_classifier(_weights_of(source), images, model=model)
        if backward in ("own", "none"):
            surrogate = surrogate_of(classifier, "own" if backward == "own" else None)
        else:
            surrogate = load_surrogate(backward, images, classifier)
        return cls(source, classifier, images, run, surrogate, backward)

    def of_other(self, source: str) -> Candidate:
        """Another classifier, as `load` takes it, on the same data. Raises InputError."""
        return Candidate(source, load_classifier(_weights_of(source), self.dataset), self.dataset, None)

    @property
    def threat(self) -> Threat:
        """Its run's, or the customary one of its data. Raises InputError where there is neither."""
        if self.run is not None:
            return self.run.recipe.evaluation_threat
        if self.dataset.name not in CUSTOMARY:
            raise InputError("an evaluation needs its threat (--norm linf --eps 8/255)")
        return CUSTOMARY[self.dataset.name]

    @cached_property
    def flops(self) -> PassFlops | None:
        """Of one image's passes; None (unknown) of a plain function, and of a module that the counter cannot follow."""
        return self._count(self.model, "model")

    @cached_property
    def surrogate_flops(self) -> PassFlops | None:
        """The same of the surrogate; None too where there is none."""
        return self._count(self.surrogate, "surrogate")

    def _count(self, model: Model | None, what: str) -> PassFlops | None:
        if not isinstance(model, nn.Module):
            return None
        try:
            return count(model, self.dataset.image_shape)
        # A user's model can fail on stand-in tensors in any way; its verdicts must not be lost for that.
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            warnings.warn(f"FLOPs unknown: the {what} cannot be counted ({why})", stacklevel=3)
            return None


@dataclass(frozen=True)
class Benchmark:
    """`verdicts` per image and the `bill` (FLOPs, seconds, energy; as in run.json), both kept in `folder`."""

    folder: Path
    verdicts: Verdicts
    bill: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), **self.verdicts.summary(), "bill": self.bill}


def benchmark(
    candidate: Candidate,
    specification: Specification,
    *,
    site: Site,
    images: int | None = None,
    shard: tuple[int, int] = (1, 1),
    out: Path | None = None,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
    known: Verdicts | None = None,
) -> Benchmark:
    """Put a classifier through the ensemble on a test split and keep the verdicts; resumes what was begun.

    Where the specification shows a model's examples (`transfer:MODEL`, as `load_classifier` takes it) instead of a
    file's, that model is attacked first, on the same images, in a folder inside this one; its bill is in this one's.
    `images`: the first n of the test split. `shard` = (i, n): the i-th of n contiguous parts, from 1; noise goes with
    an image's row in the split, so shards give the verdicts of the whole. `restart` forgets what was begun. `known`: as
    an `Evaluator` takes it. Raises InputError; `store.Busy` where another process works in the folder.
    """
    dataset = candidate.dataset
    n, rows = rows_of(dataset, images, shard)
    folder = out or _default_folder(candidate, specification, n, shard)
    shown = [file for file in specification.files if not _is_of_examples(Path(file))]
    made = {
        source: benchmark(
            candidate.of_other(source),
            specification.on_other(ON_OTHERS),
            site=site,
            images=images,
            shard=shard,
            out=folder / f"examples-{_plain(source)}",
            restart=restart,
            progress=progress,
        )
        for source in shown
    }
    specification = specification.with_files({source: str(done.folder) for source, done in made.items()})
    with (
        computing(site.device) as device,
        work_folder(folder, restart) as work,
        claimed(site.threads, begun_with=identity_of_state(work.path).get("threads")),
        open_meter(str(device), **site.meter) as meter,
        EnergyLog(work, meter) as energy,
    ):
        verdicts = evaluate_metered(
            candidate.model,
            specification,
            dataset,
            rows,
            folder=folder,
            energy=energy,
            device=device,
            flops=lambda: candidate.flops,
            progress=progress,
            backward=candidate.surrogate,
            surrogate_flops=lambda: candidate.surrogate_flops,
            known=known,
            cuda_graphs=site.cuda_graphs,
        )
        bill = _bill(verdicts, candidate, energy.total("evaluation"))
        if made:
            bill["examples_of"] = {source: done.bill for source, done in made.items()}
        about = environment(device)
    with writing(folder):
        write_json(folder / "bill.json", bill | {"environment": about})
    return Benchmark(folder, verdicts, bill)


def _weights_of(source: str) -> str:
    """Of a run's folder its best; anything else stands for itself. Raises InputError."""
    if not Path(source).is_dir():
        return source
    run = RunFolder(source)
    if not run.best.exists():
        raise InputError(f"{str(run.path)!r} has no best.safetensors yet: train it first (robudget run)")
    return str(run.best)


def _is_of_examples(path: Path) -> bool:
    """Is this where examples were kept, or meant to be one, rather than the name of a model?"""
    return path.suffix == ".npz" or (path.is_dir() and not (path / "run.json").exists())


def rows_of(dataset: data.Dataset, images: int | None, shard: tuple[int, int]) -> tuple[int, range]:
    """How many images of the test split are asked for (None: all), and which of them are the shard's. Raises
    InputError."""
    n = len(dataset.test.first(images))
    i, parts = shard
    if not 1 <= i <= parts <= n:
        raise InputError(f"shard = {i}/{parts} of {n} images (allowed: 1/n to n/n, n at most the number of images)")
    return n, part_of(n, i - 1, parts)


def transfer(candidate: Candidate, examples: Path, *, site: Site, batch_size: int = 500) -> Replay:
    """Show kept adversarial examples (examples.npz, or the evaluation's folder it is in) to another classifier."""
    dataset = candidate.dataset
    kept = Examples.load(examples / "examples.npz" if examples.is_dir() else examples)
    if kept.x_adv.shape[1:] != dataset.image_shape or (len(kept) and int(kept.label.max()) >= dataset.classes):
        shapes = f"images {kept.x_adv.shape[1:]}, not of {dataset.name} {dataset.image_shape}"
        raise InputError(f"{str(examples)!r} holds {shapes}")
    with computing(site.device) as device:
        if isinstance(candidate.model, nn.Module):
            candidate.model.to(device)
        return replay(candidate.model, kept, batch_size=batch_size, device=device)


def compare(source: str, file: Path) -> Comparison:
    """The verdicts of an evaluation's folder, or a run's, beside those in a file (`evaluation.comparison`)."""
    folder = Path(source)
    if (folder / "run.json").exists():
        folder = folder / "evals" / RunFolder(folder).record()["evaluation"]["id"]
    return compare_verdicts(Verdicts.load(folder), file)


def merge_shards(shards: Sequence[Path], out: Path | None) -> tuple[Verdicts, Path]:
    """The shards' verdicts as one, and where it is written: `out`, or beside the first shard as `…-merged`."""
    verdicts = merge([Verdicts.load(path) for path in shards])
    target = out or merged_name(shards[0])
    with writing(target):
        verdicts.save(target)
    return verdicts, target


def merged_name(shard: Path) -> Path:
    """Where shards' results go together, beside the folder of the first."""
    return shard.with_name(re.sub(r"-\d+of\d+$", "", shard.name) + "-merged")


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` → (2, 4). Raises InputError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise InputError(f"shard = {text!r} (allowed: i/n, e.g. 2/4)")
    return int(match[1]), int(match[2])


def _default_folder(candidate: Candidate, specification: Specification, n: int, shard: tuple[int, int]) -> Path:
    attacks = specification.ensemble_name
    if specification.attacks is not None:
        attacks = "+".join(member.name if member.files else str(member) for member in specification.members)
    through = f"-through-{Path(candidate.backward).name}" if candidate.surrogate is not None else ""
    what = f"{specification.threat}-{attacks}{through}-{specification.seed}"
    return folder_of(candidate, what, n, shard)


def folder_of(candidate: Candidate, what: str, n: int, shard: tuple[int, int]) -> Path:
    """Where an evaluation of n images goes that the user named no folder for; `what` names the evaluation."""
    name = f"{Path(candidate.source).name}-{candidate.dataset.name}-{what}-n{n}"
    name += f"-{shard[0]}of{shard[1]}" if shard[1] > 1 else ""
    home = candidate.run.path / "evals" if candidate.run is not None else Path("evals")
    return home / _plain(name)


def _plain(name: str) -> str:
    """For a folder's name."""
    return re.sub(r"[^\w.-]+", "-", name)


@contextmanager
def work_folder(folder: Path, restart: bool) -> Iterator[WorkFolder]:
    """Where the evaluation keeps what it resumes from, locked against other processes. An evaluation that is refused
    before it begins leaves no folder behind."""
    existed, work = folder.exists(), WorkFolder(folder / "state")
    with writing(folder):
        work.path.mkdir(parents=True, exist_ok=True)
    try:
        with work.lock(guarding=folder):
            if restart:
                for path in (*work.path.glob("*.npz"), *work.path.glob("*.json*")):
                    path.unlink(missing_ok=True)
            _adopt_bill(folder, work)
            yield work
    except InputError:
        if not existed and not any(work.path.glob("*.npz")):
            shutil.rmtree(folder)
        raise


def _adopt_bill(folder: Path, work: WorkFolder) -> None:
    """Evaluations that were begun before there was a log noted their energy in bill.json."""
    if (work.path / STATE).exists() and (folder / "bill.json").exists() and not any(work.events("energy")):
        energy = Energy.from_dict(json.loads((folder / "bill.json").read_text("utf-8"))["energy"])
        work.log("energy", window="evaluation", interrupted=True, **energy.to_dict())


def _bill(verdicts: Verdicts, candidate: Candidate, energy: Energy) -> dict[str, Any]:
    counted, through_surrogate = candidate.flops, verdicts.surrogate_calls
    of_surrogate = candidate.surrogate_flops if through_surrogate else None
    if counted is None or (through_surrogate and of_surrogate is None):
        return {"energy": energy.to_dict(), "seconds": energy.seconds, "flops_how": "unknown"}
    record = stage_record(counted, verdicts.calls, energy)
    if of_surrogate is not None:
        record["flops_by_phase"] |= totals(of_surrogate, through_surrogate)
        record["flops_exact"] = sum(record["flops_by_phase"].values())
    return record
