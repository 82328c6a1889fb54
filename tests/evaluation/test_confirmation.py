"""Survivors of a low precision attacked again in float32: how many, what a fall does, what it says of the rest."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.ensemble import Member
from robudget.errors import InputError
from robudget.evaluation import evaluator, victims
from robudget.evaluation.confirmation import (
    LEVEL,
    Confirmation,
    Part,
    block_size,
    enough,
    images_if_none_falls,
)
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.state import FILE, Progress, State
from robudget.evaluation.verdicts import Verdicts, merge, page
from robudget.recipe import Recipe
from robudget.threat import Threat

THREAT = Threat("linf", 0.05)
ATTACKS = [Member("apgd-ce", steps=10), Member("fab-t", steps=10, targets=2), Member("square", steps=100)]


WIDE = Threat("linf", 0.1)  # in which nearly every image falls


def run(model: nn.Module, images: tuple[Tensor, Tensor], threat: Threat = THREAT, **changes) -> Verdicts:
    given = {"attacks": ATTACKS, "batch_size": 16, "checks": False, "precision": "bfloat16"} | changes
    return evaluate(model, *images, threat, **given)


class Numb(nn.Module):
    """Answers as the model does to images brighter in the first pixel than `above`, elsewhere as to a grey one: a low
    precision that misses what float32 finds."""

    def __init__(self, model: nn.Module, above: float = 2.0) -> None:
        super().__init__()
        self.model, self.above = model, above

    def forward(self, x: Tensor) -> Tensor:
        bright = (x[:, :1, :1, :1] > self.above).float()
        return self.model(bright * x + (1 - bright) * (0 * x + 0.5))


@pytest.fixture
def numb(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Replaces the low-precision copy."""
    whole = victims.crafting_copy

    def replace(above: float = 2.0) -> None:
        def copy(model: nn.Module, x: Tensor, precision: str) -> nn.Module:
            return whole(model, x, precision) if precision == "float32" else Numb(model, above).eval()

        monkeypatch.setattr(victims, "crafting_copy", copy)

    return replace


# -- how many ----------------------------------------------------------------------------------------------------------


def test_blocks_grow_from_two_percent_and_end_after_five_where_nothing_falls():
    assert [block_size(k, 1000) for k in range(4)] == [20, 30, 45, 68]
    assert block_size(0, 10) == 2
    assert not enough(1000, [20], [0])
    assert enough(1000, [20, 30], [0, 0])
    assert enough(1000, [20, 30], [3, 0])
    assert not enough(1000, [20, 30], [0, 1])
    assert enough(1000, [20, 30, 45], [0, 1, 0])
    assert not enough(0, [], [])


@pytest.mark.parametrize("survivors", [*range(4, 101), 128, 171, 500, 1000, 4000, 10_000])
def test_where_nothing_falls_it_is_a_seventh_of_the_survivors_work_at_most_or_a_third_of_few(survivors: int):
    again = images_if_none_falls(survivors)
    assert again >= min(0.05 * survivors, survivors)
    assert again / (survivors + again) <= (0.15 if survivors >= 100 else 1 / 3)


def test_share_of_the_passes_of_an_evaluation(small, crowd):
    """Padding and discarded proposals of Square included."""
    found = run(small, crowd, confirm="auto")
    assert found.confirmation is not None
    assert found.confirmation.survivors >= 100
    assert found.confirmation.fell == 0
    passes = {again: sum(i.forward + i.backward for i in found.spent if ("@" in i.attack) == again) for again in (0, 1)}
    assert 0 < passes[1] <= 0.15 * sum(passes.values())
    few = run(small, (crowd[0][:40], crowd[1][:40]))
    assert 4 <= few.confirmation.survivors < 100
    passes = {again: sum(i.forward + i.backward for i in few.spent if ("@" in i.attack) == again) for again in (0, 1)}
    assert 0 < passes[1] <= sum(passes.values()) / 3


def test_those_nearest_to_misclassified_come_first(small, images, tmp_path):
    run(small, images, state=tmp_path)
    with np.load(tmp_path / FILE) as data:
        notes = json.loads(str(data["about"]))["notes"]
    alone = run(small, images, confirm="none")
    robust = np.flatnonzero(alone.robust)
    margins = alone.frame["worst_margin"].to_numpy()
    assert sorted(notes["order"]) == robust.tolist()
    assert (np.diff(margins[notes["order"]]) >= 0).all()
    assert sum(notes["blocks"]) == images_if_none_falls(len(robust))


@pytest.mark.parametrize("confirm", ["all", "none"])
def test_all_or_none(small, images, confirm):
    found = run(small, images, confirm=confirm)
    again = [item for item in found.spent if "@" in item.attack]
    assert found.about["confirm"] == confirm
    if confirm == "none":
        assert again == []
        assert found.confirmation.at_most == found.confirmation.rest == found.robust.sum()
        assert "confirm = none" in page(found)
    else:
        assert {item.images for item in again} == {found.robust.sum()}
        assert found.confirmation.at_most == found.confirmation.rest == 0
        assert f"all {found.robust.sum()} survivors attacked again in float32, none fell" in page(found)


