import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robudget import data, judge
from robudget.errors import InputError
from robudget.evaluation import Verdicts
from robudget.evaluation.merge import merge
from robudget.models.build import build
from robudget.site import Site
from robudget.threat import Threat

THREAT, SITE = Threat("linf", 0.02), Site(device="cpu", threads=1)
NETWORK = """
import torch
from torch import nn

def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def broken():
    return 3
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)


def evaluate(source: str = "network.py:load", **options: object) -> judge.Judgement:
    settings = {"dataset": "digits", "threat": THREAT, "images": 40, "batch_size": 20, "site": SITE} | options
    return judge.judge(source, **settings)  # type: ignore[arg-type]


def test_a_users_function_is_judged_and_billed() -> None:
    found = evaluate()
    assert len(found.verdicts) == 40
    assert found.folder.parent == Path("evals")
    # a linear layer of 64 × 10: 2 FLOPs per multiply-add, counted for every pass that was made
    forward = sum(v for k, v in found.verdicts.calls.items() if k.endswith("_forward"))
    backward = sum(v for k, v in found.verdicts.calls.items() if k.endswith("_backward"))
    assert found.bill["flops_exact"] == 2 * 640 * (forward + backward)
    assert found.bill["energy"]["how"] in ("measured", "estimated")
    assert json.loads((found.folder / "bill.json").read_text())["flops_exact"] == found.bill["flops_exact"]


def test_shards_merge_to_the_bits_of_the_whole() -> None:
    whole = evaluate().verdicts
    parts = [evaluate(shard=(i, 2)).folder for i in (1, 2)]
    merged = judge.merged(parts, None)
    assert list(merged.broken_by) == list(whole.broken_by)
    np.testing.assert_array_equal(merged.frame["worst_margin"], whole.frame["worst_margin"])
    assert merged.robust_accuracy == whole.robust_accuracy
    assert sum(s.images for s in merged.spent) == sum(s.images for s in whole.spent)
    assert Verdicts.load("evals/" + parts[0].name.replace("-1of2", "-merged")).n == 40


def test_shards_that_do_not_belong_together_are_refused() -> None:
    first, other = evaluate(shard=(1, 2)).verdicts, evaluate(shard=(2, 2), seed=1).verdicts
    with pytest.raises(InputError, match="seed = 0 and 1"):
        merge([first, other])
    with pytest.raises(InputError, match="more than one shard"):
        merge([first, first])
    for text in ("2", "a/b", "1:2"):
        with pytest.raises(InputError, match="shard"):
            judge.parse_shard(text)
    for shard in ((0, 2), (3, 2), (1, 41)):
        with pytest.raises(InputError, match="shard"):
            evaluate(shard=shard)


def test_a_file_of_weights_needs_its_architecture_and_has_to_fit() -> None:
    digits = data.load("digits")
    torch.manual_seed(0)
    network = build("wrn-10-1", classes=10, image_size=8, channels=1, base=16, mean=digits.mean, std=digits.std)
    save_file(network.state_dict(), "weights.safetensors")
    found = evaluate("weights.safetensors", model="wrn-10-1", images=8, batch_size=8)
    assert len(found.verdicts) == 8
    with pytest.raises(InputError, match="--model"):
        evaluate("weights.safetensors")
    with pytest.raises(InputError, match="does not fit wrn-16-1"):
        evaluate("weights.safetensors", model="wrn-16-1")
    Path("weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a safetensors file"):
        evaluate("weights.safetensors", model="wrn-10-1")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("network.py:lod", "did you mean 'load'"),
        ("network.py:broken", "returned int"),
        ("nothing.py:load", "no such file"),
        ("no.such.module:load", "cannot import"),
        ("robustbench:cifar10", "robustbench:DATASET/THREAT/NAME"),
        ("not_a_model", "cannot evaluate 'not_a_model'"),
        ("missing.safetensors", "--model"),
    ],
)
def test_a_source_that_is_no_classifier_is_one_line(source: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        evaluate(source)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
