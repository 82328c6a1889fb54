"""Tables as a store would give them: a small study on digits, made up but with every column and every awkward case."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robudget import report
from robudget.analysis import Analysis, analyse

F = {"wrn-10-1": 2.0e6, "wrn-16-2": 1.6e7, "wrn-16-4": 6.2e7}
SIZES = {"wrn-10-1": 19_700, "wrn-16-2": 173_000, "wrn-16-4": 690_000}


def _rows() -> Iterator[dict[str, object]]:
    draw = np.random.default_rng(3)
    n = 0
    for model in F:
        for loss, steps in (("standard", 0), ("at", 1), ("at", 2), ("at", 5), ("trades", 5)):
            for synthetic in (False, True):
                n += 1
                images = 1437 * 40
                flops = F[model] * images * ((2 * steps + (7 if loss == "trades" else 3)) if steps else 3)
                reach = 24 + 5.5 * math.log10(flops / 1e10) + 4 * synthetic + 2 * (loss == "trades")
                aa = 0.5 if loss == "standard" else reach + draw.normal(0, 1.2) - (5 - steps)
                collapsed = loss == "at" and steps == 1 and model != "wrn-10-1"
                if collapsed:
                    aa = abs(draw.normal(0, 2.0))
                half = 196 * math.sqrt(max(aa, 0.5) * (100 - aa) / 1e4 / 360)
                seconds = flops / 6e10
                kwh = seconds * 22 / 3.6e6
                yield {
                    "run_id": f"{n:012x}",
                    "slug": f"digits-{model}-{loss}{steps or ''}{'-syn' if synthetic else ''}",
                    "path": f"/somewhere/{n:012x}",
                    "dataset": "digits",
                    "norm": "linf",
                    "eps": 0.1,
                    "model": model,
                    "parameters": SIZES[model],
                    "activation": "silu" if loss == "trades" else "relu",
                    "base": 16,
                    "loss": loss,
                    "beta": 6.0 if loss == "trades" else math.nan,
                    "steps": steps,
                    "epochs": 40,
                    "ema": synthetic,
                    "ema_decay": 0.995 if synthetic else math.nan,
                    "cutmix": False,
                    "synthetic": synthetic,
                    "synthetic_fraction": 0.7 if synthetic else 0.0,
                    "seed": 0,
                    "status": "done",
                    "aa_acc": round(aa, 4),
                    "aa_acc_low": max(aa - half, 0.0),
                    "aa_acc_high": aa + half,
                    "n_eval": 360,
                    "clean_acc": 96 - 6 * (steps > 0) + draw.normal(0, 0.7),
                    "val_acc": max(aa + 3 + draw.normal(0, 1), 0.0),
                    "train_flops_exact": flops,
                    "train_flops_paper": flops * 1.3,
                    "train_flops_how": "counted",
                    "eval_flops_exact": F[model] * 360 * 4000,
                    "train_energy_kwh": kwh,
                    "eval_energy_kwh": kwh * 0.4,
                    "train_energy_how": "estimated",
                    "eval_energy_how": "estimated",
                    "eval_cost_usd": kwh * 0.4 * 1.58 * 0.12,
                    "eval_co2_kg": kwh * 0.4 * 0.5663,
                    "cost_usd_how": "estimated",
                    "co2_kg_how": "estimated",
                    "cost_usd": kwh * 1.58 * 0.12,
                    "co2_kg": kwh * 0.5663,
                    "train_seconds": seconds,
                    "eval_seconds": seconds * 0.4,
                    "images_seen": images,
                    "collapsed": collapsed,
                }


def made_up() -> pd.DataFrame:
    """30 runs: 28 done with 4 of them collapsed, one failed (its results unknown) and one without an energy reading."""
    table = pd.DataFrame(list(_rows()))
    results = ["aa_acc", "aa_acc_low", "aa_acc_high", "clean_acc", "val_acc", "n_eval", "eval_seconds"]
    table[results] = table[results].astype(float)
    table.loc[7, "status"] = "failed"
    table.loc[7, results] = math.nan
    table.loc[9, ["train_energy_kwh", "cost_usd", "co2_kg"]] = math.nan
    table.loc[9, ["train_energy_how", "cost_usd_how", "co2_kg_how"]] = None
    return table


@pytest.fixture
def demo_table() -> pd.DataFrame:
    return made_up()


@pytest.fixture(scope="session")
def demo_analysis() -> Analysis:
    return analyse(made_up(), resamples=200)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The page of the demo study, with its figures beside it; drawn once for all processes of a call, to be read."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "report"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = folder / "report.html"
        if page.exists():
            return page
        return report.write(
            made_up(),
            request.getfixturevalue("demo_analysis"),
            folder,
            title="Digits & <robustness>",
            subtitle="What does compute buy?",
            notes=("A note.",),
        )
