"""What others published as our table: the runs of the paper (arXiv 2312.13131) and RobustBench's leaderboard.

**The paper's CSV.** Its `train_flops` is TFLOP per epoch and per GPU, its dollars are per epoch, and its carbon column
is cumulative within a job and unusable; the meaning of every column was checked against all 319 rows. Here
`train_flops_paper` is the published number times four GPUs and the epochs, `train_flops_exact` is counted from the
recipe, energy follows from the dollars (wall time × 4 × 300 W), and carbon from the energy.

**RobustBench** publishes a JSON file an entry (`model_info/<dataset>/<threat>/<entry>.json`), with percentages as text.
The robust accuracy is `external` where there is one (a stronger published attack broke more), else `autoattack_acc`.
What an entry's training cost is not known, so there is no cost column; parameters are counted where the name of the
architecture gives them.

In both, every field of the source is a column `published_<name>`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robudget.accuracy import collapsed, wilson
from robudget.datasets import PUBLISHED
from robudget.errors import InputError, unknown
from robudget.meter.conventions import (
    PAPER_EPOCH_IMAGES,
    PAPER_GPUS,
    PAPER_MODELS,
    exact_factor,
    wrn_forward_flops,
    wrn_parameters,
)
from robudget.meter.prices import PAPER
from robudget.tables.usable import to_percent
from robudget.threat import parse_eps

V100_WATTS = 300.0  # its rated power: what the published dollars assume
V100_KW = V100_WATTS / 1000
PAPER_EVALUATED = 10_000  # images
RESULTS = ("train_electricity_cost", "aa_robust_acc", "eval_acc")  # of the CSV; may be unknown
NUMBERS = (*RESULTS, "train_flops", "epochs", "model_parameters", "at_steps")
CSV_COLUMNS = (*NUMBERS, "train_emissions", "model", "synthetic_data", "at")

EVALUATED = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}  # images, by data set of the leaderboard
NORMS = {"Linf": "linf", "L2": "l2"}
# Parameters before the last layer, which has 512 inputs (CIFAR variants).
RESNETS = {"ResNet-18": 11_168_832, "PreActResNet-18": 11_166_016}
NEAR = 0.02  # ε = 0.031, TRADES' own, counts as 8/255: every list of results sets them side by side


# -- the paper's CSV --------------------------------------------------------------------------------------------------


def is_paper_table(columns: Iterable[str]) -> bool:
    """Whether these are the columns of the paper's CSV."""
    return {"train_flops", "at_steps", "aa_robust_acc", "model_parameters"} <= set(columns)


