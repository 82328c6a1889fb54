"""Tables for the laws: the paper's runs, and made-up ones of which the truth is known."""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from robudget.laws import Predictor, read_table

SIZES = {"wrn-10-1": 2e4, "wrn-16-2": 2e5, "wrn-16-4": 7e5}
EFFECT = {"synthetic": 4.0, "loss": 2.0, "ema": 1.0}  # points that each choice is worth in `grid_table`


@pytest.fixture(scope="session")
def paper(shared: Path) -> pd.DataFrame:
    """The paper's 319 runs as our table."""
    return read_table(shared / "data" / "paper_runs.csv")


@pytest.fixture(scope="session")
def paper_predictor(paper: pd.DataFrame) -> Predictor:
    return Predictor.fit(paper)


@pytest.fixture(scope="session")
def bench() -> ModuleType:
    """bench/laws.py, which knows how to make tables of known truth."""
    path = Path(__file__).resolve().parents[2] / "bench" / "laws.py"
    spec = importlib.util.spec_from_file_location("bench_laws", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grid_table(noise: float = 0.2, seed: int = 0) -> pd.DataFrame:
    """A full factorial study with additive effects: 3 sizes × 2 losses × 3 step counts × synthetic × EMA = 72 runs.

    One attack step collapses the two larger models. FLOPs are exact; energy is in proportion, with scatter.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for (model, size), loss, steps, synthetic, ema in product(
        SIZES.items(), ["at", "trades"], [1, 2, 5], [False, True], [False, True]
    ):
        images = 50_000 * 20.0
        flops = 100 * size * images * (2 * steps + (7 if loss == "trades" else 3))
        collapsed = steps == 1 and model != "wrn-10-1"
        accuracy = 30 + 2 * np.log10(size) + 3 * np.log2(steps) + EFFECT["synthetic"] * synthetic
        accuracy += EFFECT["loss"] * (loss == "trades") + EFFECT["ema"] * ema + rng.normal(0, noise)
        rows.append({
            "run_id": f"run-{len(rows):03d}", "status": "done", "dataset": "digits", "norm": "linf", "eps": 0.1,
            "model": model, "base": 16, "activation": "relu", "variant": "original", "parameters": size,
            "loss": loss, "beta": 6.0 if loss == "trades" else np.nan, "steps": steps, "epochs": 20,
            "epoch_images": 50_000, "ema": ema, "ema_decay": 0.99 if ema else np.nan, "synthetic": synthetic,
            "synthetic_fraction": 0.7 * synthetic, "aa_acc": abs(rng.normal(0, 1)) if collapsed else accuracy,
            "clean_acc": 90.0, "collapsed": collapsed, "images_seen": images, "train_flops_exact": flops,
            "train_energy_kwh": flops * 1e-13 * np.exp(rng.normal(0, 0.1)),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["cost_usd"] = frame.train_energy_kwh * 0.19
    return frame


@pytest.fixture
def grid() -> pd.DataFrame:
    return grid_table()


@pytest.fixture(scope="session")
def grid_predictor() -> Predictor:
    return Predictor.fit(grid_table())


def simple(x: np.ndarray, y: np.ndarray, **columns: object) -> pd.DataFrame:
    """A table of adversarially trained runs with nothing but compute and accuracy."""
    return pd.DataFrame({"train_flops_exact": x, "aa_acc": y, "clean_acc": 95.0, "loss": "at"} | columns)


@pytest.fixture(name="simple", scope="session")
def simple_fixture() -> object:
    return simple
