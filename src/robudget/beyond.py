"""Evaluations beyond one threat, composed: several threats, the robustness curve, corruptions, unseen attacks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from robudget.benchmark import Candidate, benchmark, folder_of, merged_name, rows_of, work_folder
from robudget.data.corruptions import computed
from robudget.data.corruptions import read as read_corruptions
from robudget.energy_log import EnergyLog
from robudget.environment import computing
from robudget.errors import InputError
from robudget.evaluation.corruptions import Corruptions, corruptions, merge_corruptions
from robudget.evaluation.curve import ATTACKS, Curve, curve, merge_curves
from robudget.evaluation.measurement import Measured, Setting
from robudget.evaluation.specification import Precision, Specification
from robudget.evaluation.state import Progress
from robudget.evaluation.union import Union, check_threats, merge_unions, told_of
from robudget.evaluation.unseen import ATTACKS as UNSEEN
from robudget.evaluation.unseen import UnseenAccuracy, merge_unseen, unseen
from robudget.evaluation.verdicts import Verdicts
from robudget.execution import Site
from robudget.meter.machine import open_meter
from robudget.store import writing
from robudget.threads import claimed
from robudget.threat import Norm, Threat

Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class Asked:
    """What evaluations beyond one threat have in common: the machine, the first `images` of the test split (None: all),
    `shard` = (i, n) the i-th of n parts of them from 1, the folder, and whether to forget what was begun in it."""

    site: Site
    images: int | None = None
    shard: tuple[int, int] = (1, 1)
    out: Path | None = None
    restart: bool = False
    seed: int = 0
    batch_size: int = 500
    precision: Precision = "auto"
    progress: Tell | None = None


# -- several threats ---------------------------------------------------------------------------------------------------


def threats(
    candidate: Candidate, specification: Specification, threats: Sequence[Threat], asked: Asked
) -> tuple[Path, Union]:
    """The ensemble under each threat, in a sub-folder each, and the images that stand against all; the clean pass is
    made once. The specification's own threat does not count. Raises InputError; `store.Busy`."""
    check_threats(threats, specification.ensemble_name)
    n, _ = rows_of(candidate.dataset, asked.images, asked.shard)
    what = "+".join(threat.slug for threat in threats)
    folder = asked.out or folder_of(
        candidate, f"{what}-{specification.ensemble_name}-{specification.seed}", n, asked.shard
    )
    parts: list[Verdicts] = []
    for number, threat in enumerate(threats):
        done = benchmark(
            candidate,
            replace(specification, threat=threat),
            site=asked.site,
            images=asked.images,
            shard=asked.shard,
            out=folder / threat.slug,
            restart=asked.restart,
            progress=told_of(asked.progress, threat, number, len(threats)),
            known=parts[0] if parts else None,
        )
        parts.append(done.verdicts)
    union = Union(parts)
    with writing(folder):
        union.save(folder)
    _enter(candidate)
    return folder, union


# -- measurements ------------------------------------------------------------------------------------------------------

M = TypeVar("M", bound=Measured)


def robustness_curve(
    candidate: Candidate,
    asked: Asked,
    *,
    norm: Norm | None = None,
    limit: float | None = None,
    attacks: Sequence[str] = ATTACKS,
) -> tuple[Path, Curve]:
    """The accuracy at every ε up to `limit` (default: twice the ε of the candidate's threat), and a figure of it. Where
    AutoAttack's verdicts on the same images and model lie beside its folder, the two are compared."""
    try:
        threat: Threat | None = candidate.threat
    except InputError:
        threat = None
    norm = norm or (threat.norm if threat is not None else "linf")
    threat = threat if threat is not None and threat.norm == norm else None
    if limit is None:
        if threat is None:
            raise InputError(f"a curve in {norm} needs its end (--eps 16/255)")
        limit = 2 * threat.eps
    end = min(limit, 1.0) if norm == "linf" else limit

    def measured(setting: Setting, rows: range) -> Curve:
        part = candidate.dataset.test[rows.start : rows.stop]
        return curve(
            candidate.model,
            part.images,
            part.labels,
            norm,
            limit=end,
            attacks=attacks,
            setting=setting,
            index=_index(rows),
            classes=candidate.dataset.classes,
        )

    def beside(result: Curve, folder: Path) -> dict[str, Any]:
        return {} if threat is None else {"at": _beside(result, threat, folder.parent)}

    folder, result = _measured(candidate, asked, f"curve-{norm}-{'+'.join(attacks)}", measured, beside)
    with writing(folder):
        from robudget.report.curve import save_curve  # matplotlib

        save_curve(result.points(), norm, folder, n=result.n, at=result.about.get("at"))
    return folder, result


def _beside(result: Curve, threat: Threat, home: Path) -> dict[str, Any]:
    """What the curve says at the threat's ε, and AutoAttack where an evaluation of the same images lies in `home`."""
    at: dict[str, Any] = {"eps": threat.eps, "accuracy": result.accuracy(threat.eps), "autoattack": None}
    for path in sorted(home.glob("*/result.json")):
        try:
            verdicts = Verdicts.load(path.parent)
        except InputError:
            continue
        same = all(verdicts.about.get(key) == result.about.get(key) for key in ("weights", "images", "labels"))
        version = verdicts.about.get("version")
        if verdicts.threat == threat and same and version in ("standard", "plus"):
            mine, theirs = result.robust(threat.eps), verdicts.robust
            at |= {
                "autoattack": verdicts.robust_accuracy,
                "version": version,
                "only_autoattack": int(np.sum(mine & ~theirs)),
                "only_curve": int(np.sum(~mine & theirs)),
            }
            break
    return at


