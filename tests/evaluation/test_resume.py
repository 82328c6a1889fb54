"""Killed, resumed, sharded and merged: the same bits. Resumed as something else: refused, with the reason."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robudget.attacks.ensemble import Member
from robudget.errors import InputError
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.state import FILE, Progress
from robudget.evaluation.verdicts import Verdicts, merge
from robudget.threat import Threat

THREAT = Threat("linf", 0.05)
QUICK = [Member("apgd-ce", steps=20), Member("apgd-t", steps=20, targets=3), Member("fab-t", steps=20, targets=3)]
QUICK.append(Member("square", steps=200))


class Stop(Exception):
    """Ends an evaluation as a power cut would: between two writes of its state."""


def stopper(attack: str, done: int):
    def progress(now: Progress) -> None:
        if now.attack == attack and now.images_done >= done:
            raise Stop

    return progress


def same(a: Verdicts, b: Verdicts) -> bool:
    return a.frame.equals(b.frame)


def run(small, images, **changes) -> Verdicts:
    given = {"attacks": QUICK, "batch_size": 16, "checks": False} | changes
    return evaluate(small, *images, given.pop("threat", THREAT), **given)


@pytest.fixture(scope="module")
def whole(small, images) -> Verdicts:
    return run(small, images, examples=True)


@pytest.mark.parametrize(("attack", "done"), [("apgd-ce", 1), ("apgd-t", 5), ("fab-t", 0), ("square", 0)])
def test_a_stopped_evaluation_goes_on_to_the_same_bits(small, images, whole, tmp_path, attack, done):
    with pytest.raises(Stop):
        run(small, images, examples=True, state=tmp_path, progress=stopper(attack, done))
    saved = (tmp_path / FILE).stat().st_mtime_ns
    again = run(small, images, examples=True, state=tmp_path)
    assert (tmp_path / FILE).stat().st_mtime_ns > saved
    assert same(again, whole)
    assert np.array_equal(again.examples.x_adv, whole.examples.x_adv)
    assert [i.attack for i in again.spent] == [i.attack for i in whole.spent]
    assert [(i.images, i.broken) for i in again.spent] == [(i.images, i.broken) for i in whole.spent]


def test_stages_that_were_done_are_not_done_again(small, images, tmp_path):
    run(small, images, state=tmp_path)
    seen: list[Progress] = []
    again = run(small, images, state=tmp_path, progress=seen.append)
    assert seen == []
    assert same(again, run(small, images, state=tmp_path))


def test_checks_are_made_once_where_the_first_attack_is_killed(small, images, tmp_path):
    def killed(name):
        if name == "evaluation/apgd-ce":
            raise Stop
        return nullcontext()

    with pytest.raises(Stop):
        run(small, images, checks=True, state=tmp_path, window=killed)
    again, alone = run(small, images, checks=True, state=tmp_path), run(small, images, checks=True)
    assert again.calls == alone.calls
    assert again.findings == alone.findings


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{here!r}, str(Path({here!r}).parent)]
import test_resume as t
from conftest import Small, blobs, train
torch.manual_seed(3)
small = train(Small(6), 6)
def progress(now):
    if now.attack == "fab-t":
        os.kill(os.getpid(), signal.SIGKILL)
t.run(small, blobs(60, 6, 7), state={state!r}, progress=progress)
"""


