"""The main job end to end on scikit-learn's digits: a study, its laws, a report. `robudget demo` is this function."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from robudget import __version__
from robudget.errors import RunFailed
from robudget.execution import Site
from robudget.files import write_json
from robudget.store import Store, writing
from robudget.sweep.local import sweep
from robudget.sweep.queue import SweepState
from robudget.sweep.study import Study
from robudget.tables.read import load_runs

STUDY = "digits-30"


@dataclass(frozen=True)
class DemoResult:
    """What the demo ends with. `seconds` are worker seconds of training and evaluation, all runs together; `wh` and
    `co2_g` are `how` ("measured" or "estimated"); `law` is one sentence with its interval, `formula` its numbers and
    `trust` how far they carry."""

    report: str
    law: str
    formula: str
    trust: str
    best: str
    runs: int
    seconds: float
    wh: float
    co2_g: float
    how: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def demo(
    out: Path | str = "demo",
    *,
    study: str = STUDY,
    workers: int = 0,
    watch: Callable[[SweepState], None] = lambda state: None,
) -> DemoResult:
    """Run the study into `out`/runs (skipping what is done), fit its laws and write `out`/report.html.

    A finished demo is recognised by the contents of its runs and only read again. Raises RunFailed where runs failed.
    """
    out = Path(out)
    home = Store(out / "runs")
    chosen = Study.load(study)
    with writing(home.root):
        home.root.mkdir(parents=True, exist_ok=True)
    state = sweep(chosen.recipes, store=home.root, site=Site(device="cpu"), workers=workers, watch=watch)
    if state.failed:
        index, why = next(iter(state.failed.items()))
        raise RunFailed(
            f"{len(state.failed)} of {len(chosen.recipes)} runs failed; {chosen.recipes[index].slug}: {why}"
        )
    folders = [home.folder(recipe) for recipe in chosen.recipes]
    contents = _digest([folder.path / "run.json" for folder in folders])
    seal = out / "demo.json"
    if (before := _sealed(seal, contents)) is not None:
        return before
    table = load_runs(home.root)
    table = table[table.run_id.isin({recipe.id for recipe in chosen.recipes})].reset_index(drop=True)
    with writing(out):
        result = _conclude(table, chosen, out)
        write_json(seal, {"contents": contents, "result": result.to_dict()})
    return result


def _conclude(table: pd.DataFrame, study: Study, out: Path) -> DemoResult:
    from robudget.analysis import analyse
    from robudget.report import write
    from robudget.report.sections.answer import sentence

    analysis = analyse(table)
    report = write(table, analysis, out, title="What does robustness cost on digits?", subtitle=study.question)
    best = table.iloc[int(table.aa_acc.argmax())]
    kwh = table.train_energy_kwh.sum(skipna=False) + table.eval_energy_kwh.sum(skipna=False)
    kg = table.co2_kg.sum(skipna=False) + table.eval_co2_kg.sum(skipna=False)
    hows = set(table.train_energy_how) | set(table.eval_energy_how)
    return DemoResult(
        report=str(report),
        law=sentence(analysis.law),
        formula=analysis.law.sentence(),
        trust=analysis.trust[0],
        best=(
            f"{best.slug}: {best.aa_acc:.1f}% robust [{best.aa_acc_low:.1f}, {best.aa_acc_high:.1f}], "
            f"{best.clean_acc:.1f}% clean of {best.n_eval:.0f} images"
        ),
        runs=len(table),
        seconds=float(table.train_seconds.sum() + table.eval_seconds.sum()),
        wh=1000 * float(kwh),
        co2_g=1000 * float(kg),
        how="measured" if hows == {"measured"} else "estimated",
    )


def _digest(paths: list[Path]) -> str:
    """Of the runs' records and of this version: when neither changed, neither does the report."""
    sha = hashlib.sha256(__version__.encode())
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _sealed(path: Path, contents: str) -> DemoResult | None:
    """The result of a finished demo, if it is of these runs and its report is still there."""
    try:
        seal = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if seal.get("contents") != contents or not Path(seal["result"]["report"]).exists():
        return None
    result: dict[str, Any] = {key: math.nan if value is None else value for key, value in seal["result"].items()}
    return DemoResult(**result)
