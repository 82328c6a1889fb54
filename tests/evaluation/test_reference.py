"""A slice of the reference: a WideResNet and the authors' verdicts on its images; in float32 and in low precision."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from robudget.backend.precision import has_bfloat16
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.verdicts import Verdicts
from robudget.threat import Threat

SHARED = Path(__file__).resolve().parents[2] / "../shared"
REFERENCE, IMAGES = SHARED / "reference", SHARED / "data/cifar10-jpeg/test-00000-of-00001.parquet"
THREATS = {"linf": Threat("linf", 8 / 255), "l2": Threat("l2", 0.5)}

pytestmark = pytest.mark.skipif(
    not (REFERENCE.is_dir() and IMAGES.exists()), reason="no ../shared/reference and ../shared/data beside the checkout"
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    spec = importlib.util.spec_from_file_location("reference_wrn", REFERENCE / "wrn.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.WideResNet(16, 2)
    network.load_state_dict(load_file(REFERENCE / "wrn16_2_at.safetensors"))
    return network.eval()


def chosen(norm: str, counts: dict[str, int]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """The first images with these verdicts: x, y, their rows in the split, and the authors' verdicts."""
    theirs = json.loads((REFERENCE / f"verdicts-{norm}.json").read_text())["verdicts"]
    rows = sorted(i for name, n in counts.items() for i in [i for i, v in enumerate(theirs) if v == name][:n])
    assert len(rows) == sum(counts.values())
    table = pd.read_parquet(IMAGES).iloc[rows]
    pictures = [np.asarray(Image.open(io.BytesIO(item["bytes"]))) for item in table["img"]]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255).contiguous()
    return x, torch.tensor(table["label"].to_numpy()), torch.tensor(rows), [theirs[i] for i in rows]


def judged(model: nn.Module, norm: str, precision: str, counts: dict[str, int], *, checks: bool) -> Verdicts:
    """The whole standard ensemble; asserts that it agrees with the authors' image by image."""
    x, y, index, theirs = chosen(norm, counts)
    found = evaluate(
        model,
        x,
        y,
        THREATS[norm],
        index=index,
        batch_size=32,
        precision=precision,  # type: ignore[arg-type]
        checks=checks,
    )
    ours = found.broken_by.tolist()
    for name in ("robust", "clean"):
        assert [v == name for v in ours] == [v == name for v in theirs], found.frame
    # Which of several attacks is first depends on their starts; nearly always it is the same one.
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 2
    return found


def test_float32_agrees_and_the_checks_are_silent(model):
    found = judged(model, "linf", "float32", {"clean": 2, "apgd-ce": 10, "apgd-t": 2}, checks=True)
    assert list(found.findings) == []


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this CPU has no bfloat16 arithmetic")
@pytest.mark.parametrize(
    ("norm", "counts"),
    [
        ("linf", {"clean": 1, "apgd-ce": 6, "apgd-t": 1, "robust": 1}),
        ("l2", {"clean": 2, "apgd-ce": 8, "apgd-t": 1}),
    ],
)
def test_low_precision_agrees(model, norm, counts):
    found = judged(model, norm, "bfloat16", counts, checks=False)
    assert found.about["precision"] == "bfloat16"
    again = [item for item in found.spent if item.attack.endswith("@float32")]
    assert len(again) == 4
    assert sum(item.broken for item in again) == 0
    # The survivor has been through all of both.
    if "robust" in counts:
        assert {item.attack: item.images for item in again} == dict.fromkeys((i.attack for i in again), 1)
        assert next(item for item in again if item.attack == "square@float32").forward >= 5000
