"""Version quick: short attacks, an audit by the full ensemble, an interval that holds, a finding where it must be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robudget.accuracy import hypergeometric_most
from robudget.attacks.ensemble import Member, ensemble
from robudget.datasets import PUBLISHED
from robudget.errors import InputError
from robudget.evaluation import again, specification
from robudget.evaluation.audit import Audit, audit_more, near_more
from robudget.evaluation.confirmation import Part
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.state import Progress
from robudget.evaluation.verdicts import Verdicts, merge, page
from robudget.forecast.passes import evaluation_passes
from robudget.recipe import Recipe
from robudget.threat import Norm, Threat

THREAT = Threat("linf", 0.05)


def quick(model: nn.Module, images: tuple[Tensor, Tensor], threat: Threat = THREAT, **changes) -> Verdicts:
    given = {"version": "quick", "checks": False, "precision": "float32", "batch_size": 64} | changes
    return evaluate(model, *images, threat, **given)


LIGHT = [
    Member("apgd-ce", steps=30),
    Member("apgd-t", steps=30),
    Member("fab-t", steps=20),
    Member("square", steps=300),
]


@pytest.fixture(scope="module", autouse=True)
def light() -> Iterator[None]:
    """A full ensemble of few iterations: what is audited by which attacks does not depend on them."""

    def lighter(version: str, norm: Norm) -> list[Member]:
        return LIGHT if version == "standard" else ensemble(version, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(again, "ensemble", lighter)
        patch.setattr(specification, "ensemble", lighter)
        yield


@pytest.fixture(scope="module")
def standard(small, crowd) -> Verdicts:
    return evaluate(small, *crowd, THREAT, checks=False, precision="float32", batch_size=64)


@pytest.fixture(scope="module")
def short(small, crowd) -> Verdicts:
    return quick(small, crowd)


def passes(verdicts: Verdicts) -> int:
    return verdicts.total.forward + verdicts.total.backward


def test_it_says_what_standard_says_for_less(standard, short):
    assert abs(short.robust_accuracy - standard.robust_accuracy) <= 0.005
    low, high = short.audit_interval
    assert low <= standard.robust_accuracy <= high
    assert short.interval[0] <= low
    assert high <= short.interval[1]
    assert 2 * passes(short) <= passes(standard)  # of few iterations; bench/evaluation.py has the whole
    assert {finding.name for finding in short.findings} == {"few-classes"}


def test_an_audited_image_has_the_verdict_of_standard(standard, short):
    audited = short.frame["audited"].to_numpy()
    assert audited.sum() == short.audit.attacked == max(8, int(0.05 * short.audit.survivors))
    assert (short.robust[audited] == standard.robust[audited]).all()
    # What the short attacks broke, the ensemble is not asked about again.
    assert set(short.broken_by[~audited]) <= {"clean", "apgd-ce", "apgd-t", "robust"}
    again = {item.attack: item.images for item in short.spent if "@" in item.attack}
    assert set(again) == {"apgd-t@near"} | {f"{m.name}@audit" for m in ensemble("standard", "linf")}
    assert again["apgd-ce@audit"] == audited.sum()


def test_the_page_and_the_result_tell_both_intervals(short, tmp_path):
    short.save(tmp_path)
    again = Verdicts.load(tmp_path)
    assert again.audit == short.audit
    assert again.frame.equals(short.frame)
    assert again.robust_accuracy == short.robust_accuracy
    told = json.loads((tmp_path / "result.json").read_text())["audit"]
    assert told["interval"] == list(short.audit_interval)
    assert told["parts"] == [
        {"survivors": short.audit.survivors, "attacked": short.audit.attacked, "fell": 0, "look": 0}
    ]
    text = " ".join(page(short).split())
    assert "an estimate; at least 95%, for the images and the audit" in text
    low, high = short.audit_interval
    assert f"The full ensemble would leave {100 * low:.2f} to {100 * high:.2f}% of these images" in text


def test_the_sample_goes_with_seed_and_row_alone(small, crowd, short):
    x, y = crowd
    rows = torch.arange(100, 200)
    part = quick(small, (x[100:200], y[100:200]), index=rows)
    sampled = set(part.frame.loc[part.frame["audited"], "index"])
    assert len(sampled) == 8
    turned = quick(small, (x[100:200].flip(0), y[100:200].flip(0)), index=rows.flip(0), batch_size=32)
    assert set(turned.frame.loc[turned.frame["audited"], "index"]) == sampled
    other = quick(small, (x[100:200], y[100:200]), index=rows, seed=1)
    assert set(other.frame.loc[other.frame["audited"], "index"]) != sampled


def test_until_goes_on_until_the_interval_is_narrow_enough(small, crowd, short, tmp_path):
    width = np.diff(short.audit_interval)[0]
    first = quick(small, crowd, state=tmp_path)
    further = quick(small, crowd, state=tmp_path, until=4.0)
    assert np.diff(further.audit_interval)[0] <= 0.08 < width
    assert further.audit.attacked > first.audit.attacked
    # It extended what was there: the images audited first are among those audited now, and are attacked once.
    assert (further.frame["audited"] | ~first.frame["audited"]).all()
    assert sum(i.images for i in further.spent if i.attack == "apgd-ce@audit") == further.audit.attacked
    assert quick(small, crowd, state=tmp_path, until=4.0).frame.equals(further.frame)


def test_the_nearest_survivors_are_attacked_at_length_as_long_as_one_of_a_block_falls(small, images, tmp_path):
    """Short attacks of no use: all that falls before the audit falls to the long attack, the nearest first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specification, "ensemble", lambda version, norm: [Member("apgd-ce", steps=0)])

        def interrupt(now: Progress) -> None:
            if now.attack == "apgd-t@near-2":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quick(small, images, state=tmp_path, progress=interrupt)
        with np.load(tmp_path / "evaluation.npz") as data:
            interrupted, worst = json.loads(str(data["about"]))["notes"]["near"], data["worst_margin"]
        found = quick(small, images, state=tmp_path)
        whole = quick(small, images)
    assert found.frame.equals(whole.frame)
    assert found.audit == whole.audit
    near = json.loads(str(np.load(tmp_path / "evaluation.npz")["about"]))["notes"]["near"]
    assert near["order"] == interrupted["order"]
    assert interrupted["blocks"] == [4]
    assert near["blocks"][:2] == [4, 4]
    (spent,) = [item for item in found.spent if item.attack == "apgd-t@near"]
    attacked = near["order"][: sum(near["blocks"])]
    assert spent.images == len(attacked) < len(near["order"])
    fell = (found.broken_by == "apgd-t") & ~found.frame["audited"].to_numpy()
    assert set(fell.nonzero()[0]) <= set(attacked)
    assert spent.broken == fell.sum() > 0
    first = [sum(near["blocks"][:n]) for n in range(len(near["blocks"]))]
    by_block = [fell[near["order"][i : i + n]].sum() for i, n in zip(first, near["blocks"], strict=True)]
    assert by_block[-1] == 0
    assert min(by_block[:-1]) > 0
    assert (np.diff(worst[near["order"][4:]]) >= 0).all()  # of those that were not attacked when it was interrupted