def test_kill_9_and_resume_give_the_same_bits(small, images, whole, tmp_path):
    script = SCRIPT.format(here=str(Path(__file__).parent), state=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with np.load(tmp_path / FILE) as data:
        spent = json.loads(str(data["about"]))["spent"]
    assert spent["apgd-t"]["done"]
    assert not spent.get("fab-t", {}).get("done", False)
    assert same(run(small, images, state=tmp_path), whole)


def test_two_shards_merge_to_the_same_bits(small, images, whole):
    x, y = images
    cut = 23
    shards = [
        run(small, (x[part], y[part]), index=torch.arange(len(x))[part], examples=True)
        for part in (slice(0, cut), slice(cut, None))
    ]
    merged = merge(shards[::-1])
    assert same(merged, whole)
    assert merged.robust_accuracy == whole.robust_accuracy
    assert merged.interval == whole.interval
    assert merged.examples.index.tolist() == whole.examples.index.tolist()
    assert np.array_equal(merged.examples.x_adv, whole.examples.x_adv)
    broken = {item.attack: item.broken for item in merged.spent}
    assert broken == {item.attack: item.broken for item in whole.spent}


def test_in_low_precision_too_shards_merge_to_the_same_verdicts(small, images):
    """(Each shard confirms its own nearest survivors in float32, so margins may differ where more were confirmed.)"""
    x, y = images
    low = {"precision": "bfloat16"}
    whole = run(small, images, **low)
    parts = (slice(0, 37), slice(37, None))
    merged = merge([run(small, (x[p], y[p]), index=torch.arange(len(x))[p], **low) for p in parts])
    assert merged.about["precision"] == "bfloat16"
    assert merged.frame["broken_by"].equals(whole.frame["broken_by"])
    assert merged.frame["clean_margin"].equals(whole.frame["clean_margin"])


def test_shards_that_were_killed_merge_to_the_same_bits(small, images, whole, tmp_path):
    x, y = images
    shards = []
    for n, part in enumerate((slice(0, 30), slice(30, None))):
        state, index = tmp_path / str(n), torch.arange(len(x))[part]
        with pytest.raises(Stop):
            run(small, (x[part], y[part]), index=index, state=state, progress=stopper("apgd-t", 1))
        shards.append(run(small, (x[part], y[part]), index=index, state=state))
    assert same(merge(shards), whole)


def test_shards_of_different_evaluations_do_not_merge(small, images):
    x, y = images
    first = run(small, (x[:9], y[:9]), attacks=["pgd"])
    for other in (
        run(small, (x[9:18], y[9:18]), attacks=["pgd"], index=torch.arange(9, 18), seed=1),
        run(small, (x[9:18], y[9:18]), attacks=["pgd"], index=torch.arange(9, 18), threat=Threat("linf", 0.01)),
        first,
    ):
        with pytest.raises(InputError, match="shard"):
            merge([first, other])


def other_weights(small: nn.Module) -> nn.Module:
    from copy import deepcopy

    model = deepcopy(small)
    with torch.no_grad():
        next(model.parameters()).add_(1e-6)
    return model


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"threat": Threat("linf", 0.051)}, "threat differs"),
        ({"attacks": ["apgd-ce"]}, "the version"),
        ({"attacks": None}, "version differs"),
        ({"seed": 1}, "seed differs"),
        ({"batch_size": 17}, "batch_size differs"),
        ({"precision": "bfloat16"}, "precision differs"),
        ({"index": torch.arange(1, 61)}, "which rows"),
        ({"examples": True}, "examples differs"),
    ],
)
def test_a_resume_as_something_else_is_refused(small, images, tmp_path, changes, reason):
    with pytest.raises(Stop):
        run(small, images, state=tmp_path, progress=stopper("apgd-t", 0))
    with pytest.raises(InputError, match=reason) as error:
        run(small, images, state=tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_resume_with_another_model_or_other_data_is_refused(small, images, tmp_path):
    x, y = images
    with pytest.raises(Stop):
        run(small, images, state=tmp_path, progress=stopper("apgd-t", 0))
    with pytest.raises(InputError, match="its weights"):
        run(other_weights(small), images, state=tmp_path)
    with pytest.raises(InputError, match="the data"):
        run(small, ((x * 0.999).contiguous(), y), state=tmp_path)
    with pytest.raises(InputError, match="the data"):
        run(small, (x, y.roll(1)), state=tmp_path)
    torch.set_num_threads(2)
    with pytest.raises(InputError, match="threads differs"):
        run(small, images, state=tmp_path)


def test_a_broken_state_says_so(small, images, tmp_path):
    (tmp_path / FILE).write_bytes(b"half a file")
    with pytest.raises(InputError, match="cannot resume from"):
        run(small, images, state=tmp_path)