def test_more_may_be_confirmed_afterwards_without_a_restart(small, images, tmp_path):
    first = run(small, images, state=tmp_path, confirm="none")
    some = run(small, images, state=tmp_path, confirm="auto")
    every = run(small, images, state=tmp_path, confirm="all")
    spent = [{item.attack: item for item in found.spent} for found in (first, some, every)]
    for name in ("clean", *(member.name for member in ATTACKS)):
        assert spent[0][name] == spent[1][name] == spent[2][name]
    assert spent[1]["square@float32"].images < spent[2]["square@float32"].images == first.robust.sum()
    assert every.frame["broken_by"].equals(run(small, images, confirm="all").frame["broken_by"])


def test_float32_needs_no_confirmation(small, images):
    found = run(small, images, precision="float32")
    assert found.confirmation is None
    assert "Confirmation" not in page(found)
    assert found.summary()["confirmation"] is None


# -- a fall ------------------------------------------------------------------------------------------------------------


def test_a_fall_extends_block_by_block_until_everything_that_falls_has_fallen(small, images, numb, tmp_path):
    numb()
    found = run(small, images, WIDE, state=tmp_path)
    confirmation = found.confirmation
    assert confirmation.attacked == confirmation.survivors == found.clean.sum()
    assert confirmation.fell > 10
    assert confirmation.rest == confirmation.at_most == 0
    exact = run(small, images, WIDE, precision="float32")
    assert found.frame["broken_by"].equals(exact.frame["broken_by"])
    with np.load(tmp_path / FILE) as data:
        about = json.loads(str(data["about"]))
    blocks, spent = about["notes"]["blocks"], about["spent"]
    assert len(blocks) >= 5
    assert [spent["apgd-ce@float32" + (f"-{k + 1}" if k else "")]["images"] for k in range(len(blocks))] == blocks
    # All blocks are one line of the account, and no image is attacked twice by the same attack.
    assert [item.attack for item in found.spent][-3:] == [f"{m.name}@float32" for m in ATTACKS]
    assert sum(blocks) == confirmation.survivors
    finding = next(f for f in evaluate_findings(small, images) if f.name == "float32-changed")
    assert finding.evidence["verdicts_changed"] == confirmation.fell


def evaluate_findings(model, images):
    return run(model, images, WIDE, checks=True).findings


def test_a_fall_in_the_first_block_alone_extends_by_one(small, images, numb, monkeypatch):
    """Only the two nearest fall (their verdicts are forced): the next block, of none, ends it."""
    numb(-1.0)  # as good as float32
    plain = run(small, images)
    assert plain.confirmation.fell == 0
    real, seen = evaluator._Evaluation._run, []

    def falls(self, plan, among=None):
        real(self, plan, among)
        if among is not None:
            seen.append(len(among))
            if len(seen) == 1:
                name = plan[0].name
                self.state.spent[name] = evaluator.replace(self.state.spent[name], broken=1)
                self.state.broken_by[among[0]] = plan[0].member.name

    monkeypatch.setattr(evaluator._Evaluation, "_run", falls)
    found = run(small, images)
    survivors = plain.confirmation.survivors
    assert seen == [block_size(0, survivors), block_size(1, survivors)][: len(seen)]
    assert sum(seen) >= 0.05 * survivors
    assert found.confirmation.fell == 1
    assert found.robust.sum() == plain.robust.sum() - 1


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["apgd-ce@float32", "apgd-ce@float32-3"])
def test_a_confirmation_that_was_stopped_goes_on_to_the_same_bits(small, images, numb, tmp_path, where):
    numb()
    whole = run(small, images, WIDE)

    def stop(now: Progress) -> None:
        if now.attack.startswith(where):
            raise Stop

    with pytest.raises(Stop):
        run(small, images, WIDE, state=tmp_path, progress=stop)
    again = run(small, images, WIDE, state=tmp_path)
    assert again.frame.equals(whole.frame)
    assert again.confirmation == whole.confirmation
    assert [(i.attack, i.images, i.broken) for i in again.spent] == [
        (i.attack, i.images, i.broken) for i in whole.spent
    ]


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{here!r}, str(Path({here!r}).parent)]
import test_confirmation as t
from conftest import Small, blobs, train
from robudget.evaluation import victims
torch.manual_seed(3)
small = train(Small(6), 6)
whole = victims.crafting_copy
victims.crafting_copy = lambda m, x, p: whole(m, x, p) if p == "float32" else t.Numb(m).eval()
def progress(now):
    if now.attack == "apgd-ce@float32-3":
        os.kill(os.getpid(), signal.SIGKILL)