def test_how_many_of_the_nearest():
    assert [near_more(n, ()) for n in (0, 150, 1000)] == [4, 4, 20]
    assert near_more(1000, (3,)) == 20
    assert near_more(1000, (3, 0)) == 0


def test_how_many_to_audit():
    assert audit_more(1000, 2000, (), (), None) == 50
    assert audit_more(40, 80, (), (), None) == 8
    assert audit_more(1000, 2000, (50,), (0,), None) == 0
    # A few hits may be bad luck, and are looked into; many are not.
    assert audit_more(171, 512, (8,), (1,), None) == 12
    assert audit_more(171, 512, (8, 12), (1, 0), None) == 0
    assert audit_more(171, 512, (8,), (5,), None) == 0
    assert audit_more(1000, 2000, (50,), (3,), None) == 10
    assert audit_more(12, 30, (8,), (1,), None) == 4
    few, many = (audit_more(1000, 2000, (), (), until) for until in (2.0, 0.5))
    assert few < many < 1000
    assert 50 * hypergeometric_most(0, few, 1000, 0.04) / 2000 <= 2.0
    assert 50 * hypergeometric_most(0, few - 1, 1000, 0.04) / 2000 > 2.0
    assert audit_more(1000, 2000, (few,), (0,), 2.0) == 0
    assert audit_more(1000, 2000, (few,), (few // 4,), 2.0) >= few // 2
    assert audit_more(0, 10, (), (), 0.5) == 0
    # 96% of the survivors without a hit leave none, at the error of the first look.
    assert audit_more(1000, 2000, (), (), 1e-9) == 960
    # Any precision can be reached: at last all survivors are audited.
    assert audit_more(1000, 2000, (960,), (900,), 1e-9) == 40


@pytest.mark.parametrize(("survivors", "weak"), [(100, 1), (170, 3), (400, 8), (400, 40)])
def test_the_interval_covers_what_the_full_ensemble_would_say(survivors: int, weak: int):
    """`weak` of the survivors would fall: random samples, fixed in size and extended until 2 points; 3,000 draws."""
    rng = np.random.default_rng(1)
    images = 2 * survivors
    for until in (None, 2.0):
        covered = []
        for _ in range(3000 if until is None else 300):
            falls = rng.permutation(survivors) < weak
            done: list[int] = []
            fell: list[int] = []
            while more := audit_more(survivors, images, done, fell, until):
                first = sum(done)
                done.append(min(more, survivors - first))
                fell.append(int(falls[first : first + done[-1]].sum()))
                if sum(done) == survivors:
                    break
            audit = Audit((Part(survivors, sum(done), sum(fell), len(done) - 1),))
            low, high = audit.robust()
            covered.append(low <= survivors - weak <= high)
        assert np.mean(covered) >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / len(covered))


def test_the_deviation_of_the_estimate_is_that_of_the_rate_it_expects():
    """Rates drawn from the beta distribution of `PRIOR` and the audit, in two shards; an audit of all leaves none."""
    parts = (Part(170, 20, 1, 1), Part(60, 8, 0, 0))
    rng = np.random.default_rng(0)
    left = sum(
        p.survivors
        - p.fell
        - (p.survivors - p.attacked) * rng.beta(p.fell + 0.25, p.attacked - p.fell + 49.75, 200_000)
        for p in parts
    )
    assert Audit(parts).estimate == pytest.approx(left.mean(), rel=1e-3)
    assert Audit(parts).deviation == pytest.approx(left.std(), rel=0.02)
    assert Audit((Part(12, 12, 3, 0),)).deviation == 0


def test_shards_merge_and_share_the_error(small, crowd, short):
    x, y = crowd
    parts = [quick(small, (x[p], y[p]), index=torch.arange(len(x))[p]) for p in (slice(0, 150), slice(150, None))]
    merged = merge(parts)
    assert merged.audit.survivors == short.audit.survivors
    assert merged.audit.parts == tuple(part for v in parts for part in v.audit.parts)
    low, high = merged.audit_interval
    assert low <= short.robust_accuracy <= high
    plain = merged.frame["broken_by"].to_numpy() == short.frame["broken_by"].to_numpy()
    assert plain[~(merged.frame["audited"] | short.frame["audited"])].all()


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{here!r}, str(Path({here!r}).parent)]
import test_quick as t
from conftest import Small, blobs, train
t.again.ensemble = lambda version, norm: t.LIGHT
torch.manual_seed(3)
small = train(Small(6), 6)
def progress(now):
    if now.attack == "fab-t@audit":
        os.kill(os.getpid(), signal.SIGKILL)
