"""Examples of another evaluation as one more member of the ensemble: whose they are, what they break and take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.build import attack
from robudget.attacks.ensemble import Member
from robudget.attacks.geometry import within
from robudget.errors import InputError
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.examples import Examples, replay
from robudget.evaluation.specification import Specification
from robudget.evaluation.state import Progress
from robudget.evaluation.verdicts import Verdicts, merge, page
from robudget.threat import Threat

THREAT = Threat("linf", 0.08)
WEAK = [Member("apgd-ce", steps=2)]


class Rounded(nn.Module):
    """No gradient, and the answers of the model on 16 levels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 15).round() / 15)


@pytest.fixture(scope="module")
def kept(small, images, tmp_path_factory) -> Path:
    """The folder of an evaluation of the undefended model that kept its examples."""
    made = evaluate(small, *images, THREAT, attacks=["apgd-ce:steps=20"], examples=True, checks=False)
    return made.save(tmp_path_factory.mktemp("made"))


def shown(model, images, *files: Path | str, **changes) -> Verdicts:
    given = {
        "attacks": WEAK,
        "add": [f"transfer:{file}" for file in files],
        "batch_size": 16,
        "examples": True,
    } | changes
    return evaluate(model, *images, given.pop("threat", THREAT), **given)


def test_transferred_examples_break_a_model_that_hides_its_gradient(small, images, kept):
    model = Rounded(small)
    found = shown(model, images, kept)
    alone = evaluate(model, *images, THREAT, attacks=WEAK, checks=False)
    examples = Examples.load(kept / "examples.npz")
    fooled = set(examples.index[replay(model, examples).fooled].tolist())
    broken = set(np.flatnonzero(found.broken_by == "transfer").tolist())
    assert broken == fooled & set(np.flatnonzero(alone.robust).tolist())
    assert len(broken) > 30
    # Verified on the model as given, in the ball, and booked with one pass for each example and one for each claim.
    mine = found.examples
    assert mine is not None
    assert replay(model, mine).fooled.all()
    assert within(torch.from_numpy(mine.x_adv), images[0][mine.index], THREAT.eps, "linf").all()
    item = found.spent[-1]
    assert (item.attack, item.images, item.broken, item.backward) == (
        "transfer",
        int(alone.robust.sum()),
        len(broken),
        0,
    )
    assert item.forward >= len(examples) - int((~alone.robust).sum()) > 0
    assert found.frame.loc[found.broken_by == "transfer", "when"].eq(1).all()
    assert found.after_each()["transfer"] == found.robust_accuracy < alone.robust_accuracy
    (finding,) = [finding for finding in found.findings if finding.name == "transfer-breaks"]
    assert finding.evidence["images"] == len(broken)
    assert f"Transfer  {kept}: examples of {len(examples)} of these images (made for linf 0.08)" in page(found)


def test_of_several_files_the_restart_says_which(small, images, kept, tmp_path):
    examples = Examples.load(kept / "examples.npz")
    half = len(examples) // 2
    for name, part in (("a", slice(half)), ("b", slice(half, None))):
        Examples(examples.index[part], examples.label[part], examples.x_adv[part], THREAT).save(
            tmp_path / f"{name}.npz"
        )
    both = shown(Rounded(small), images, tmp_path / "a.npz", tmp_path / "b.npz", checks=False)
    whole = shown(Rounded(small), images, kept, checks=False)
    assert both.broken_by.tolist() == whole.broken_by.tolist()
    rows = both.frame[both.frame["broken_by"] == "transfer"]
    assert (rows["restart"] == (~rows["index"].isin(examples.index[:half])).astype(int)).all()
    assert Specification(THREAT, add=["transfer:a", "transfer:b"]).ensemble_name == "standard+transfer"
    assert Specification(THREAT, add=["transfer:a"]).members[-1] == Member("transfer", restarts=1, files=("a",))


def test_an_example_outside_the_ball_is_moved_into_it(small, images, kept):
    found = shown(Rounded(small), images, kept, threat=Threat("linf", 0.05))
    assert found.about["transfer"][0]["outside"] > 0
    assert "outside the ball, moved into it" in page(found)
    assert found.examples is not None
    x = images[0][found.examples.index]
    assert within(torch.from_numpy(found.examples.x_adv), x, 0.05, "linf").all()
    l2 = shown(Rounded(small), images, kept, threat=Threat("l2", 0.4), checks=False).examples
    assert l2 is not None
    assert within(torch.from_numpy(l2.x_adv), images[0][l2.index], 0.4, "l2").all()