def _measured(
    candidate: Candidate,
    asked: Asked,
    what: str,
    measure: Callable[[Setting, range], M],
    compared: Callable[[M, Path], dict[str, Any]] = lambda result, folder: {},
) -> tuple[Path, M]:
    """Measure the shard's rows in a folder that it can be resumed from, metered; saved with its FLOPs and energy, and
    with what `compared` says of the result beside others."""
    n, rows = rows_of(candidate.dataset, asked.images, asked.shard)
    folder = asked.out or folder_of(candidate, f"{what}-{asked.seed}", n, asked.shard)
    with (
        computing(asked.site.device) as device,
        work_folder(folder, asked.restart) as work,
        claimed(asked.site.threads, begun_with=_threads_of(work.path)),
        open_meter(str(device), **asked.site.meter) as meter,
        EnergyLog(work, meter) as energy,
    ):
        with energy.window("evaluation"):
            setting = Setting(
                asked.batch_size,
                asked.precision,
                asked.seed,
                device,
                work.path,
                asked.progress,
                energy.window,
                candidate.surrogate,
            )
            result = measure(setting, rows)
        result = replace(result, about={**result.about, "dataset": candidate.dataset.name})
        counted = candidate.flops
        if counted is not None:
            surrogate = candidate.surrogate_flops if candidate.surrogate is not None else None
            of_surrogate = None if surrogate is None else (surrogate.forward, surrogate.input_backward)
            spent = [item.with_flops(counted.forward, counted.input_backward, of_surrogate) for item in result.spent]
            result = replace(result, spent=spent)
        result = replace(result, about={**result.about, **compared(result, folder)})
    with writing(folder):
        result.save(folder)
    _enter(candidate)
    return folder, result


def _threads_of(state: Path) -> int | None:
    """The CPU threads with which what lies in `state` was begun."""
    try:
        threads = json.loads((state / "measurement.json").read_text("utf-8"))["threads"]
    except (OSError, ValueError, KeyError):
        return None
    return int(threads)


def _index(rows: range) -> Any:
    import torch

    return torch.arange(rows.start, rows.stop)


def _enter(candidate: Candidate) -> None:
    """An index of runs reads again what this one's evaluations say (`tables/index.py`)."""
    if candidate.run is not None:
        os.utime(candidate.run.path / "evals")


def under_corruptions(
    candidate: Candidate,
    asked: Asked,
    *,
    kinds: Sequence[str] = (),
    root: Path | None = None,
    reference: Path | None = None,
) -> tuple[Path, Corruptions]:
    """The accuracy under common corruptions: computed by a library, or read from `root` in CIFAR-10-C's layout.
    `reference`: the folder of another model's, to which errors are relative (mCE)."""
    test = candidate.dataset.test
    source = computed(test, kinds, seed=asked.seed) if root is None else read_corruptions(root, test, kinds)
    other = None if reference is None else Corruptions.load(reference)

    def measured(setting: Setting, rows: range) -> Corruptions:
        part, start = test[rows.start : rows.stop], rows.start
        return corruptions(
            candidate.model,
            part.images,
            part.labels,
            lambda kind, severity, some: source.images(kind, severity, range(start + some.start, start + some.stop)),
            source.kinds,
            setting=setting,
            index=_index(rows),
            classes=candidate.dataset.classes,
            about={"source": source.source, "made": source.made},
        )

    what = "corruptions" + (f"-{source.source}" if root is not None else "") + ("-" + "+".join(kinds) if kinds else "")

    def relative(result: Corruptions, folder: Path) -> dict[str, Any]:
        if other is None:
            return {}
        return {"relative": {"reference": str(reference), "mce": result.relative_to(other)}}

    return _measured(candidate, asked, what, measured, relative)


def unseen_attacks(
    candidate: Candidate, asked: Asked, *, attacks: Sequence[str] = UNSEEN
) -> tuple[Path, UnseenAccuracy]:
    """The accuracy under attacks outside the norms, which no recipe here trains against."""

    def measured(setting: Setting, rows: range) -> UnseenAccuracy:
        part = candidate.dataset.test[rows.start : rows.stop]
        return unseen(
            candidate.model,
            part.images,
            part.labels,
            attacks=attacks,
            setting=setting,
            index=_index(rows),
            classes=candidate.dataset.classes,
        )

    return _measured(candidate, asked, f"unseen-{'+'.join(attacks)}", measured)


# -- shards ------------------------------------------------------------------------------------------------------------


def merge_folders(folders: Sequence[Path], out: Path | None) -> tuple[Path, Union | Measured] | None:
    """The shards in these folders as one, and where it is written: `out`, or beside the first as `…-merged`. None where
    they are ordinary evaluations. Raises InputError."""
    found = [next((kind for kind in MERGE if (folder / f"{kind}.json").exists()), "") for folder in folders]
    if not any(found):
        return None
    if len(set(found)) > 1:
        raise InputError(f"the shards are of different kinds: {', '.join(sorted({k or 'eval' for k in found}))}")
    result = MERGE[found[0]](folders)
    target = out or merged_name(folders[0])
    with writing(target):
        result.save(target)
    return target, result


MERGE: dict[str, Callable[[Sequence[Path]], Union | Measured]] = {
    "union": lambda folders: merge_unions([Union.load(folder) for folder in folders]),
    "curve": lambda folders: merge_curves([Curve.load(folder) for folder in folders]),
    "corruptions": lambda folders: merge_corruptions([Corruptions.load(folder) for folder in folders]),
    "unseen": lambda folders: merge_unseen([UnseenAccuracy.load(folder) for folder in folders]),
}
