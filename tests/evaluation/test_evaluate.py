"""A verdict per image: what is in it, that it stands up to a second look, and that batching does not change it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robudget.accuracy import wilson
from robudget.attacks.build import attack
from robudget.attacks.ensemble import Member, ensemble
from robudget.errors import InputError
from robudget.evaluation.evaluator import Evaluator, evaluate
from robudget.evaluation.examples import replay
from robudget.evaluation.specification import Specification
from robudget.evaluation.spent import Spent
from robudget.evaluation.state import Progress
from robudget.evaluation.verdicts import Verdicts, merge, page
from robudget.threat import Threat

THREAT = Threat("linf", 0.08)
QUICK = [Member("apgd-ce", steps=20), Member("apgd-t", steps=20, targets=3), Member("fab-t", steps=20, targets=3)]
QUICK.append(Member("square", steps=200))


@pytest.fixture(scope="module")
def verdicts(small, images) -> Verdicts:
    return evaluate(small, *images, THREAT, attacks=QUICK, examples=True)


def test_every_image_has_a_verdict_with_its_evidence(small, images, verdicts):
    x, y = images
    with torch.no_grad():
        z = small(x)
    assert len(verdicts) == verdicts.n == len(x)
    clean = (z.argmax(1) == y).numpy()
    assert np.array_equal(verdicts.clean, clean)
    assert verdicts.clean_accuracy == clean.mean()
    assert set(verdicts.broken_by) <= {"clean", "apgd-ce", "apgd-t", "fab-t", "square", "robust"}
    assert {"apgd-ce", "robust"} <= set(verdicts.broken_by)
    assert np.array_equal(verdicts.robust, verdicts.broken_by == "robust")
    assert verdicts.interval == wilson(int(verdicts.robust.sum()), len(x))
    frame = verdicts.to_frame()
    assert frame["index"].tolist() == list(range(len(x)))
    assert frame["label"].tolist() == y.tolist()
    fell = ~frame["broken_by"].isin(["clean", "robust"])
    assert (frame.loc[fell, "when"] > 0).all()
    assert (frame.loc[~fell, "when"] == 0).all()
    assert (frame.loc[fell, "worst_margin"] <= 0).all()
    assert (frame.loc[verdicts.robust, "worst_margin"] > 0).all()
    assert (frame.loc[verdicts.robust, "worst_margin"] <= frame.loc[verdicts.robust, "clean_margin"]).all()


def test_examples_break_what_they_are_said_to_break(small, images, verdicts):
    x, y = images
    kept = verdicts.examples
    assert kept is not None
    fell = np.flatnonzero(verdicts.clean & ~verdicts.robust)
    assert kept.index.tolist() == fell.tolist()
    assert replay(small, kept).transfer == 1
    assert (torch.from_numpy(kept.x_adv) - x[fell]).abs().max() <= THREAT.eps + 1e-6
    assert kept.label.tolist() == y[fell].tolist()


def test_what_each_attack_took_adds_up(verdicts):
    names = [item.attack for item in verdicts.spent]
    assert names == ["clean", "checks", "apgd-ce", "apgd-t", "fab-t", "square"]
    left = len(verdicts)
    for item in verdicts.spent:
        if item.attack not in ("checks",):
            assert item.images == left
            left -= item.broken
        assert item.seconds > 0
        assert item.forward > 0
        assert item.energy_kwh is None
    assert left == verdicts.robust.sum()
    last = verdicts.spent[-1]
    assert last.forward >= left * 201
    assert last.backward == 0
    assert verdicts.calls["square_forward"] == last.forward
    assert verdicts.after_each()["square"] == verdicts.robust_accuracy
    assert list(verdicts.after_each().values()) == sorted(verdicts.after_each().values(), reverse=True)


def test_save_and_load_give_the_same_verdicts(tmp_path, verdicts):
    verdicts.save(tmp_path / "eval")
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {
        "verdicts.parquet",
        "result.json",
        "verdict.txt",
        "examples.npz",
    }
    again = Verdicts.load(tmp_path / "eval")
    assert again.frame.equals(verdicts.frame)
    assert again.threat == verdicts.threat
    assert again.spent == verdicts.spent
    assert again.findings == verdicts.findings
    assert again.about == verdicts.about
    assert again.examples is not None
    assert np.array_equal(again.examples.x_adv, verdicts.examples.x_adv)
    text = (tmp_path / "eval" / "verdict.txt").read_text()
    assert f"Robust accuracy {100 * verdicts.robust_accuracy:.2f}%" in text
    assert len(text.splitlines()) < 60


def test_load_says_what_is_wrong(tmp_path, verdicts):
    with pytest.raises(InputError, match="cannot read an evaluation"):
        Verdicts.load(tmp_path)
    verdicts.save(tmp_path)
    text = (tmp_path / "result.json").read_text()
    (tmp_path / "result.json").write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(InputError, match="format 99"):
        Verdicts.load(tmp_path)


@pytest.mark.parametrize("threat", [Threat("linf", 0.06), Threat("l2", 0.4), Threat("l1", 2.0)], ids=str)
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_versions_and_norms(small, images, version, threat):
    """The whole of every version once, on a few images."""
    x, y = images[0][:4], images[1][:4]
    verdicts = evaluate(small, x, y, threat, version=version, checks=False)
    names = [item.attack for item in verdicts.spent if item.attack not in ("clean", "checks", "votes")]
    wanted = {
        "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
        "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
        "rand": ["apgd-ce", "apgd-dlr"],
    }
    assert names == wanted[version]
    standing = verdicts.after_each()[names[-1]] * 4
    if standing and version == "rand":
        assert verdicts.calls["apgd-dlr_backward"] >= 20 * 101 * standing
    if standing and version == "plus":
        assert verdicts.calls["apgd-dlr_backward"] >= 5 * 101 * standing


def test_eps_zero_is_the_clean_accuracy(small, images):
    verdicts = evaluate(small, *images, Threat("linf", 0), checks=False)
    assert verdicts.robust_accuracy == verdicts.clean_accuracy
    assert verdicts.calls["square_forward"] == 0


def test_batch_sizes_agree_on_all_but_close_calls(small, many):
    """7, 64 and 512: at least 99.5% of 200 images, and where they differ the margin is next to nothing."""
    x, y = many
    quick = [replace(member, steps=min(member.length, 60) // 4) for member in QUICK]
    threat = Threat("linf", 0.04)
    runs = [evaluate(small, x, y, threat, attacks=quick, batch_size=b, checks=False) for b in (7, 64, 512)]
    assert 0.2 < runs[0].robust_accuracy < 0.9
    for run in runs[1:]:
        differ = runs[0].robust != run.robust
        assert differ.sum() <= 0.005 * len(x)
        for verdicts in (runs[0], run):
            assert (verdicts.frame.loc[differ, "worst_margin"].abs() < 0.05).all()


def test_progress_grows_to_one(small, images):
    seen: list[Progress] = []
    evaluate(small, *images, THREAT, attacks=QUICK, batch_size=16, progress=seen.append)
    assert {p.attack for p in seen} == {m.name for m in QUICK}
    assert all(0 <= p.fraction <= 1 for p in seen)
    assert seen[-1].fraction == 1
    assert seen[-1].images_done == seen[-1].images
    assert all(a.robust >= b.robust for a, b in pairwise(seen))


def test_windows_are_entered_around_every_stage(small, images):
    from contextlib import contextmanager

    entered: list[str] = []

    @contextmanager
    def window(name: str):
        entered.append(f"+{name}")
        yield
        entered.append(f"-{name}")

    evaluate(small, images[0][:4], images[1][:4], THREAT, attacks=["apgd-ce"], window=window)
    assert entered == [f"{s}evaluation/{n}" for n in ("clean", "checks", "apgd-ce") for s in "+-"]


class Counter:
    """A meter that takes a joule a look; `kwh` NaN: one that cannot read its hardware."""

    how = "measured"

    def __init__(self, step: float) -> None:
        self.step, self.kwh = step, 0.0

    @property
    def energy(self) -> Counter:
        self.kwh += self.step
        return self

    def __call__(self, name: str):
        return nullcontext(self)


def test_energy_and_flops_are_booked_by_attack(small, images):
    x, y = images[0][:8], images[1][:8]
    metered = evaluate(small, x, y, THREAT, attacks=["apgd-ce", "pgd"], window=Counter(1.0), checks=False)
    assert all(item.energy_kwh > 0 and item.energy_how == "measured" for item in metered.spent)
    assert metered.energy_kwh == sum(item.energy_kwh for item in metered.spent)
    assert metered.energy_how == "measured"
    silent = evaluate(small, x, y, THREAT, attacks=["pgd"], window=Counter(float("nan")), checks=False)
    assert {(item.energy_kwh, item.energy_how) for item in silent.spent} == {(None, "unknown")}
    assert silent.energy_kwh is None
    assert "unknown" in page(silent)
    plain = evaluate(small, x, y, THREAT, attacks=["pgd"], checks=False)
    assert plain.energy_how is plain.flops is None
    assert "not metered" in page(plain)
    priced = plain.with_flops(10.0, 20.0)
    assert [i.flops for i in priced.spent] == [10 * i.forward + 20 * i.backward for i in plain.spent]
    assert priced.flops == sum(i.flops for i in priced.spent) > 0
    assert merge([priced]).flops == priced.flops
    assert merge([metered]).energy_kwh == metered.energy_kwh


def test_parts_add_up_and_what_is_unknown_of_one_is_unknown_of_both():
    metered = Spent("pgd", 4, 1, 2, 3.0, 10, 5, flops=7.0, energy_kwh=0.5, energy_how="measured", done=True)
    both = metered + replace(metered, seconds=1.0, energy_kwh=0.25)
    assert (both.images, both.broken, both.refuted, both.seconds, both.forward, both.backward) == (8, 2, 4, 4.0, 20, 10)
    assert (both.flops, both.energy_kwh, both.energy_how, both.done) == (14.0, 0.75, "measured", True)
    assert (metered + replace(metered, energy_how="estimated")).energy_how == "estimated"
    for part in (replace(metered, energy_kwh=None, energy_how="unknown"), Spent("pgd", seconds=1.0)):
        assert ((metered + part).energy_kwh, (metered + part).energy_how) == (None, "unknown")
    assert (metered + replace(metered, flops=None)).flops is None
    # What has not begun takes nothing, and leaves nothing unknown.
    assert Spent("pgd", images=3) + metered == replace(metered, images=7, done=False)


def test_a_specification_is_data_and_evaluates_as_the_function_does(small, images):
    specification = Specification(THREAT, attacks=["pgd:steps=5", Member("square", steps=20)], checks=False)
    assert specification.members == [Member("pgd", steps=5), Member("square", steps=20)]
    assert specification.ensemble_name == "custom"
    assert Specification(THREAT).members == ensemble("standard", "linf")
    with pytest.raises(FrozenInstanceError):
        specification.seed = 1  # type: ignore[misc]
    evaluator = Evaluator(small, specification)
    first, again = (evaluator.run(images[0][:9], images[1][:9]) for _ in range(2))
    whole = evaluate(small, images[0][:9], images[1][:9], THREAT, attacks=specification.attacks, checks=False)
    assert first.frame.equals(again.frame)
    assert first.frame.equals(whole.frame)


def test_energy_of_an_attempt_that_was_not_metered_is_unknown(small, images, tmp_path):
    x, y = images[0][:40], images[1][:40]

    class Stop(Exception):
        pass

    def stop(now: Progress) -> None:
        if now.attack == "square":
            raise Stop

    for number, windows in enumerate([(Counter(1.0), Counter(1.0)), (None, Counter(1.0)), (Counter(1.0), None)]):
        state = tmp_path / str(number)
        with pytest.raises(Stop):
            evaluate(small, x, y, THREAT, attacks=QUICK, state=state, progress=stop, window=windows[0], checks=False)
        both = evaluate(small, x, y, THREAT, attacks=QUICK, state=state, window=windows[1], checks=False)
        known = [item.energy_kwh is not None for item in both.spent]
        assert known == [windows[0] is not None] * 4 + [windows[1] is not None]
        assert (both.energy_kwh is not None) == (None not in windows)


def test_memory_does_not_grow_with_the_images(small, images):
    """Rows at work at any time: the batch, however many images there are."""
    live: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small

        def forward(self, x: Tensor) -> Tensor:
            live.append(len(x))
            return self.model(x)

    quick = [Member("apgd-ce", steps=2), Member("apgd-t", steps=2), Member("fab-t", steps=2), Member("square", steps=5)]
    for times in (1, 20):
        x, y = images[0].repeat(times, 1, 1, 1), images[1].repeat(times)
        evaluate(Watched().eval(), x, y, Threat("linf", 0.02), attacks=quick, batch_size=32, precision="float32")
        assert max(live) == 32
        live.clear()


def test_out_of_memory_halves_the_batch_with_a_notice(small, images):
    class Tight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 20:
                raise torch.OutOfMemoryError("out of memory")
            return self.model(x)

    with pytest.warns(UserWarning, match="out of memory at batch"):
        found = evaluate(Tight().eval(), *images, THREAT, attacks=QUICK, batch_size=64, precision="float32")
    assert {finding.name for finding in found.findings} == {"batch-halved"}
    assert "memory ran out" in page(found)
    assert found.frame["broken_by"].equals(evaluate(small, *images, THREAT, attacks=QUICK).frame["broken_by"])


def test_images_keep_their_noise_wherever_they_are(small, images):
    """Rows 20 … 39 evaluated as a part of the split meet the noise of the whole."""
    x, y = images
    whole = evaluate(small, x, y, THREAT, attacks=QUICK, checks=False)
    index = torch.arange(20, 40)
    part = evaluate(small, x[20:40], y[20:40], THREAT, attacks=QUICK, index=index, checks=False)
    assert part.frame["index"].tolist() == index.tolist()
    columns = ["broken_by", "when", "restart", "target", "clean_margin", "worst_margin"]
    assert part.frame[columns].equals(whole.frame.loc[20:39, columns].reset_index(drop=True))


def test_the_whole_ensemble_is_at_least_as_strong_as_its_members(small, images):
    x, y, threat = images[0][:20], images[1][:20], Threat("linf", 0.08)
    verdicts = evaluate(small, x, y, threat, checks=False)
    with torch.no_grad():
        for member in ("apgd-ce:steps=15", "fab-t:steps=15,targets=3", "square:steps=150"):
            alone = small(attack(small, x, y, threat, member)).argmax(1) == y
            assert verdicts.robust.sum() <= alone.sum()


def test_two_classes_are_attacked_by_cross_entropy():
    g = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 16, generator=g))
        model[1].bias.zero_()
    x = torch.rand(8, 1, 4, 4, generator=g)
    with torch.no_grad():
        y = model(x).argmax(1)
    verdicts = evaluate(model, x, y, Threat("linf", 0.5), checks=False, examples=True)
    assert (model(torch.from_numpy(verdicts.examples.x_adv)).argmax(1) != y).all()


def test_a_custom_list_may_be_names_or_members(small, images):
    verdicts = evaluate(small, images[0][:8], images[1][:8], THREAT, attacks=["pgd", Member("apgd-dlr", restarts=2)])
    assert [item.attack for item in verdicts.spent][2:] == ["pgd", "apgd-dlr"]
    assert verdicts.about["version"] == "custom"


def test_the_model_may_be_a_function(small, images):
    verdicts = evaluate(lambda v: small(v), images[0][:10], images[1][:10], THREAT, attacks=QUICK, checks=False)
    module = evaluate(small, images[0][:10], images[1][:10], THREAT, attacks=QUICK, checks=False)
    assert (verdicts.robust == module.robust).all()


class Gives(nn.Module):
    """Whatever a function makes of the logits."""

    def __init__(self, model: nn.Module, change) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


BAD_MODELS = [
    (lambda z: (z, z), "tuple"),
    (lambda z: z.argmax(1), "int64"),
    (lambda z: z[:, None], "returns"),
    (lambda z: z[:, :3], "3 classes"),
    (lambda z: z.detach(), "needs a gradient"),
]


@pytest.mark.parametrize(("change", "words"), BAD_MODELS)
def test_models_that_cannot_be_evaluated(small, images, change, words):
    with pytest.raises(InputError, match=words) as error:
        evaluate(Gives(small, change), *images, THREAT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"y": torch.full((60,), 6)}, r"labels lie in \[6, 6\]"),
        ({"y": torch.full((60,), -1)}, r"labels lie in \[-1"),
        ({"x": torch.rand(60, 1, 8, 8) + 0.5}, r"\[0, 1\]"),
        ({"version": "standrad"}, "did you mean 'standard'"),
        ({"attacks": ["apgd-cee"]}, "did you mean 'apgd-ce'"),
        ({"attacks": ["apgd-ce", "apgd-ce"]}, "'apgd-ce' twice"),
        ({"attacks": []}, "at least one attack"),
        ({"attacks": ["pgd:step=3"]}, "did you mean 'steps'"),
        ({"attacks": ["pgd:steps=-3"]}, "steps = -3"),
        ({"classes": 10}, "6 classes apart, and the data have 10"),
        ({"x": torch.rand(60, 8, 8)}, "shape"),
        ({"x": torch.rand(60, 1, 8, 8).double()}, "float64"),
        ({"x": (255 * torch.rand(60, 1, 8, 8)).byte()}, "divide uint8 by 255"),
        ({"y": torch.zeros(60)}, "float32"),
        ({"y": torch.zeros(59, dtype=torch.int64)}, "59"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"precision": "float16"}, "unknown precision"),
        ({"index": torch.zeros(60, dtype=torch.int64)}, "different row numbers"),
        ({"x": torch.rand(0, 1, 8, 8), "y": torch.zeros(0, dtype=torch.int64)}, "0 images"),
    ],
)
def test_bad_input_is_one_clear_line(small, images, changed, words):
    given = {"x": images[0], "y": images[1]} | changed
    with pytest.raises(InputError, match=words):
        evaluate(small, given.pop("x"), given.pop("y"), THREAT, **given)


def test_frozen_weights_are_evaluated_all_the_same(small, images):
    for p in small.parameters():
        p.requires_grad_(False)
    try:
        verdicts = evaluate(small, images[0][:10], images[1][:10], THREAT, attacks=QUICK, checks=False)
    finally:
        for p in small.parameters():
            p.requires_grad_(True)
    assert (verdicts.broken_by == "apgd-ce").any()
