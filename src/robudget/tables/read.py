"""Tables of runs: from a store's folders, csv, parquet, the paper's CSV and RobustBench's folder of JSON files.

Each but RobustBench's folder may also lie behind a URL (`remote.py`). What was changed or assumed while reading is in
`frame.attrs["notes"]`, one line each.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robudget.accuracy import collapsed
from robudget.columns import COLUMNS, ERRORS, stored
from robudget.errors import InputError
from robudget.files import is_url
from robudget.meter.prices import Prices, bill
from robudget.recipe import Recipe
from robudget.store import RunFolder, Store
from robudget.tables import published, remote
from robudget.tables.index import facts_of
from robudget.tables.usable import is_accuracy, to_percent
from robudget.threat import parse_eps

FLAGS = tuple(c.name for c in COLUMNS.values() if c.scale == "flag")
WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False, "1.0": True, "0.0": False}


def read_table(source: str | Path) -> pd.DataFrame:
    """One row a run, accuracies in percent, costs as whole-run totals with units in the column names.

    `source` is a folder of runs, RobustBench's folder of JSON entries, or a .csv or .parquet file; the paper's CSV is
    recognised by its columns. A folder of runs and the files may be URLs. Raises InputError where it is none of these
    or holds no row.
    """
    path, url = Path(source), str(source) if is_url(source) else None
    if remote.is_folder(url) if url else path.is_dir():
        if not url and published.is_leaderboard(path):
            return tidy(published.leaderboard_table(path))
        runs = load_runs(source)
        if runs.empty:
            raise InputError(f"no finished run in {str(source)!r}")
        return tidy(runs)
    if not url and not path.exists():
        raise InputError(f"no table at {str(path)!r} (allowed: a folder of runs, .csv, .parquet, RobustBench's folder)")
    kind = path.suffix.lower()
    try:
        if kind == ".csv":
            frame = pd.read_csv(io.BytesIO(remote.read(url)) if url else path)
        elif kind in (".parquet", ".pq"):
            frame = pd.read_parquet(io.BytesIO(remote.read(url)) if url else path)
        else:
            raise InputError(f"{str(source)!r} is no table (allowed: .csv, .parquet, a folder of runs)")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {str(source)!r}: {' '.join(str(error).split())}") from None
    if frame.empty:
        raise InputError(f"{str(source)!r} holds no run")
    if published.is_paper_table(frame.columns):
        return tidy(published.paper_table(frame, where=str(source)))
    return tidy(frame)


def load_runs(root: Path | str, *, prices: Prices | None = None) -> pd.DataFrame:
    """The finished runs of a store as a table, one row a run, and those that a sweep has ended early (their `status`).

    Accuracies are percent; `train_flops_*` are FLOP of the whole run on all devices; `train_energy_kwh` is that
    of GPU, CPU and memory, without PUE; `cost_usd` and `co2_kg` are the training's, by `prices` (default: the paper's).
    Unknown is NaN. `root` may be a URL. Raises InputError where it is no folder or a record is of another version.
    """
    prices = prices or Prices()
    if is_url(root):
        found = remote.records(str(root))
        paths, facts = [where for where, _ in found], [_facts(record, where) for where, record in found]
    else:
        store = Store(root)
        folders = store.folders()
        finished = [folder for folder in folders if folder.done]
        early = [folder for folder in folders if folder.ended_early is not None]
        paths = [str(folder.path) for folder in (*finished, *early)]
        facts = facts_of(store.root, finished, _of_folder, Path(__file__))
        facts += [_facts(folder.partial() or {}, str(folder.path)) for folder in early]
    rows = [{**row, **_bills(row, prices), "path": path} for row, path in zip(facts, paths, strict=True)]
    return pd.DataFrame(rows, columns=list(stored()))


def _of_folder(folder: RunFolder) -> dict[str, Any]:
    return _facts(folder.record(), str(folder.path), folder.path / "evals")


def _facts(record: Mapping[str, Any], where: str, evals: Path | None = None) -> dict[str, Any]:
    """What a run's record, and evaluations beyond one threat in `evals`, say, by column; what depends on prices is not
    in it."""
    recipe = Recipe.from_dict(record["recipe"], where=where)
    training, evaluation, data, environment, model = (
        record.get(part) or {} for part in ("training", "evaluation", "dataset", "environment", "model")
    )
    energy, eval_energy = training.get("energy") or {}, evaluation.get("energy") or {}
    kwh, seconds = _number(energy.get("kwh")), _number(training.get("seconds"))
    eval_kwh, eval_seconds = _number(eval_energy.get("kwh")), _number(evaluation.get("seconds"))
    on_gpu = environment.get("device") == "cuda"
    gpus = int(environment.get("processes") or 1) if on_gpu else 0
    clean, robust = 100 * _number(evaluation.get("clean")), 100 * _number(evaluation.get("robust"))
    return recipe.to_row() | {
        "status": record["status"],
        "parameters": _number(model.get("parameters")),
        "synthetic_amount": _number(data.get("synthetic")),
        "synthetic_fid": _number(data.get("synthetic_fid")),
        "aa_acc": robust,
        "aa_acc_how": evaluation.get("version"),
        "aa_acc_low": 100 * _number(evaluation.get("low")),
        "aa_acc_high": 100 * _number(evaluation.get("high")),
        "aa_acc_audit_sd": 100 * _number(evaluation.get("audit_deviation")),
        "n_eval": _number(evaluation.get("n")),
        "clean_acc": clean,
        "val_acc": 100 * _number(training.get("val_robust")),
        **_beyond(evals),
        "collapsed": recipe.adversarial and collapsed(robust, clean),
        "images_seen": _number(training.get("images_seen")),
        "train_flops_exact": _number(training.get("flops_exact")),
        "train_flops_paper": _number(training.get("flops_paper")),
        "train_flops_how": "counted",
        "eval_flops_exact": _number(evaluation.get("flops_exact")),
        **_lost(training, evaluation),
        "train_seconds": seconds,
        "train_seconds_how": "measured",
        "gpu_hours": gpus * seconds / 3600 if on_gpu else math.nan,
        "eval_seconds": eval_seconds,
        "train_energy_kwh": kwh,
        "train_energy_how": energy.get("how"),
        "eval_energy_kwh": eval_kwh,
        "eval_energy_how": eval_energy.get("how"),
        "cost_usd_how": energy.get("how"),
        "co2_kg_how": energy.get("how"),
        _GPUS: gpus,
        _SYNTHETIC: data.get("synthetic") if recipe.synthetic.share else 0,
    }


_GPUS, _SYNTHETIC = "gpus", "synthetic_images"  # what a bill needs beside the columns


def _lost(*stages: Mapping[str, Any]) -> dict[str, Any]:
    """FLOPs of killed attempts at a training and its evaluation; unknown of records of earlier versions."""
    ways = {stage["flops_lost_how"] for stage in stages if stage.get("flops_lost")}
    flops = sum(_number(stage.get("flops_lost")) for stage in stages if stage)
    how = "estimated" if "estimated" in ways else None if math.isnan(flops) else "counted"
    return {"lost_flops": flops, "lost_flops_how": how}


def _beyond(evals: Path | None) -> dict[str, Any]:
    """What evaluations of a run beyond one threat say (`beyond.py`), the last of each kind; shards are none."""
    row: dict[str, Any] = {}
    for kind in BEYOND:
        row |= {f"{kind}_acc": math.nan, f"{kind}_acc_how": None}
        there = () if evals is None else evals.glob(f"*/{BEYOND[kind]}.json")
        paths = [path for path in there if not _is_shard(path.parent.name)]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)[-1:]:
            data = json.loads(path.read_text("utf-8"))
            n = data["n"]
            if kind == "union":
                how = ", ".join(item["threat"] for item in data["threats"])
            elif kind == "unseen":
                how = ", ".join(f"{name} {item['eps']:g}" for name, item in data["attacks"].items())
            else:
                how = f"{data['source']}, {len(data['kinds'])} kinds"
            row |= {f"{kind}_acc": 100 * data[f"{kind}_accuracy"], f"{kind}_acc_how": f"{how}; {n} images"}
    return row


BEYOND = {"union": "union", "corruption": "corruptions", "unseen": "unseen"}  # column, file


def _is_shard(name: str) -> bool:
    return re.search(r"-\d+of\d+$", name) is not None


def _bills(row: Mapping[str, Any], prices: Prices) -> dict[str, Any]:
    kwh, seconds = row["train_energy_kwh"], row["train_seconds"]
    training = bill(kwh, seconds, prices, gpus=row[_GPUS], synthetic_images=row[_SYNTHETIC])
    evaluation = bill(row["eval_energy_kwh"], row["eval_seconds"], prices)
    return {
        "cost_usd": training.cost_usd,
        "eval_cost_usd": evaluation.cost_usd,
        "co2_kg": training.co2_kg,
        "eval_co2_kg": evaluation.co2_kg,
        "rent_usd": _number(training.rent_usd),
        "synthetic_energy_kwh": _number(training.synthetic_kwh),
        "synthetic_energy_how": training.synthetic,
    }


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with accuracies in percent, flags as booleans, ε as numbers, and each run once; rows numbered from 0.

    Accuracies given as fractions are recognised (none above 1) and rows that repeat another are dropped;
    `attrs["notes"]` says both. A tidy table is returned as it is. Raises InputError where one run_id names different
    runs, or flags or ε cannot be read.
    """
    if frame.attrs.get("tidy"):
        return frame
    notes = list(frame.attrs.get("notes", ()))
    out = _once(frame.copy(), notes)
    for name in FLAGS:
        if name in out.columns and not pd.api.types.is_bool_dtype(out[name]):
            flags = pd.Series([_flag(value, name) for value in out[name]], index=out.index, dtype=object)
            out[name] = flags if flags.isna().any() else flags.astype(bool)
    if "eps" in out.columns and not pd.api.types.is_numeric_dtype(out["eps"]):
        out["eps"] = [np.nan if pd.isna(value) else parse_eps(value) for value in out["eps"]]
    accuracies = [str(c) for c in out.columns if is_accuracy(str(c)) and not str(c).startswith("published_")]
    notes += to_percent(out, [*accuracies, *(name for name in ERRORS if name in out.columns)])
    out = out.reset_index(drop=True)
    out.attrs = {"notes": tuple(notes), "tidy": True}
    return out


def as_table(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    """A tidy table from a path or a frame."""
    return tidy(source) if isinstance(source, pd.DataFrame) else read_table(source)


def _once(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Each run once: rows that equal an earlier one in every column but `path` are dropped."""
    cells = frame.drop(columns="path", errors="ignore")
    for name in cells.columns:
        if cells[name].map(lambda v: isinstance(v, list | dict | np.ndarray)).any():  # they cannot be hashed
            cells[name] = cells[name].astype(str)
    rows = frame[~cells.duplicated()]
    if "run_id" in frame.columns and (twice := rows["run_id"].duplicated() & rows["run_id"].notna()).any():
        name = rows.loc[twice, "run_id"].iloc[0]
        n = int((rows["run_id"] == name).sum())
        raise InputError(f"run_id {name!r} names {n} different runs (allowed: one each)")
    if len(rows) < len(frame):
        notes.append(f"{len(frame) - len(rows)} rows repeat another run and were dropped")
    return rows


def _flag(value: object, name: str) -> object:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    word = str(value).strip().lower()
    if word not in WORDS:
        raise InputError(f"{name} = {value!r} (allowed: true, false)")
    return WORDS[word]