t.quick(small, blobs(60, 6, 7), state={state!r}, progress=progress)
"""


@pytest.mark.usefixtures("forks")
def test_kill_9_in_the_audit_and_resume_give_the_same_bits(small, images, tmp_path):
    whole = quick(small, images)
    script = SCRIPT.format(here=str(Path(__file__).parent), state=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = quick(small, images, state=tmp_path)
    assert again.frame.equals(whole.frame)
    assert again.audit == whole.audit


def test_progress_ends_at_one(small, images):
    seen: list[Progress] = []
    quick(small, images, progress=seen.append)
    audit = {f"{m.name}@audit" for m in ensemble("standard", "linf")}
    assert {p.attack for p in seen} == {"apgd-ce", "apgd-t", "apgd-t@near"} | audit
    assert seen[-1].fraction == 1
    assert all(0 <= p.fraction <= 1 for p in seen)


# -- masked models -----------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Gradients that say nothing, or too little: what short attacks cannot see through."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "quantised":
            return self.model(x + ((15 * x).round() / 15 - x).detach() - (x - x.detach()))
        if self.kind == "random":
            return self.model(x + 0.05 * torch.randn_like(x))
        z = self.model(x)
        if self.kind == "probabilities":
            return (20 * z).softmax(1)
        if self.kind == "shattered":
            return z + 0.3 * (300 * x.flatten(1)[:, : z.shape[1]]).sin()
        return z + (50 * z).detach() - (50 * z) * 0.98  # "saturated": right answers, gradients a 50th of their size


@pytest.mark.parametrize("kind", ["quantised", "random", "probabilities", "shattered"])
def test_a_masked_model_ends_in_the_finding(small, images, kind):
    found = quick(Masked(small, kind).eval(), images, checks=True)
    (finding,) = [f for f in found.findings if f.name == "run-standard"]
    assert "version='standard'" in finding.advice
    assert "run-standard" in page(found)


def test_hits_in_the_audit_widen_the_interval_and_end_in_the_finding(small, images):
    """Gradients that are 0 everywhere, and no check: the audit finds it out, by Square."""
    masked = Masked(small, "quantised").eval()
    found = quick(masked, images, Threat("linf", 0.2))
    exact = evaluate(masked, *images, Threat("linf", 0.2), checks=False, precision="float32")
    finding = found.findings[-1]
    assert finding.name == "run-standard"
    assert finding.evidence["fell"] == found.audit.fell > 0
    low, high = found.audit_interval
    assert low <= exact.robust_accuracy <= high
    assert high - low > 0.3


# -- asking for it -----------------------------------------------------------------------------------------------------


def test_a_recipe_may_ask_for_it():
    recipe = Recipe()
    asked = recipe.with_({"evaluation.version": "quick", "evaluation.until": 1})
    assert asked.id == recipe.id
    assert (
        len({recipe.evaluation_id, asked.evaluation_id, recipe.with_({"evaluation.version": "quick"}).evaluation_id})
        == 3
    )
    sizes = PUBLISHED["cifar10"]
    full, few = (
        sum(evaluation_passes(r, sizes, clean=0.85, robust=0.5).values())
        for r in (recipe, recipe.with_({"evaluation.version": "quick"}))
    )
    assert 10 * few < full


@pytest.mark.parametrize(
    "changes", [{"evaluation.until": 1}, {"evaluation.version": "quick", "evaluation.confirm": "all"}]
)
def test_a_recipe_that_cannot_be_evaluated_is_refused_before_it_is_trained(changes):
    with pytest.raises(InputError, match=r"evaluation\.version"):
        Recipe().with_(changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"until": 0.0}, "until = 0"),
        ({"until": 1.0, "version": "standard"}, "with version standard"),
        ({"confirm": "all"}, "with version quick"),
    ],
)
def test_bad_input_is_one_line(small, images, changes, words):
    with pytest.raises(InputError, match=words) as error:
        quick(small, images, **changes)
    assert "\n" not in str(error.value)