def paper_table(raw: pd.DataFrame, where: str = "the paper's table") -> pd.DataFrame:
    """The rows of the paper's CSV, in order, with our column names and units (accuracies in percent, totals of whole
    runs).

    Rows that repeat another are dropped and accuracies given as fractions turned into percent; `attrs["notes"]` says
    both. Raises InputError for a missing column, a loss or model that is not the paper's, and for a cell that holds no
    number where one is needed.
    """
    missing = [name for name in CSV_COLUMNS if name not in raw.columns]
    if missing:
        raise InputError(f"{where} is not the paper's CSV: it has no column {missing[0]!r}")
    raw, notes = _clean(raw, where)
    loss = raw["at"].map({"pgd": "at", "trades": "trades"})
    if loss.isna().any():
        raise unknown("loss in the paper's CSV", raw.loc[loss.isna(), "at"].iloc[0], ["pgd", "trades"])
    model = raw["model"].map(_paper_model)
    smooth = raw["model"].str.endswith("_dm")
    forward = model.map({name: float(wrn_forward_flops(*shape)) for name, shape in PAPER_MODELS.items()})
    steps, epochs = raw["at_steps"].astype(int), raw["epochs"].astype(int)
    long = epochs >= 390  # 400 epochs came with EMA and CutMix, always together
    synthetic = raw["synthetic_data"].astype(bool)
    images = PAPER_EPOCH_IMAGES * epochs
    passes = np.array([exact_factor(name, k) for name, k in zip(loss, steps, strict=True)])
    usd = raw["train_electricity_cost"] * epochs
    kwh = usd / (PAPER.pue * PAPER.usd_per_kwh)
    robust, clean = raw["aa_robust_acc"].astype(float), raw["eval_acc"].astype(float)
    low, high = zip(*(_interval(percent, PAPER_EVALUATED) for percent in robust), strict=True)
    out = pd.DataFrame({
        "run_id": [f"paper-{i:03d}" for i in range(len(raw))],
        "slug": [
            f"cifar10-{n}{'-silu' if s else ''}-{a}{k}-{e}{'-syn' if d else ''}"
            for n, s, a, k, e, d in zip(model, smooth, loss, steps, epochs, synthetic, strict=True)
        ],
        "status": "done",
        "dataset": "cifar10",
        "norm": "linf",
        "eps": 8 / 255,
        "model": model,
        "base": 16,
        "activation": np.where(smooth, "silu", "relu"),
        "variant": np.where(smooth, "deepmind", "original"),
        "parameters": raw["model_parameters"].astype(float),
        "loss": loss,
        "beta": np.where(loss == "trades", 5.0, np.nan),
        "steps": steps,
        "epochs": epochs,
        "epoch_images": PAPER_EPOCH_IMAGES,
        "ema": long,
        "ema_decay": np.where(long, 0.995, np.nan),
        "cutmix": long,
        "synthetic": synthetic,
        "synthetic_fraction": np.where(synthetic, 0.7, 0.0),
        "synthetic_amount": np.where(synthetic, 1e6, 0.0),
        "aa_acc": robust,
        "aa_acc_low": low,
        "aa_acc_high": high,
        "n_eval": PAPER_EVALUATED,
        "clean_acc": clean,
        "val_acc": math.nan,  # the published PGD-40 is of the last epoch, on test images, with a step that depends on K
        "collapsed": collapsed(robust.to_numpy(), clean.to_numpy()),
        "images_seen": images.astype(float),
        "train_flops_exact": forward * passes * images,
        "train_flops_paper": raw["train_flops"] * 1e12 * PAPER_GPUS * epochs,
        "train_flops_how": "counted",
        "train_seconds": kwh * 3.6e6 / (PAPER_GPUS * V100_WATTS),
        "train_seconds_how": "estimated",  # their clock, read back from the dollars; the text's 16 days do not agree
        "gpu_hours": kwh / V100_KW,
        "train_energy_kwh": kwh,
        "train_energy_how": "estimated",
        "cost_usd": usd,
        "cost_usd_how": "estimated",
        "co2_kg": kwh * PAPER.gco2e_per_kwh / 1000,
        "co2_kg_how": "estimated",
        # What Figure 3 has on its x axis: one GPU's share of the run, in TFLOP.
        "published_run_tflops": raw["train_flops"] * epochs,
    })  # fmt: skip
    table = pd.concat([out, raw.add_prefix("published_")], axis=1)
    table.attrs["notes"] = notes
    return table


def _clean(raw: pd.DataFrame, where: str) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Numbers as numbers, each row once, accuracies in percent; and what was done, one line each."""
    notes = []
    rows = raw.drop_duplicates().reset_index(drop=True)
    if len(rows) < len(raw):
        notes.append(f"{len(raw) - len(rows)} rows repeat another run and were dropped")
    for name in NUMBERS:
        numbers = pd.to_numeric(rows[name], errors="coerce")
        wrong = numbers.isna() & (rows[name].notna() if name in RESULTS else True)
        if wrong.any():
            value = rows.loc[wrong, name].iloc[0]
            raise InputError(f"{where}: {name} = {value!r} in row {int(wrong.argmax()) + 1} (allowed: a number)")
        rows[name] = numbers
    notes += to_percent(rows, ("aa_robust_acc", "eval_acc"))
    return rows, tuple(notes)


def _paper_model(name: str) -> str:
    match = re.fullmatch(r"wide_resnet(\d+)_(\d+)(?:_dm)?", str(name))
    ours = f"wrn-{match[1]}-{match[2]}" if match else ""
    if ours not in PAPER_MODELS:
        allowed = [f"wide_resnet{n[4:].replace('-', '_')}" for n in PAPER_MODELS]
        raise unknown("model in the paper's CSV", name, allowed)
    return ours


def _interval(percent: float, n: int) -> tuple[float, float]:
    """Wilson's, in percent, of an accuracy over `n` images; NaN where it is unknown or impossible."""
    low, high = wilson(percent / 100 * n, n) if 0 <= percent <= 100 else (math.nan, math.nan)
    return 100 * low, 100 * high


# -- RobustBench's leaderboard ----------------------------------------------------------------------------------------


