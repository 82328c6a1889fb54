import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robudget import data
from robudget.benchmark import ON_OTHERS, Benchmark, Candidate, benchmark, merge_shards, parse_shard, transfer
from robudget.errors import InputError
from robudget.evaluation.examples import Replay
from robudget.evaluation.specification import Specification
from robudget.evaluation.state import Progress
from robudget.evaluation.verdicts import Verdicts, merge
from robudget.execution import Site
from robudget.models.build import build
from robudget.store import Busy, WorkFolder
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

def needs(argument):
    return argument

NUMBER = 3

def function():
    network = load()
    return lambda x: network(x)

def many():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1000))

class Branching(nn.Module):
    # Looks at values, which stand-ins do not have, and refuses the black images that are counted on instead.
    def __init__(self):
        super().__init__()
        self.body = load()

    def forward(self, x):
        if (x == 0).all() and len(x) == 2:
            raise ValueError("black images are not for me")
        return self.body(x)

def branching():
    return Branching()
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)


SPECIFIED = ("threat", "attacks", "seed", "batch_size", "examples")


def evaluate(source: str = "network.py:load", model: str | None = None, **options: object) -> Benchmark:
    settings = {"threat": THREAT, "images": 40, "batch_size": 20} | options
    specification = Specification(**{name: settings.pop(name) for name in SPECIFIED if name in settings})
    candidate = Candidate.load(source, dataset="digits", model=model, site=SITE)
    return benchmark(candidate, specification, site=SITE, **settings)


def replayed(source: str, examples: Path) -> Replay:
    return transfer(Candidate.load(source, dataset="digits", site=SITE), examples, site=SITE)


def test_a_users_function_is_judged_and_billed() -> None:
    found = evaluate()
    assert len(found.verdicts) == 40
    assert found.folder.parent == Path("evals")
    # a linear layer of 64 × 10: 2 FLOPs per multiply-add, counted for every pass that was made
    forward = sum(v for k, v in found.verdicts.calls.items() if k.endswith("_forward"))
    backward = sum(v for k, v in found.verdicts.calls.items() if k.endswith("_backward"))
    assert found.bill["flops_exact"] == 2 * 640 * (forward + backward)
    assert found.bill["energy"]["how"] in ("measured", "estimated")
    assert found.verdicts.flops == found.bill["flops_exact"]
    # Every attack's own window: together no more than the whole evaluation took, and most of it.
    spent = found.verdicts.spent
    assert all(item.energy_kwh >= 0 and item.energy_how == found.bill["energy"]["how"] for item in spent)
    assert 0 < found.verdicts.energy_kwh <= found.bill["energy"]["kwh"]
    again = Verdicts.load(found.folder)
    assert [(i.flops, i.energy_kwh, i.energy_how) for i in again.spent] == [
        (i.flops, i.energy_kwh, i.energy_how) for i in spent
    ]
    said = (found.folder / "verdict.txt").read_text()
    assert "FLOP counted" in said
    assert f"without PUE: {found.bill['energy']['how']}" in said
    assert json.loads((found.folder / "bill.json").read_text())["flops_exact"] == found.bill["flops_exact"]


def test_shards_merge_to_the_bits_of_the_whole() -> None:
    whole = evaluate().verdicts
    parts = [evaluate(shard=(i, 2)).folder for i in (1, 2)]
    merged, where = merge_shards(parts, None)
    assert list(merged.broken_by) == list(whole.broken_by)
    np.testing.assert_array_equal(merged.frame["worst_margin"], whole.frame["worst_margin"])
    assert merged.robust_accuracy == whole.robust_accuracy
    assert sum(s.images for s in merged.spent) == sum(s.images for s in whole.spent)
    assert where.name == parts[0].name.replace("-1of2", "-merged")
    assert Verdicts.load(where).n == 40
    assert merged.flops == sum(s.flops for s in merged.spent)
    assert merged.energy_kwh is None or merged.energy_kwh > 0


