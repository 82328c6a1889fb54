"""RobustBench's leaderboard entries as our table: what others reached, to overlay on one's own laws.

A folder of JSON files as the project publishes them (`model_info/<dataset>/<threat>/<entry>.json`), percentages as
text. The robust accuracy is `external` where there is one (a stronger published attack broke more), else
`autoattack_acc`. Nothing is known of what an entry's training cost, so cost columns are absent; parameters are counted
where the architecture's name says enough.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from robudget.accuracy import wilson
from robudget.datasets import PUBLISHED
from robudget.errors import InputError, unknown
from robudget.meter.conventions import wrn_forward_flops, wrn_parameters
from robudget.threat import parse_eps

IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}  # evaluated
NORMS = {"Linf": "linf", "L2": "l2"}
# Parameters before the last layer, which has 512 inputs (CIFAR variants).
RESNETS = {"ResNet-18": 11_168_832, "PreActResNet-18": 11_166_016}
NEAR = 0.02  # ε = 0.031, TRADES' own, counts as 8/255: every list of results sets them side by side


def is_folder(path: Path) -> bool:
    """Whether a folder holds RobustBench entries, at most two levels down."""
    first = next(_files(path), None)
    if first is None:
        return False
    try:
        entry = json.loads(first.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(entry, dict) and {"autoattack_acc", "architecture"} <= set(entry)


def load(path: str | Path) -> pd.DataFrame:
    """The entries below a folder, one row each, by name. Dataset and norm are the folder's, as RobustBench lays it out;
    where there are several, they are part of the name.

    Raises InputError where the folder holds none, or an entry cannot be read (named).
    """
    root = Path(path)
    rows = [_row(file) for file in _files(root)]
    if not rows:
        raise InputError(f"no RobustBench entry in {str(root)!r} (allowed: a folder of its JSON files)")
    table = pd.DataFrame(rows)
    if not table["run_id"].is_unique:
        table["run_id"] = table["dataset"] + "-" + table["norm"] + "-" + table["run_id"]
    return table


def _files(root: Path) -> Iterator[Path]:
    for pattern in ("*.json", "*/*.json", "*/*/*.json"):
        yield from sorted(root.glob(pattern))


def _row(file: Path) -> dict[str, Any]:
    try:
        entry = json.loads(file.read_text("utf-8"))
        if not isinstance(entry, dict):
            raise ValueError("not an object")
        clean, robust = float(entry["clean_acc"]), float(entry.get("external") or entry["autoattack_acc"])
        published = parse_eps(entry["eps"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{str(file)!r} is no RobustBench entry: {' '.join(str(error).split())}") from None
    dataset, norm = _where(file, entry)
    n, classes = IMAGES[dataset], PUBLISHED[dataset].classes
    low, high = wilson(robust / 100 * n, n)
    depth, width = _wrn(entry.get("architecture", ""))
    amount = _synthetic(entry.get("footnote") or "")
    return {
        "run_id": file.stem,
        "slug": file.stem,
        "status": "done",
        "dataset": dataset,
        "norm": norm,
        "eps": 8 / 255 if abs(published * 255 / 8 - 1) < NEAR else published,
        "model": f"wrn-{depth}-{width}" if depth else str(entry.get("architecture", "")),
        "parameters": _parameters(entry, dataset),
        "forward_flops": float(wrn_forward_flops(depth, width, classes=classes)) if depth else math.nan,
        "loss": "standard" if file.stem == "Standard" else None,
        "collapsed": False,  # nothing is known of how an entry was trained, nor why it fell
        "synthetic": amount > 0,
        "synthetic_amount": amount,
        "extra_data": bool(entry.get("additional_data")),
        "aa_acc": robust,
        "aa_acc_low": 100 * low,
        "aa_acc_high": 100 * high,
        "n_eval": n,
        "clean_acc": clean,
        "year": _year(entry),
    } | {f"published_{key}": value for key, value in entry.items()}


def _where(file: Path, entry: Mapping[str, Any]) -> tuple[str, str]:
    """Dataset and norm: from the folders, which are right where an entry is not; else from the entry."""
    folders = [part.name for part in list(file.resolve().parents)[:2]]
    norm = NORMS.get(folders[0])
    dataset = folders[1] if norm else str(entry.get("dataset", ""))
    if dataset not in IMAGES:
        raise unknown(f"dataset of {file.name}", dataset, IMAGES)
    return dataset, norm or ("l2" if parse_eps(entry["eps"]) == 0.5 else "linf")


def _wrn(architecture: str) -> tuple[int, int]:
    """Depth and width of a plain WideResNet, or (0, 0)."""
    match = re.fullmatch(r"WideResNet-(\d+)-(\d+)", architecture)
    depth, width = (int(match[1]), int(match[2])) if match else (0, 0)
    return (depth, width) if depth and (depth - 4) % 6 == 0 else (0, 0)


def _parameters(entry: Mapping[str, Any], dataset: str) -> float:
    architecture, classes = str(entry.get("architecture", "")), PUBLISHED[dataset].classes
    depth, width = _wrn(architecture)
    if dataset == "imagenet":
        return math.nan
    if depth:
        return float(wrn_parameters(depth, width, classes=classes))
    if architecture in RESNETS:
        return float(RESNETS[architecture] + 513 * classes)
    return math.nan


def _synthetic(footnote: str) -> float:
    """How many synthetic images a footnote names (`… 50M synthetic images …`), 0 where it names none."""
    match = re.search(r"(\d+)M synthetic", footnote)
    return float(match[1]) * 1e6 if match else 0.0


def _year(entry: Mapping[str, Any]) -> float:
    match = re.search(r"(19|20)\d\d", str(entry.get("venue", "")))
    return float(match[0]) if match else math.nan
