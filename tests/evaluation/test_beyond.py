"""Several threats and the robustness curve: closed forms, the authors' minimum-norm attack, resume, shards, verbs."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.build import attack
from robudget.attacks.geometry import GEOMETRY
from robudget.errors import InputError
from robudget.evaluation.curve import Curve, curve
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.measurement import Setting, everything
from robudget.evaluation.union import Union, evaluate_threats
from robudget.evaluation.verdicts import Verdicts
from robudget.tables.read import load_runs
from robudget.threat import NORMS, Norm, Threat, parse_threats

Run = Callable[..., tuple[int, str, str]]
THREATS = [Threat("linf", 0.03), Threat("l2", 0.21), Threat("l1", 1.1)]
SHORT = ["apgd-ce:steps=8", "square:steps=20"]
NETWORK = """
import torch
from torch import nn

def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture(scope="module")
def linear() -> nn.Module:
    """Five classes of 1×8×8 images, far from the walls of [0, 1]."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


@pytest.fixture(scope="module")
def middle(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """60 images near 0.5; the first 6 with a wrong label."""
    torch.manual_seed(2)
    x = 0.5 + 0.05 * torch.randn(60, 1, 8, 8).clamp(-3, 3)
    y = linear(x).argmax(1)
    y[:6] = (y[:6] + 1) % 5
    return x, y


def nearest(model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """(N,) the distance to the nearest boundary of a linear model: gap / ‖w_t − w_y‖_dual; the walls play no part."""
    weight, z = model[1].weight.detach(), model(x).detach()
    gap = z.gather(1, y[:, None]) - z
    normal = (weight[None] - weight[y][:, None]).flatten(0, 1)
    distance = (gap / GEOMETRY[norm].dual(normal).view_as(gap)).scatter(1, y[:, None], math.inf)
    return distance.amin(1).clamp(min=0)


# -- the curve ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_the_curve_of_a_linear_model_is_the_closed_form(
    linear: nn.Module, middle: tuple[Tensor, Tensor], norm: Norm
) -> None:
    x, y = middle
    exact = nearest(linear, x, y, norm).numpy()
    found = curve(linear, x, y, norm, limit=float(exact.max()))
    assert (found.distance[:6] == 0).all()
    ratio = found.distance[6:] / exact[6:]
    assert ratio.min() > 0.999
    slack = 1.05 if norm == "l1" else 1.02  # in L1 the nearest point is a single pixel away
    assert ratio.max() < slack
    # An upper bound everywhere, and the same within the attacks' slack.
    for eps in np.linspace(0, float(exact.max()), 17):
        assert (exact > slack * eps).mean() <= found.accuracy(eps) <= (slack * exact > eps).mean()
        assert found.accuracy(eps) >= (exact > eps).mean()
        low, high = found.interval(eps)
        assert low <= found.accuracy(eps) <= high
    accuracies = [point["accuracy"] for point in found.points()]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == found.accuracy(0) == pytest.approx(54 / 60)


@pytest.mark.parametrize("norm", NORMS)
def test_fmn_finds_what_the_library_finds_per_image(
    small: nn.Module, images: tuple[Tensor, Tensor], norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """adversarial-library's FMN with the same steps: 95% of the images within 5%, the median within half a percent."""
    monkeypatch.setitem(sys.modules, "visdom", ModuleType("visdom"))  # for a logger that the attacks do not use
    fmn = pytest.importorskip("adv_lib.attacks.fast_minimum_norm").fmn
    x, y = images
    right = small(x).argmax(1) == y
    x, y = x[right], y[right]
    mine = attack(small, x, y, everything(norm, x.shape[1:]), "fmn:steps=200")
    theirs = fmn(small, x, y, {"linf": math.inf, "l2": 2, "l1": 1}[norm], steps=200)
    size = GEOMETRY[norm].size
    ratio = size((mine - x).double()) / size((theirs - x).double())
    assert bool((small(mine).argmax(1) != y).all())
    assert float(ratio.quantile(0.05)) > 0.95
    assert float(ratio.quantile(0.95)) < 1.05
    assert float((ratio.median() - 1).abs()) < 0.005