def test_shards_and_resumes_give_the_same_verdicts(small, images, kept, tmp_path):
    model, (x, y) = Rounded(small), images
    whole = shown(model, images, kept, checks=False)
    parts = [
        shown(model, (x[p], y[p]), kept, checks=False, index=torch.arange(60)[p]) for p in (slice(40), slice(40, 60))
    ]
    merged = merge(parts)
    assert merged.broken_by.tolist() == whole.broken_by.tolist()
    assert merged.about["transfer"] == whole.about["transfer"]

    class Stop(Exception):
        pass

    def stop(now: Progress) -> None:
        if now.attack == "transfer":
            raise Stop

    with pytest.raises(Stop):
        shown(model, images, kept, checks=False, state=tmp_path / "state", progress=stop)
    moved = tmp_path / "elsewhere.npz"
    moved.write_bytes((kept / "examples.npz").read_bytes())
    again = shown(model, images, moved, checks=False, state=tmp_path / "state")
    assert again.frame.equals(whole.frame)
    fewer = Examples.load(moved)
    Examples(fewer.index[1:], fewer.label[1:], fewer.x_adv[1:], THREAT).save(moved)
    with pytest.raises(InputError, match="attacks' settings"):
        shown(model, images, moved, checks=False, state=tmp_path / "state")


def test_in_low_precision_it_is_not_made_again(small, images, kept):
    found = shown(small, images, kept, precision="bfloat16", checks=False, threat=Threat("linf", 0.03))
    names = [item.attack for item in found.spent]
    assert "apgd-ce@float32" in names
    assert "transfer@float32" not in names


def test_examples_of_other_images_are_refused(small, images, kept, tmp_path):
    x, y = images
    cases = [
        ((x.flip(0), y), {}, "of other images: its example of row"),
        ((x, y.roll(1)), {}, "has label"),
        ((x[:, :, :, :4], y), {}, r"holds images \(1, 8, 8\)"),
    ]
    for given, changes, said in cases:
        with pytest.raises(InputError, match=said) as caught:
            shown(lambda x: torch.zeros(len(x), 6), given, kept, attacks=["transfer:" + str(kept)], add=(), **changes)
        assert "\n" not in str(caught.value)
    none = shown(small, images, kept, index=torch.arange(1000, 1060))
    assert "no-examples" in [finding.name for finding in none.findings]
    assert none.spent[-1].forward == 0
    with pytest.raises(InputError, match="cannot read adversarial examples"):
        shown(small, images, tmp_path / "nowhere.npz")


def test_a_transfer_needs_a_file_and_an_evaluation(small, images):
    with pytest.raises(InputError, match="transfer:FILE"):
        Member.parse("transfer")
    with pytest.raises(InputError, match="no other attack has files"):
        Member("pgd", files=("a",))
    with pytest.raises(InputError, match="member of an evaluation"):
        attack(small, *images, THREAT, "transfer:a")
    assert str(Member.parse("transfer:some file.npz")) == "transfer:some file.npz"


def test_as_typed(robudget_command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("network.py").write_text(
        "import torch\nfrom torch import nn\n\ndef load():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n\n"
        "def rounded():\n    network = load()\n    return lambda x: network((x * 15).round() / 15)\n"
    )
    asked = ["--data", "digits", "--eps", "0.2", "--attack", "apgd-ce:steps=5", "--samples", "30", "--json"]
    _, out, _ = robudget_command("eval", "network.py:load", *asked, "--examples", "--out", "mine")
    made = json.loads(out)
    code, out, err = robudget_command("eval", "network.py:rounded", *asked, "--add", "transfer:mine", "--out", "with")
    assert code == 0, err
    found = json.loads(out)
    assert found["about"]["transfer"][0]["examples"] == sum(item["broken"] for item in made["spent"][1:]) > 0
    assert found["spent"][-1]["attack"] == "transfer"
    assert found["spent"][-1]["broken"] > 0
    code, _, err = robudget_command("eval", "network.py:rounded", *asked, "--add", "transfer")
    assert (code, err.count("\n")) == (2, 1)
    assert "transfer:FILE" in err