t.run(small, blobs(60, 6, 7), t.WIDE, state={state!r}, progress=progress)
"""


@pytest.mark.usefixtures("forks")
def test_kill_9_in_the_middle_of_a_block_and_resume_give_the_same_bits(small, images, numb, tmp_path):
    numb()
    script = SCRIPT.format(here=str(Path(__file__).parent), state=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert run(small, images, WIDE, state=tmp_path).frame.equals(run(small, images, WIDE).frame)


def test_a_state_from_before_there_were_blocks_is_gone_on_with(small, images, numb, tmp_path):
    """Earlier, `nearest` were attacked again, and all of them (`@float32-all`) where one fell."""
    numb()
    run(small, images, WIDE, state=tmp_path, confirm="none")
    with np.load(tmp_path / FILE) as data:
        about, arrays = json.loads(str(data["about"])), {k: data[k] for k in data if k != "about"}
    notes = about["notes"]
    notes["nearest"] = np.flatnonzero(arrays["broken_by"] == "robust")[:16].tolist()
    np.savez(tmp_path / FILE, about=np.array(json.dumps(about)), **arrays)
    found = run(small, images, WIDE, state=tmp_path)
    assert found.frame["broken_by"].equals(run(small, images, WIDE).frame["broken_by"])
    about["spent"]["apgd-ce@float32-all"] = about["spent"]["apgd-ce"] | {"attack": "apgd-ce@float32-all"}
    np.savez(tmp_path / FILE, about=np.array(json.dumps(about)), **arrays)
    state = State.load(tmp_path, about["identity"])
    assert state.notes["blocks"] == [16, found.clean.sum() - 16]
    assert "apgd-ce@float32-2" in state.spent


# -- what it says of the rest ------------------------------------------------------------------------------------------


def test_the_bound_holds_wherever_the_blocks_stop():
    """Images that fall in random places among the survivors, as the bound assumes at worst; 4,000 draws each."""
    rng = np.random.default_rng(0)
    for survivors, falling in ((40, 4), (171, 1), (171, 20), (500, 15), (500, 60)):
        covered = []
        for _ in range(4000):
            falls = rng.permutation(survivors) < falling
            blocks: list[int] = []
            fell: list[int] = []
            while sum(blocks) < survivors and not enough(survivors, blocks, fell):
                first = sum(blocks)
                blocks.append(min(block_size(len(blocks), survivors), survivors - first))
                fell.append(int(falls[first : first + blocks[-1]].sum()))
            confirmation = Confirmation((Part.of(survivors, blocks, fell),))
            covered.append(falls[sum(blocks) :].sum() <= confirmation.at_most)
        # Three standard errors of a coverage of 95% in 4,000 draws.
        assert np.mean(covered) >= LEVEL - 3 * np.sqrt(LEVEL * (1 - LEVEL) / 4000), (survivors, falling)


def test_shards_share_the_error(small, images):
    x, y = images
    parts = [run(small, (x[p], y[p]), index=torch.arange(len(x))[p]) for p in (slice(0, 30), slice(30, None))]
    merged = merge(parts)
    assert merged.confirmation.parts == tuple(p for part in parts for p in part.confirmation.parts)
    assert merged.confirmation.survivors == merged.robust.sum()
    alone = sum(part.confirmation.at_most for part in parts)
    assert alone <= merged.confirmation.at_most <= merged.confirmation.rest


def test_it_is_kept_and_told(small, images, tmp_path):
    found = run(small, images)
    found.save(tmp_path)
    assert Verdicts.load(tmp_path).confirmation == found.confirmation
    told = json.loads((tmp_path / "result.json").read_text())["confirmation"]
    part = found.confirmation.parts[0]
    assert told["parts"] == [asdict(part)]
    assert told["at_most"] == part.at_most(1 - LEVEL) > 0
    text = " ".join(page(found).split())
    assert f"at most {told['at_most']} of the other {told['rest']} would" in text
    assert "as likely to fall as images drawn at random" in text
    # Results that were written before there was one are read.
    result = json.loads((tmp_path / "result.json").read_text())
    del result["confirmation"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert Verdicts.load(tmp_path).confirmation is None


# -- asking for it -----------------------------------------------------------------------------------------------------


def test_a_recipe_may_ask_and_its_default_keeps_every_id():
    recipe = Recipe()
    asked = recipe.with_({"evaluation.confirm": "all"})
    assert asked.id == recipe.id
    assert asked.evaluation_id != recipe.evaluation_id
    assert recipe.with_({"evaluation.confirm": "auto"}).evaluation_id == recipe.evaluation_id
    with pytest.raises(InputError, match=r"evaluation\.confirm"):
        recipe.with_({"evaluation.confirm": "some"})


def test_an_unknown_mode_is_one_line(small, images):
    with pytest.raises(InputError, match=r"unknown confirm 'nun'.*did you mean 'none'"):
        run(small, images, confirm="nun")