def test_the_curve_is_no_lower_than_what_its_attacks_showed(small: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    """An ensemble at one ε breaks at least nearly as many; every distance is that of a verified example."""
    x, y = images[0][:30], images[1][:30]
    found = curve(small, x, y, "linf", limit=0.1)
    apgd = evaluate(small, x, y, Threat("linf", 0.03), attacks=["apgd-t:steps=100"], checks=False)
    assert found.accuracy(0.03) >= apgd.robust_accuracy - 1e-9
    assert set(found.frame["found_by"]) <= {"clean", "fmn", "fab-t", ""}
    assert found.calls["fmn_backward"] == 100 * int((found.frame["clean_margin"] > 0).sum())


def test_a_curve_is_resumed_divided_and_put_together(
    small: nn.Module, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = images[0][:24], images[1][:24]
    whole = curve(small, x, y, "l2", limit=1.0, setting=Setting(state=tmp_path / "state"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "state").glob("fmn-*.npz")}
    next((tmp_path / "state").glob("fab-t-*.npz")).unlink()  # as a kill leaves it
    again = curve(small, x, y, "l2", limit=2.0, setting=Setting(state=tmp_path / "state"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert np.array_equal(again.distance, whole.distance)
    with pytest.raises(InputError, match="cannot resume"):
        curve(small, x, y, "linf", limit=1.0, setting=Setting(state=tmp_path / "state"))
    from robudget.evaluation.curve import merge_curves

    parts = [
        curve(small, x[part], y[part], "l2", limit=1.0, index=torch.arange(24)[part])
        for part in (slice(0, 10), slice(10, 24))
    ]
    parts = [Curve.load(part.save(tmp_path / str(n))) for n, part in enumerate(parts)]
    assert np.allclose(merge_curves(parts).distance, whole.distance, rtol=1e-4)
    with pytest.raises(InputError, match="more than one shard"):
        merge_curves([parts[0], parts[0]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attacks": ["pgd"]}, "unknown minimum-norm attack 'pgd'"),
        ({"attacks": []}, "at least one"),
        ({"limit": 0.0}, "more than 0"),
        ({"norm": "l3"}, "unknown norm"),
    ],
)
def test_a_curve_that_cannot_be(
    small: nn.Module, images: tuple[Tensor, Tensor], changes: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        curve(small, *images, **({"norm": "linf", "limit": 0.1} | changes))  # type: ignore[arg-type]


# -- several threats ---------------------------------------------------------------------------------------------------


def test_the_union_is_image_by_image_and_each_part_is_as_alone(
    small: nn.Module, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = images
    union = evaluate_threats(small, x, y, THREATS, attacks=SHORT, checks=False, state=tmp_path / "state")
    alone = [evaluate(small, x, y, threat, attacks=SHORT, checks=False) for threat in THREATS]
    for part, single in zip(union.parts, alone, strict=True):
        assert (part.broken_by == single.broken_by).all()
        assert np.array_equal(part.frame["worst_margin"], single.frame["worst_margin"])
        assert np.array_equal(part.frame["clean_margin"], single.frame["clean_margin"])
    assert np.array_equal(union.robust, np.all([single.robust for single in alone], axis=0))
    assert union.robust_accuracy < min(single.robust_accuracy for single in alone) + 1e-9
    # The clean pass of the second and third is that of the first.
    assert [part.calls["clean_forward"] > 0 for part in union.parts] == [True, False, False]
    assert union.total.forward == sum(item.forward for part in union.parts for item in part.spent)
    loaded = Union.load(union.save(tmp_path / "out"))
    assert loaded.summary() == union.summary()
    assert (loaded.to_frame() == union.to_frame()).all().all()
    assert set(union.to_frame()) == {"index", "label", "linf-0.03", "l2-0.21", "l1-1.1", "robust"}


def test_a_clean_pass_of_other_images_is_made_again(small: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    other = evaluate(small, x[:30], y[:30], THREATS[0], attacks=SHORT, checks=False)
    found = evaluate(small, x[30:], y[30:], THREATS[1], attacks=SHORT, checks=False, known=other)
    assert found.calls["clean_forward"] > 0
    assert (found.clean == (small(x[30:]).argmax(1) == y[30:]).numpy()).all()


def test_threats_as_they_are_written() -> None:
    assert parse_threats(["all"], "cifar10") == [Threat("linf", 8 / 255), Threat("l2", 0.5), Threat("l1", 12)]
    assert parse_threats(["linf:8/255", "l2:0.5"], "digits") == [Threat("linf", 8 / 255), Threat("l2", 0.5)]
    for texts, dataset, words in [
        (["all"], "digits", "'all' with digits"),
        (["linf"], "digits", "a norm and its radius"),
        (["l3:1"], "digits", "did you mean"),
        (["linf:8/255", "all"], "cifar10", "twice"),
    ]:
        with pytest.raises(InputError, match=words):
            parse_threats(texts, dataset)


# -- as typed ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(robudget_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`robudget` in a folder that holds a user's network.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)
    return robudget_command


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A copy of a finished run's folder, in a store."""
    golden = min((Path(__file__).parents[1] / "golden" / "0.1.0" / "sweep").iterdir())
    return Path(shutil.copytree(golden, tmp_path / "store" / golden.name))


MODEL = ["network.py:load", "--data", "digits"]


def test_threats_as_typed(command: Run) -> None:
    asked = ["eval", *MODEL, "--threat", "linf:0.01", "--threat", "l2:0.05", "--attack", "apgd-ce:steps=5"]
    code, out, _ = command(*asked, "--samples", "60")
    assert code == 0
    folder = Path(out.rstrip().splitlines()[-1])
    assert sorted(path.name for path in folder.iterdir()) == [
        "l2-0.05", "linf-0.01", "union.json", "union.parquet", "verdict.txt",
    ]  # fmt: skip
    assert "against all of linf 0.01, l2 0.05, image by image, on 60 images" in out
    whole = json.loads((folder / "union.json").read_text())
    assert whole["flops"] > 0
    assert whole["energy_kwh"] > 0
    parts = [json.loads(command(*asked, "--samples", "60", "--shard", f"{n}/2", "--json")[1]) for n in (1, 2)]
    code, out, _ = command("eval", "--merge", *(part["folder"] for part in parts), "--json")
    merged = json.loads(out)
    assert code == 0
    assert merged["union_accuracy"] == whole["union_accuracy"]
    assert merged["n"] == 60
    assert merged["forward"] == sum(part["forward"] for part in parts)


def test_a_curve_as_typed(command: Run) -> None:
    code, out, err = command("curve", *MODEL, "--eps", "0.02", "--norm", "linf", "--samples", "20")
    assert code == 0, err
    folder = Path(out.rstrip().splitlines()[-1])
    assert {"curve.json", "curve.parquet", "curve.png", "verdict.txt"} <= {path.name for path in folder.iterdir()}
    assert "An upper bound of robust accuracy" in out
    kept = json.loads((folder / "curve.json").read_text())
    assert len(kept["curve"]) == 101
    assert kept["curve"][-1]["eps"] == 0.02
    assert kept["flops"] > 0
    parts = [
        json.loads(command("curve", *MODEL, "--eps", "0.02", "--samples", "20", "--shard", f"{n}/2", "--json")[1])[
            "folder"
        ]
        for n in (1, 2)
    ]
    code, out, _ = command("eval", "--merge", *parts, "--json")
    assert code == 0
    assert json.loads(out)["curve"] == kept["curve"]


def test_a_curve_says_where_autoattack_of_the_same_images_is(command: Run, finished: Path) -> None:
    """Its evaluation's verdicts lie beside the curve: of 12 images; of 6 there are none."""
    theirs = Verdicts.load(next(finished.glob("evals/*/result.json")).parent)
    short = ["--attack", "fmn:steps=10", "--json"]
    code, out, err = command("curve", str(finished), "--samples", "12", *short)
    assert code == 0, err
    found = Curve.load(json.loads(out)["folder"])
    mine, at = found.robust(theirs.threat.eps), json.loads(out)["at"]
    assert at == {
        "eps": theirs.threat.eps,
        "accuracy": mine.mean(),
        "autoattack": theirs.robust_accuracy,
        "version": "standard",
        "only_autoattack": int((mine & ~theirs.robust).sum()),
        "only_curve": int((~mine & theirs.robust).sum()),
    }
    assert "AutoAttack (standard)" in found.page()
    _, out, _ = command("curve", str(finished), "--samples", "6", *short)
    assert json.loads(out)["at"]["autoattack"] is None


def test_what_evaluations_of_a_run_say_becomes_columns(command: Run, finished: Path, tmp_path: Path) -> None:
    run = finished
    before = load_runs(tmp_path / "store").iloc[0]
    assert math.isnan(before["union_acc"])
    short = ["--attack", "apgd-ce:steps=2", "--samples", "20", "--json"]
    code, out, err = command("eval", str(run), "--threat", "linf:0.05", "--threat", "l2:0.3", *short)
    assert code == 0, err
    union = json.loads(out)["union_accuracy"]
    code, out, err = command("unseen", str(run), "--attack", "jpeg:steps=2,eps=1", "--samples", "20", "--json")
    assert code == 0, err
    # A shard is no result of the run.
    command("unseen", str(run), "--attack", "gabor:steps=0", "--samples", "20", "--shard", "1/2", "--json")
    row = load_runs(tmp_path / "store").iloc[0]
    assert row["union_acc"] == pytest.approx(100 * union)
    assert row["union_acc_how"] == "linf 0.05, l2 0.3; 20 images"
    assert row["unseen_acc"] == pytest.approx(100 * json.loads(out)["unseen_accuracy"])
    assert row["unseen_acc_how"] == "jpeg 1; 20 images"
    assert math.isnan(row["corruption_acc"])
    assert row["aa_acc"] == before["aa_acc"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["corruptions", *MODEL], "of 8×8 pixels|is not installed"),
        (["corruptions", *MODEL, "fogg"], "did you mean 'fog'"),
        (["corruptions", *MODEL, "--corruption-root", "nowhere"], "cannot read"),
        (["unseen", *MODEL, "--attack", "gabbor"], "did you mean 'gabor'"),
        (["unseen", *MODEL, "--precision", "float16"], "unknown precision"),
        (["eval", *MODEL, "--threat", "linf:0.1", "--eps", "0.1"], "one of the two ways"),
        (["eval", *MODEL, "--threat", "linf:0.1", "--threat", "l2:1", "--version", "quick"], "which estimates"),
        (["eval", *MODEL, "--threat", "all"], "'all' with digits"),
        (["eval", *MODEL, "--threat", "lin:0.1"], "did you mean 'linf'"),
        (["curve", *MODEL], "needs its end"),
        (["curve", *MODEL, "--eps", "0.1", "--attack", "fmm"], "did you mean 'fmn'"),
        (["curve", *MODEL, "--eps", "0.1", "--attack", "apgd-t"], "unknown minimum-norm attack"),
        (["curve", *MODEL, "--eps", "0.1", "--samples", "9999"], "9999 images asked for"),
        (["curve", *MODEL, "--eps", "0.1", "--norm", "l7"], "unknown norm"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(command: Run, args: list[str], said: str) -> None:
    code, out, err = command(*args)
    assert (code, out) == (2, "")
    assert re.search(said, err) if "|" in said else said in err
    assert err.count("\n") == 1
    assert not list(Path().rglob("evals/*"))
