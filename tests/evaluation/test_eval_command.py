"""`robudget eval` as it is typed: what it prints, keeps, resumes, merges and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Run = Callable[..., tuple[int, str, str]]
NETWORK = """
import time
from pathlib import Path

import torch
from torch import nn

def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def nan():
    network = load()
    return lambda x: network(x) * float("nan")

def pair():
    network = load()
    return lambda x: (network(x), x)

def five():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = load()

    def forward(self, x):
        return self.body((x * 7).round() / 7)

def rounded():
    return Rounded().eval()

def smooth(model):
    return model.body

def slow():
    network, started = load(), Path("started")

    def answer(x):
        started.touch()
        for _ in range(1200):
            if Path("go").exists():
                break
            time.sleep(0.05)
        return network(x)

    return answer

def plain():
    network = load()
    return lambda x: network(x)
"""
QUICK = ["--data", "digits", "--eps", "0.2", "--attack", "apgd-ce:steps=5", "--attack", "square:steps=20"]


@pytest.fixture
def robudget_eval(robudget_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`robudget eval` in a folder that holds a user's network.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)
    return lambda *args: robudget_command("eval", *args)


def test_shards_are_merged_and_examples_are_shown_to_another_model(robudget_eval: Run) -> None:
    _, whole, _ = robudget_eval("network.py:load", *QUICK, "--samples", "30", "--json")
    folders = []
    for n in (1, 2):
        code, out, _ = robudget_eval(
            "network.py:load", *QUICK, "--samples", "30", "--shard", f"{n}/2", "--examples", "--json"
        )
        assert code == 0
        folders.append(json.loads(out)["folder"])
    code, out, _ = robudget_eval("--merge", *folders, "--json")
    assert code == 0
    merged, one = json.loads(out), json.loads(whole)
    assert merged["robust_accuracy"] == one["robust_accuracy"]
    assert merged["n"] == one["n"] == 30
    assert merged["flops"] == sum(item["flops"] for item in merged["spent"])
    code, out, _ = robudget_eval("network.py:load", "--data", "digits", "--transfer", merged["folder"], "--json")
    shown = json.loads(out)
    assert shown["n"] == shown["fooled"] > 0
    assert shown["transfer"] == 1
    code, out, _ = robudget_eval("network.py:load", "--data", "digits", "--transfer", merged["folder"])
    assert code == 0
    assert "fool this model too: 100.0%" in " ".join(out.split())


def test_gradients_through_a_surrogate_as_typed_with_their_bill(robudget_eval: Run) -> None:
    asked = ["network.py:rounded", "--data", "digits", "--eps", "0.2", "--attack", "apgd-ce:steps=5", "--samples", "30"]
    _, out, _ = robudget_eval(*asked, "--json", "--out", "without")
    without = json.loads(out)
    code, out, err = robudget_eval(*asked, "--json", "--out", "with", "--backward", "network.py:smooth")
    assert code == 0, err
    found = json.loads(out)
    assert found["robust_accuracy"] < without["robust_accuracy"]
    assert "zero-gradients" in [finding["name"] for finding in without["findings"]]
    # Both are one linear layer of 64 × 10, 2 FLOPs per multiply-add.
    passes = [sum(v for k, v in item.items() if k.endswith(("forward", "backward"))) for item in found["spent"]]
    assert [item["flops"] for item in found["spent"]] == [1280 * n for n in passes]
    bill = json.loads(Path("with/bill.json").read_text())
    assert bill["flops_exact"] == found["flops"] == 1280 * sum(passes)
    assert bill["flops_by_phase"]["apgd-ce_backward"] == 0
    assert bill["flops_by_phase"]["apgd-ce_surrogate_backward"] == 1280 * found["spent"][2]["surrogate_backward"] > 0
    # A plain function's passes have no known FLOPs, and a sum with them has none either.
    code, out, _ = robudget_eval(*asked, "--out", "function", "--backward", "network.py:plain")
    assert code == 0
    assert "FLOP unknown" in out
    assert "Gradients of the surrogate function" in out
    assert json.loads(Path("function/bill.json").read_text())["flops_how"] == "unknown"
    code, _, err = robudget_eval(*asked, "--out", "with", "--backward", "none")
    assert code == 2
    assert "the surrogate (its weights) differs" in err


def test_a_second_process_is_kept_out_of_the_folder_of_the_first(robudget_eval: Run) -> None:
    asked = ["network.py:slow", *QUICK, "--samples", "8", "--threads", "1", "--out", "mine"]
    with Path("first.txt").open("w") as said:
        command = [sys.executable, "-m", "robudget", "eval", *asked]
        first = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            while not Path("started").exists():
                assert first.poll() is None, Path("first.txt").read_text()
                time.sleep(0.05)
            code, out, err = robudget_eval(*asked)
            assert first.poll() is None
        finally:
            first.kill()
            first.wait()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "'mine" in err
    assert "being worked on by" in err
    # The first is dead, and its claim with it: the same command goes on.
    Path("go").touch()
    code, out, err = robudget_eval(*asked, "--json")
    assert code == 0, err
    assert json.loads(out)["n"] == 8


def test_verdicts_of_others_are_compared_as_typed(robudget_eval: Run) -> None:
    asked = ["network.py:load", *QUICK, "--samples", "30", "--json"]
    mine = json.loads(robudget_eval(*asked, "--out", "mine")[1])
    robudget_eval(*asked, "--seed", "1", "--out", "theirs")
    code, out, err = robudget_eval("mine", "--compare", "theirs", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["n"] == 30
    assert found["robust_accuracy"] == mine["robust_accuracy"]
    assert found["agree"] + found["robust_by_us_alone"] + found["robust_by_them_alone"] == 30
    Path("flags.csv").write_text("robust\n" + "1\n" * 30)
    code, out, _ = robudget_eval("mine", "--compare", "flags.csv")
    assert code == 0
    assert "30 are robust" not in out
    assert "ours / theirs" in out
    Path("flags.csv").write_text("robust\n" + "1\n" * 29)
    code, out, err = robudget_eval("mine", "--compare", "flags.csv")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "has verdicts of 29 images, and ours are of 30" in err
    code, _, err = robudget_eval("network.py:load", "--compare", "flags.csv")
    assert code == 2
    assert "cannot read an evaluation" in err


def test_the_page_is_printed_as_it_is_kept(robudget_eval: Run) -> None:
    """A finding's name stands in brackets, which a terminal's markup would swallow."""
    code, out, _ = robudget_eval("network.py:nan", *QUICK, "--samples", "10")
    assert code == 0
    assert "[not-finite]" in out
    assert "Robust accuracy 0.00% [0.00, " in out
    (folder,) = Path("evals").iterdir()
    assert (folder / "verdict.txt").read_text() in out
    assert out.rstrip().endswith(str(folder))


def test_eps_zero_is_the_clean_accuracy(robudget_eval: Run) -> None:
    code, out, _ = robudget_eval("network.py:load", "--data", "digits", "--eps", "0", "--samples", "30", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["robust_accuracy"] == found["clean_accuracy"]


def test_a_dataset_with_a_customary_threat_needs_none(
    robudget_eval: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUDGET_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 1), ("test", 2)):
        for label in range(10):
            folder = tmp_path / "cifar10" / split / str(label)
            folder.mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (32, 32), (20 * label, 10 * n, 0)).save(folder / f"{n}.png")
    (tmp_path / "network.py").write_text(NETWORK.replace("nn.Linear(64, 10)", "nn.Linear(3072, 10)"))
    asked = ["network.py:load", "--data", "cifar10", "--data-root", "cifar10", "--samples", "5"]
    code, out, err = robudget_eval(*asked, "--attack", "apgd-ce:steps=3")
    assert code == 0, err
    assert "against linf 8/255 (customary for cifar10), on 5 images" in out
    _, out, _ = robudget_eval(*asked, "--attack", "apgd-ce:steps=3", "--eps", "4/255")
    assert "against linf 4/255, on 5 images" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["network.py:pair", *QUICK], "returns a tuple"),
        (["network.py:five", *QUICK], "5 classes apart, and the data have 10"),
        (["network.py:load", "--data", "digits", "--eps", "-1"], "negative"),
        (["network.py:load", "--data", "digits", "--eps", "8"], "did you mean 8/255"),
        (["network.py:load", "--data", "digits", "--norm", "l2"], "needs its radius"),
        (["network.py:load", "--data", "digits", "--norm", "l3", "--eps", "1"], "did you mean 'l2'"),
        (["network.py:load", "--data", "digits"], "needs its threat"),
        (["network.py:load", "--eps", "0.1"], "--data"),
        (["network.py:load", "--data", "digit", "--eps", "0.1"], "did you mean 'digits'"),
        (["network.py:load", *QUICK, "--samples", "99999"], "99999 images asked for"),
        (["network.py:load", *QUICK, "--shard", "3/2"], "shard = 3/2"),
        (["network.py:load", *QUICK, "--version", "plus"], "one of the two"),
        (["network.py:load", "--data", "digits", "--eps", "0.1", "--version", "standrad"], "did you mean 'standard'"),
        (["network.py:load", *QUICK, "--attack", "pgd:step=3"], "did you mean 'steps'"),
        (["network.py:load", *QUICK, "--precision", "float16"], "unknown precision"),
        (["network.py:load", *QUICK, "--device", "cuda:77"], "CUDA GPUs"),
        (["network.py:load", "network.py:nan", *QUICK], "2 models"),
        (["network.py:load", "--data", "digits", "--transfer", "nothing.npz"], "cannot read adversarial examples"),
        (["--merge", "nowhere"], "cannot read an evaluation"),
        (["network.py:lod", *QUICK], "did you mean 'load'"),
        (["network.py:load", *QUICK, "--backward", "network.py:smoth"], "did you mean 'smooth'"),
        (["network.py:load", *QUICK, "--backward", "nowhere.py:smooth"], "no such file"),
        (["network.py:load", *QUICK, "--backward", "network.py:five"], "the surrogate returns torch.float32 (2, 5)"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(robudget_eval: Run, args: list[str], said: str) -> None:
    code, out, err = robudget_eval(*args)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(Path().rglob("evals/*"))


def test_ctrl_c_says_how_to_go_on(robudget_eval: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from robudget.cli.view.console import EvaluationDisplay

    def interrupt(self: object, now: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(EvaluationDisplay, "update", interrupt)
        code, _, err = robudget_eval("network.py:load", *QUICK, "--samples", "30")
    assert code == 130
    assert "the same command goes on" in err
    (folder,) = Path("evals").iterdir()
    assert not (folder / "result.json").exists()
    code, out, _ = robudget_eval("network.py:load", *QUICK, "--samples", "30", "--json")
    assert code == 0
    assert json.loads(out)["n"] == 30
    code, _, err = robudget_eval("network.py:load", *QUICK, "--samples", "30", "--batch-size", "7")
    assert code == 2
    assert "batch_size differs (500 there, 7 now)" in err
    assert robudget_eval("network.py:load", *QUICK, "--samples", "30", "--batch-size", "7", "--restart")[0] == 0