def is_leaderboard(path: Path) -> bool:
    """Whether a folder holds RobustBench entries, at most two levels down."""
    first = next(_entries(path), None)
    if first is None:
        return False
    try:
        entry = json.loads(first.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(entry, dict) and {"autoattack_acc", "architecture"} <= set(entry)


def leaderboard_table(path: str | Path) -> pd.DataFrame:
    """The entries below a folder, one row each, by name. Dataset and norm are the folder's, as RobustBench lays it out;
    where there are several, they are part of the name.

    Raises InputError where the folder holds none, or an entry cannot be read (named).
    """
    root = Path(path)
    rows = [_entry(file) for file in _entries(root)]
    if not rows:
        raise InputError(f"no RobustBench entry in {str(root)!r} (allowed: a folder of its JSON files)")
    table = pd.DataFrame(rows)
    if not table["run_id"].is_unique:
        table["run_id"] = table["dataset"] + "-" + table["norm"] + "-" + table["run_id"]
    return table


def _entries(root: Path) -> Iterator[Path]:
    for pattern in ("*.json", "*/*.json", "*/*/*.json"):
        yield from sorted(root.glob(pattern))


def _entry(file: Path) -> dict[str, Any]:
    try:
        entry = json.loads(file.read_text("utf-8"))
        if not isinstance(entry, dict):
            raise ValueError("not an object")
        clean, robust = float(entry["clean_acc"]), float(entry.get("external") or entry["autoattack_acc"])
        eps = parse_eps(entry["eps"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{str(file)!r} is no RobustBench entry: {' '.join(str(error).split())}") from None
    dataset, norm = _scope(file, entry)
    n, classes = EVALUATED[dataset], PUBLISHED[dataset].classes
    low, high = _interval(robust, n)
    architecture = str(entry.get("architecture", ""))
    shape = _wide_resnet(architecture)
    amount = _synthetic_images(entry.get("footnote") or "")
    return {
        "run_id": file.stem,
        "slug": file.stem,
        "status": "done",
        "dataset": dataset,
        "norm": norm,
        "eps": 8 / 255 if abs(eps * 255 / 8 - 1) < NEAR else eps,
        "model": f"wrn-{shape[0]}-{shape[1]}" if shape else architecture,
        "parameters": math.nan if dataset == "imagenet" else _parameters(architecture, classes),
        "forward_flops": float(wrn_forward_flops(*shape, classes=classes)) if shape else math.nan,
        "loss": "standard" if file.stem == "Standard" else None,
        "collapsed": False,  # nothing is known of how an entry was trained, nor why its accuracy is low
        "synthetic": amount > 0,
        "synthetic_amount": amount,
        "extra_data": bool(entry.get("additional_data")),
        "aa_acc": robust,
        "aa_acc_low": low,
        "aa_acc_high": high,
        "n_eval": n,
        "clean_acc": clean,
        "year": _year(entry),
    } | {f"published_{key}": value for key, value in entry.items()}


def _scope(file: Path, entry: Mapping[str, Any]) -> tuple[str, str]:
    """Dataset and norm: from the folders, which are right where an entry is not; else from the entry."""
    threat, data = (part.name for part in list(file.resolve().parents)[:2])
    norm = NORMS.get(threat)
    dataset = data if norm else str(entry.get("dataset", ""))
    if dataset not in EVALUATED:
        raise unknown(f"dataset of {file.name}", dataset, EVALUATED)
    return dataset, norm or ("l2" if parse_eps(entry["eps"]) == 0.5 else "linf")


def _wide_resnet(architecture: str) -> tuple[int, int] | None:
    """Depth and width of a plain WideResNet."""
    match = re.fullmatch(r"WideResNet-(\d+)-(\d+)", architecture)
    return (int(match[1]), int(match[2])) if match and (int(match[1]) - 4) % 6 == 0 else None


def _parameters(architecture: str, classes: int) -> float:
    if shape := _wide_resnet(architecture):
        return float(wrn_parameters(*shape, classes=classes))
    return float(RESNETS[architecture] + 513 * classes) if architecture in RESNETS else math.nan


def _synthetic_images(footnote: str) -> float:
    """How many synthetic images a footnote names (`… 50M synthetic images …`), 0 where it names none."""
    match = re.search(r"(\d+)M synthetic", footnote)
    return float(match[1]) * 1e6 if match else 0.0


def _year(entry: Mapping[str, Any]) -> float:
    match = re.search(r"(19|20)\d\d", str(entry.get("venue", "")))
    return float(match[0]) if match else math.nan
