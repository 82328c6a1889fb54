"""The paper's published runs (arXiv 2312.13131) as our table: whole-run totals, with the published columns beside.

The CSV's `train_flops` is TFLOP per epoch and per GPU, its dollars are per epoch, and its carbon column is cumulative
within a job and unusable; specs of every column were checked against all 319 rows. Here `train_flops_paper` is the
published number times four GPUs and the epochs, `train_flops_exact` is counted from the recipe, energy follows from the
dollars (wall time × 4 × 300 W), and carbon from the energy. Each CSV column is kept as `published_<name>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from robudget.accuracy import collapsed, wilson
from robudget.errors import InputError, unknown
from robudget.meter.conventions import PAPER_EPOCH_IMAGES, PAPER_GPUS, PAPER_MODELS, exact_factor, wrn_forward_flops
from robudget.meter.prices import PAPER

WATTS = 300.0  # a V100's rated power: what the published dollars assume
N_EVAL = 10_000
COLUMNS = (
    "train_flops", "train_electricity_cost", "train_emissions", "epochs", "model", "model_parameters",
    "synthetic_data", "at", "at_steps", "aa_robust_acc", "eval_acc",
)  # fmt: skip
RESULTS = ("train_electricity_cost", "aa_robust_acc", "eval_acc")  # may be unknown
NUMBERS = (*RESULTS, "train_flops", "epochs", "model_parameters", "at_steps")


def is_paper_table(columns: Iterable[str]) -> bool:
    """Whether these are the columns of the paper's CSV."""
    return {"train_flops", "at_steps", "aa_robust_acc", "model_parameters"} <= set(columns)


def load(path: str | Path) -> pd.DataFrame:
    """The paper's CSV as our table. Raises InputError if it cannot be read or a column or model is not the paper's."""
    try:
        raw = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from None
    return table(raw, where=str(path))


def table(raw: pd.DataFrame, where: str = "the paper's table") -> pd.DataFrame:
    """The rows of the CSV, in order, with our column names and units (accuracies in percent, totals of whole runs).

    Rows that repeat another are dropped and accuracies given as fractions turned into percent, both said in
    `attrs["notes"]`. Raises InputError for a missing column, a loss or model that is not the paper's, and for a cell
    that holds no number where one is needed.
    """
    missing = [name for name in COLUMNS if name not in raw.columns]
    if missing:
        raise InputError(f"{where} is not the paper's CSV: it has no column {missing[0]!r}")
    raw, notes = _clean(raw, where)
    loss = raw["at"].map({"pgd": "at", "trades": "trades"})
    if loss.isna().any():
        raise unknown("loss in the paper's CSV", raw.loc[loss.isna(), "at"].iloc[0], ["pgd", "trades"])
    name = raw["model"].map(_model_name)
    smooth = raw["model"].str.endswith("_dm")
    forward = name.map({model: float(wrn_forward_flops(*shape)) for model, shape in PAPER_MODELS.items()})
    steps, epochs = raw["at_steps"].astype(int), raw["epochs"].astype(int)
    long = epochs >= 390  # 400 epochs came with EMA and CutMix, always together
    synthetic = raw["synthetic_data"].astype(bool)
    images = PAPER_EPOCH_IMAGES * epochs
    passes = np.array([exact_factor(one, k) for one, k in zip(loss, steps, strict=True)])
    usd = raw["train_electricity_cost"] * epochs
    kwh = usd / (PAPER.pue * PAPER.usd_per_kwh)
    robust, clean = raw["aa_robust_acc"].astype(float), raw["eval_acc"].astype(float)
    low, high = zip(*(_interval(share) for share in robust), strict=True)
    out = pd.DataFrame({
        "run_id": [f"paper-{i:03d}" for i in range(len(raw))],
        "slug": [
            f"cifar10-{n}{'-silu' if s else ''}-{a}{k}-{e}{'-syn' if d else ''}"
            for n, s, a, k, e, d in zip(name, smooth, loss, steps, epochs, synthetic, strict=True)
        ],
        "status": "done",
        "dataset": "cifar10",
        "norm": "linf",
        "eps": 8 / 255,
        "model": name,
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
        "aa_acc_low": 100 * np.array(low),
        "aa_acc_high": 100 * np.array(high),
        "n_eval": N_EVAL,
        "clean_acc": clean,
        "val_acc": math.nan,  # the published PGD-40 is of the last epoch, on test images, with a step that depends on K
        "collapsed": collapsed(robust.to_numpy(), clean.to_numpy()),
        "images_seen": images.astype(float),
        "train_flops_exact": forward * passes * images,
        "train_flops_paper": raw["train_flops"] * 1e12 * PAPER_GPUS * epochs,
        "train_flops_how": "counted",
        "train_seconds": kwh * 3.6e6 / (PAPER_GPUS * WATTS),
        "train_seconds_how": "estimated",  # their clock, read back from the dollars; the text's 16 days do not agree
        "gpu_hours": kwh / (WATTS / 1000),
        "train_energy_kwh": kwh,
        "train_energy_how": "estimated",
        "cost_usd": usd,
        "cost_usd_how": "estimated",
        "co2_kg": kwh * PAPER.gco2e_per_kwh / 1000,
        "co2_kg_how": "estimated",
        # What Figure 3 has on its x axis: one GPU's share of the run, in TFLOP.
        "published_run_tflops": raw["train_flops"] * epochs,
    })  # fmt: skip
    published = raw.add_prefix("published_")
    whole = pd.concat([out, published.set_index(out.index)], axis=1)
    whole.attrs["notes"] = notes
    return whole


def _clean(raw: pd.DataFrame, where: str) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Numbers as numbers, each row once, accuracies in percent; and what was done, one line each."""
    notes = []
    kept = raw.drop_duplicates().reset_index(drop=True)
    if len(kept) < len(raw):
        notes.append(f"{len(raw) - len(kept)} rows repeat another run and were dropped")
    for name in NUMBERS:
        numbers = pd.to_numeric(kept[name], errors="coerce")
        wrong = numbers.isna() & (kept[name].notna() if name in RESULTS else True)
        if wrong.any():
            value = kept.loc[wrong, name].iloc[0]
            raise InputError(f"{where}: {name} = {value!r} in row {int(wrong.argmax()) + 1} (allowed: a number)")
        kept[name] = numbers
    known = kept[["aa_robust_acc", "eval_acc"]].to_numpy(dtype=np.float64)
    if np.nanmax(known, initial=0.0) <= 1 and ((known > 0) & (known < 1)).any():
        kept[["aa_robust_acc", "eval_acc"]] *= 100
        notes.append(f"no accuracy exceeds {np.nanmax(known):.3g}: read as fractions and turned into percent")
    return kept, tuple(notes)


def _interval(share: float) -> tuple[float, float]:
    """Wilson's, as shares; NaN for an accuracy that is unknown or impossible."""
    return wilson(share / 100 * N_EVAL, N_EVAL) if 0 <= share <= 100 else (math.nan, math.nan)


def _model_name(name: str) -> str:
    match = re.fullmatch(r"wide_resnet(\d+)_(\d+)(?:_dm)?", str(name))
    ours = f"wrn-{match[1]}-{match[2]}" if match else ""
    if ours not in PAPER_MODELS:
        known = [f"wide_resnet{n[4:].replace('-', '_')}" for n in PAPER_MODELS]
        raise unknown("model in the paper's CSV", name, known)
    return ours
