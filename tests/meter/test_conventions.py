"""The paper's convention against the paper's own numbers; F and the exact factors against theirs."""

import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from robudget.errors import InputError
from robudget.meter import conventions as convention
from robudget.recipe import LOSSES

PAPER_RUNS = Path(__file__).resolve().parents[2] / "../shared/data/paper_runs.csv"
GFLOPS = {"wrn-28-10": 10.49, "wrn-34-10": 13.32, "wrn-34-20": 53.16, "wrn-70-16": 77.53}
PARAMETERS = {"wrn-28-10": 36_479_194, "wrn-34-10": 46_160_474, "wrn-34-20": 184_531_674, "wrn-70-16": 266_796_506}


@pytest.mark.parametrize("name", GFLOPS)
def test_the_papers_models(name: str) -> None:
    depth, width = convention.PAPER_MODELS[name]
    assert convention.wrn_forward_flops(depth, width) / 1e9 == pytest.approx(GFLOPS[name], rel=0.005)
    assert convention.wrn_parameters(depth, width) == PARAMETERS[name]


@pytest.mark.skipif(not PAPER_RUNS.exists(), reason=f"{PAPER_RUNS} is not here")
def test_every_published_run_within_two_percent() -> None:
    with PAPER_RUNS.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 319
    for row in rows:
        found = re.match(r"wide_resnet(\d+)_(\d+)", row["model"])
        assert found
        forward = convention.wrn_forward_flops(int(found[1]), int(found[2]))
        loss = {"pgd": "at", "trades": "trades"}[row["at"]]
        ours = convention.paper_published_tflops(loss, int(row["at_steps"]), forward)
        assert ours == pytest.approx(float(row["train_flops"]), rel=0.02), row


def test_trades_over_pgd() -> None:
    def ratio(steps: int) -> float:
        return convention.paper_factor("trades", steps).value / convention.paper_factor("at", steps).value

    assert ratio(1) == pytest.approx(1.33, abs=0.005)
    assert ratio(10) == pytest.approx(1.08, abs=0.005)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 10])
def test_exact_factors(steps: int) -> None:
    assert convention.exact_factor("at", steps) == 2 * steps + 3
    assert convention.exact_factor("trades", steps) == 2 * steps + 7
    assert convention.exact_factor("standard", steps) == 3
    assert convention.exact_factor("grad-norm", steps) == 6  # of PGD-3's 9: the 60% of arXiv 2409.20139
    assert convention.exact_factor("at", steps, aligned=True) == 2 * steps + 15


def test_the_paper_convention_says_something_of_every_loss() -> None:
    for loss in LOSSES:
        factor = convention.paper_factor(loss, 2)
        assert factor.reason
        assert math.isnan(factor.value) == (loss in ("free-at", "grad-norm"))
    assert convention.paper_factor("standard", 7).value == 3


def test_bad_input() -> None:
    with pytest.raises(InputError, match="did you mean 'trades'"):
        convention.passes_per_image("trade", 1)
    with pytest.raises(InputError, match="at least 1"):
        convention.passes_per_image("at", 0)
    with pytest.raises(InputError, match="6n \\+ 4"):
        convention.wrn_forward_flops(30, 10)


def test_arithmetic_prices_and_devices_need_no_torch() -> None:
    modules = ("conventions", "prices", "devices", "energy", "counters", "replay")
    lines = [f"import robudget.meter.{name}" for name in modules]
    code = "; ".join([*lines, "import sys; assert 'torch' not in sys.modules"])
    subprocess.run([sys.executable, "-c", code], check=True)