def test_shards_that_do_not_belong_together_are_refused() -> None:
    first, other = evaluate(shard=(1, 2)).verdicts, evaluate(shard=(2, 2), seed=1).verdicts
    with pytest.raises(InputError, match="seed = 0 and 1"):
        merge([first, other])
    with pytest.raises(InputError, match="more than one shard"):
        merge([first, first])
    for text in ("2", "a/b", "1:2"):
        with pytest.raises(InputError, match="shard"):
            parse_shard(text)
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
        ("network.py:needs", "without arguments"),
        ("network.py:NUMBER", "is int"),
        ("network.py:many", "1000 classes apart, and the data have 10"),
        ("resnet18", "timm's 'resnet18' tells 1000 classes apart"),
        ("resnet81", "did you mean 'resnet18'"),
        ("nothing.py:load", "no such file"),
        ("no.such.module:load", "cannot import"),
        ("robustbench:cifar10", "robustbench:DATASET/THREAT/NAME"),
        ("not_a_model", "cannot evaluate 'not_a_model'"),
        ("missing.safetensors", "no such file"),
    ],
)
def test_a_source_that_is_no_classifier_is_one_line(source: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        evaluate(source)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("evals").exists() or not list(Path("evals").iterdir())


def test_attacks_may_be_chosen_with_their_settings() -> None:
    found = evaluate(attacks=["pgd:steps=5,restarts=2,loss=cw", "square:steps=20"], images=8)
    assert [item.attack for item in found.verdicts.spent] == ["clean", "checks", "pgd", "square"]
    assert "pgd:restarts=2,steps=5,loss=cw, square:steps=20" in (found.folder / "verdict.txt").read_text()
    with pytest.raises(InputError, match="did you mean 'steps'"):
        evaluate(attacks=["pgd:step=5"])


class Stop(Exception):
    pass


def stopped_at_square(**options: object) -> Path:
    """The folder of an evaluation that ended when Square began."""

    def stop(now: Progress) -> None:
        if now.attack == "square":
            raise Stop

    with pytest.raises(Stop):
        evaluate(**options, progress=stop)
    (folder,) = Path("evals").iterdir()
    return folder


def test_what_was_begun_goes_on_or_is_forgotten_and_its_energy_is_kept() -> None:
    quick = {"attacks": ["apgd-ce:steps=5", "apgd-dlr:steps=5", "square:steps=50"]}

    folder = stopped_at_square(**quick)
    (before,) = [e for e in WorkFolder(folder / "state").events("energy") if e["window"] == "evaluation"]
    seen: list[str] = []
    found = evaluate(**quick, progress=lambda now: seen.append(now.attack))
    assert set(seen) == {"square"}
    assert found.bill["energy"]["seconds"] > before["seconds"] > 0
    assert found.bill["energy"]["kwh"] > before["kwh"]
    seen.clear()
    evaluate(**quick, progress=lambda now: seen.append(now.attack))
    assert not seen
    again = evaluate(**quick, restart=True, progress=lambda now: seen.append(now.attack))
    assert {"apgd-ce", "apgd-dlr", "square"} == set(seen)
    assert again.verdicts.frame.equals(found.verdicts.frame)
    with pytest.raises(InputError, match=r"batch_size differs.*--restart"):
        evaluate(**quick, batch_size=10)


def test_examples_are_replayed_against_another_classifier() -> None:
    found = evaluate(examples=True, attacks=["apgd-ce:steps=10"], threat=Threat("linf", 0.2))
    fell = int((found.verdicts.clean & ~found.verdicts.robust).sum())
    assert fell > 0
    for where in (found.folder, found.folder / "examples.npz"):
        assert replayed("network.py:load", where).fooled.all()
    other = replayed("network.py:function", found.folder)
    assert f"{fell} of {fell} examples (linf 51/255)" in str(other)
    assert other.to_dict()["transfer"] == 1
    none = evaluate(threat=Threat("linf", 0), examples=True)
    assert str(replayed("network.py:load", none.folder)) == "no examples to show"
    with pytest.raises(InputError, match="cannot read adversarial examples"):
        replayed("network.py:load", Path("nowhere.npz"))


def test_the_examples_of_a_model_that_is_named_are_made_first_and_are_on_the_bill() -> None:
    """`transfer:MODEL` equals `--examples` of that model, and then `transfer:FILE`."""
    asked = {"threat": Threat("linf", 0.2), "images": 100}
    named = evaluate("network.py:function", attacks=["square:steps=2", "transfer:network.py:load"], **asked)
    made = evaluate("network.py:load", attacks=list(ON_OTHERS), examples=True, **asked)
    filed = evaluate("network.py:function", attacks=["square:steps=2", f"transfer:{made.folder}"], **asked)
    assert named.verdicts.broken_by.tolist() == filed.verdicts.broken_by.tolist()
    assert (named.verdicts.broken_by == "transfer").sum() > 3
    inside = named.folder / "examples-network.py-load"
    assert named.verdicts.about["transfer"][0]["file"] == str(inside)
    theirs = named.bill["examples_of"]["network.py:load"]
    assert theirs["flops_exact"] == Verdicts.load(inside).flops > 0
    assert theirs["energy"]["kwh"] > 0
    again = evaluate("network.py:function", attacks=["square:steps=2", "transfer:network.py:load"], **asked)
    assert again.verdicts.frame.equals(named.verdicts.frame)
    with pytest.raises(InputError, match="cannot evaluate 'nothing'"):
        evaluate(attacks=["transfer:nothing"])


def test_a_plain_function_has_no_flops_and_its_shards_merge() -> None:
    parts = [evaluate("network.py:function", shard=(i, 2)) for i in (1, 2)]
    assert all(part.verdicts.flops is None and part.bill["flops_how"] == "unknown" for part in parts)
    merged, _ = merge_shards([part.folder for part in parts], Path("both"))
    assert merged.n == 40
    assert merged.flops is None
    assert merged.frame["broken_by"].tolist() == evaluate().verdicts.frame["broken_by"].tolist()


def test_a_module_that_cannot_be_counted_keeps_its_verdicts() -> None:
    with pytest.warns(UserWarning, match="FLOPs unknown"):
        found = evaluate("network.py:branching", images=10, attacks=["square:steps=20"])
    assert found.verdicts.n == 10
    assert found.verdicts.flops is None


def test_robustbench_without_its_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    monkeypatch.setitem(sys.modules, "robustbench.utils", None)
    with pytest.raises(InputError, match=r"robudget\[robustbench\]"):
        evaluate("robustbench:cifar10/Linf/Standard")


def test_robustbench_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_model(name: str, dataset: str, threat_model: str) -> nn.Module:
        asked.append((name, dataset, threat_model))
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    package, utils = ModuleType("robustbench"), ModuleType("robustbench.utils")
    utils.load_model = load_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    found = evaluate("robustbench:cifar10/Linf/Standard", images=4)
    assert asked == [("Standard", "cifar10", "Linf")]
    assert found.verdicts.n == 4
    assert found.folder.name.startswith("Standard-digits-linf-0.02-standard-0-n4")


def test_an_evaluation_of_the_version_before_goes_on_with_the_energy_in_its_bill() -> None:
    """It noted what it had used in bill.json, beside the state that it resumed from, and kept no log."""
    quick = {"attacks": ["apgd-ce:steps=5", "square:steps=50"]}

    folder = stopped_at_square(**quick)
    (folder / "state" / "log.jsonl").unlink()
    part = {"name": "cpu", "kwh": 2.0, "how": "estimated", "method": "m", "uncertainty": 0.5, "raw": {"cpu_seconds": 7}}
    energy = {"kwh": 2.0, "seconds": 100.0, "how": "estimated", "parts": [part], "notes": [], "shared": None}
    (folder / "bill.json").write_text(json.dumps({"energy": energy, "seconds": 100.0}))
    bill = evaluate(**quick).bill
    assert 2.0 < bill["energy"]["kwh"] < 2.1
    assert 100 < bill["seconds"] < 160
    assert 2.0 < evaluate(**quick).bill["energy"]["kwh"] < 2.1  # counted once
    assert evaluate(**quick, restart=True).bill["energy"]["kwh"] < 0.1


def test_two_evaluations_never_share_a_folder() -> None:
    quick = {"attacks": ["square:steps=20"], "out": Path("mine")}

    def again(now: Progress) -> None:
        with pytest.raises(Busy, match="another process"):
            evaluate(**quick)
        raise Stop

    with pytest.raises(Stop):
        evaluate(**quick, progress=again)
    assert evaluate(**quick).verdicts.n == 40
