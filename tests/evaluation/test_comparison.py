"""Verdicts of others beside ours: what is read, what the numbers are, and which are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from robudget.errors import InputError
from robudget.evaluation.comparison import compare, read
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.spent import Spent
from robudget.evaluation.verdicts import Verdicts
from robudget.threat import Threat

THREAT = Threat("linf", 8 / 255)


def verdicts(broken_by: list[str], threat: Threat = THREAT, **about: object) -> Verdicts:
    n = len(broken_by)
    frame = pd.DataFrame(
        {
            "index": np.arange(n),
            "label": np.arange(n) % 10,
            "broken_by": np.array(broken_by, dtype=object),
            **{name: np.zeros(n, dtype=np.int64) for name in ("when", "restart", "target")},
            **{name: np.full(n, 0.25, dtype=np.float32) for name in ("clean_margin", "worst_margin")},
        }
    )
    return Verdicts(
        frame,
        threat,
        [Spent("clean", seconds=1.0)],
        [],
        {"dataset": "cifar10", "images": "aaa", "version": "standard"} | about,
    )


OURS = ["clean"] * 2 + ["apgd-ce"] * 3 + ["robust"] * 5
THEIRS = ["clean"] * 2 + ["apgd-ce", "square", "robust"] + ["fab-t"] * 3 + ["robust"] * 2


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def state(flags: object, run: list[str] | None = None) -> dict[str, object]:
    """As `EvaluationState.to_disk` writes it: the set of attacks to run becomes a string."""
    return {
        "_attacks_to_run": "{'apgd-ce', 'square', 'fab-t', 'apgd-t'}",
        "path": "state.json",
        "_run_attacks": ["square", "apgd-ce", "apgd-t", "fab-t"] if run is None else run,
        "_robust_flags": flags,
        "_last_saved": "2026-01-01 00:00:00.1",
        "_SAVE_TIMEOUT": 60,
        "_clean_accuracy": 0.8,
    }


FLAGS = [name == "robust" for name in THEIRS]


def test_the_numbers_are_mcnemars(tmp_path):
    found = compare(verdicts(OURS), write(tmp_path / "a.json", {"verdicts": THEIRS, "norm": "Linf", "eps": "8/255"}))
    assert (found.n, found.agree, found.only_ours, found.only_theirs) == (10, 6, 3, 1)
    assert found.difference == pytest.approx(0.2)
    assert found.p_value == pytest.approx(binomtest(3, 4).pvalue) == pytest.approx(2 * 5 / 16)
    share = binomtest(3, 4).proportion_ci(method="exact")
    assert found.interval == pytest.approx(((2 * share.low - 1) * 0.4, (2 * share.high - 1) * 0.4))
    assert found.table == {
        ("clean", "clean"): 2,
        ("apgd-ce", "apgd-ce"): 1,
        ("apgd-ce", "square"): 1,
        ("apgd-ce", "robust"): 1,
        ("robust", "fab-t"): 3,
        ("robust", "robust"): 2,
    }
    assert found.differ["index"].tolist() == [4, 5, 6, 7]
    text = str(found)
    assert "agree on 6 of 10 images (60.00%); 3 are robust by us alone, 1 by them alone" in text
    assert "row 4: apgd-ce by us, robust by them; worst margin 0.25" in text
    data = found.to_dict()
    assert json.loads(json.dumps(data))["agreement"] == 0.6
    assert {"ours": "robust", "theirs": "fab-t", "images": 3} in data["who_broke_what"]


def test_where_none_differs_the_interval_says_what_that_shows(tmp_path):
    found = compare(verdicts(OURS), write(tmp_path / "a.json", {"verdicts": OURS}))
    assert found.p_value == 1
    assert found.interval[1] == -found.interval[0] == pytest.approx(1 - 0.025 ** (1 / 10))
    assert "No image differs" in str(found)
    assert "their threat is not in the file" in str(found)


def test_every_form_gives_the_same_comparison(tmp_path):
    folder = verdicts(THEIRS).save(tmp_path / "theirs")
    order = [3, 1, 2, 0, 9, 8, 7, 6, 5, 4]
    rows = "".join(f"{i},{i % 10},{FLAGS[i]}\n" for i in order)
    files = [
        folder,
        write(tmp_path / "state.json", state(FLAGS)),
        write(tmp_path / "names.json", {"verdicts": THEIRS}),
        write(tmp_path / "plain.csv", "".join(f"{int(flag)}\n" for flag in FLAGS)),
        write(tmp_path / "indexed.csv", "index,label,robust\n" + rows),
        write(tmp_path / "names.csv", "broken_by\n" + "".join(f"{name}\n" for name in THEIRS)),
    ]
    for file in files:
        found = compare(verdicts(OURS), file)
        assert (found.agree, found.only_ours, found.only_theirs) == (6, 3, 1), file
        assert found.differ["index"].tolist() == [4, 5, 6, 7]
    assert read(files[1]).clean_accuracy == 0.8
    assert "not finished: fab-t, square to come" in read(write(files[1], state(FLAGS, ["apgd-ce", "apgd-t"]))).note


ENTRY = {"dataset": "cifar10", "eps": "8/255", "clean_acc": "93.24", "autoattack_acc": "72.08", "unreliable": False}


def test_an_entry_of_robustbench_holds_accuracies_only(tmp_path):
    folder = tmp_path / "model_info" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    found = compare(verdicts(OURS), write(folder / "a.json", ENTRY))
    assert found.difference == pytest.approx(0.5 - 0.7208)
    assert found.p_value == pytest.approx(binomtest(5, 10, 0.7208).pvalue)
    assert found.to_dict()["per_image"] is False
    assert "no verdicts per image" in str(found)
    external = compare(verdicts(OURS), write(folder / "a.json", ENTRY | {"external": "70.5", "unreliable": True}))
    assert external.difference == pytest.approx(0.5 - 0.705)
    assert "potentially unreliable" in str(external)
    with pytest.raises(InputError, match="is of the threat linf"):
        compare(verdicts(OURS, Threat("l2", 0.5)), folder / "a.json")
    with pytest.raises(InputError, match="is of cifar10, and ours of digits"):
        compare(verdicts(OURS, dataset="digits"), folder / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", {"verdicts": THEIRS[:9]}, "has verdicts of 9 images, and ours are of 10"),
        ("a.json", {"verdicts": THEIRS, "norm": "L2", "eps": "0.5"}, "threat l2 0.5, and ours of linf 8/255"),
        ("a.json", {"verdicts": THEIRS, "norm": "Linf", "eps": "4/255"}, "threat linf 0.0156863, and ours"),
        ("a.json", state(None), "without verdicts yet"),
        ("a.json", {"accuracy": 3}, "holds no verdicts"),
        ("a.json", "{", "cannot read verdicts"),
        ("a.csv", "yes\nno\n", "columns yes"),
        ("a.csv", "robust\ntrue\nperhaps\n", "robust = 'perhaps' in row 2"),
        ("a.csv", "index,robust\n" + "".join(f"{i},1\n" for i in range(1, 11)), "no verdict of row 0"),
        ("a.csv", "index,label,robust\n" + "".join(f"{i},3,1\n" for i in range(10)), "row 0 has label 3 there and 0"),
        ("a.csv", "index,robust\n" + "".join(f"{i}.5,1\n" for i in range(10)), "a value of index"),
        ("none.json", None, "cannot read verdicts"),
    ],
)
def test_what_is_of_other_images_or_another_threat_is_one_line(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(InputError, match=said) as caught:
        compare(verdicts(OURS), path)
    assert "\n" not in str(caught.value)


def test_evaluations_of_other_images_are_known_by_their_fingerprint(tmp_path):
    folder = verdicts(THEIRS, images="bbb").save(tmp_path / "theirs")
    with pytest.raises(InputError, match="fingerprint is bbb, ours aaa"):
        compare(verdicts(OURS), folder)
    ours = verdicts(OURS)
    compare(replace(ours, about={**ours.about, "shards": 2}), folder)


def test_the_state_that_the_authors_code_saves_is_read(tmp_path, images):
    """Their own class writes the file, on a model whose verdicts are then the same."""
    autoattack = pytest.importorskip("pyautoattack")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)).eval()
    x = images[0][:20]
    y = model(x).argmax(1)
    theirs = autoattack.AutoAttack(
        model, attacks=["apgd-ce"], version="custom", norm="Linf", eps=0.02, seed=0, device="cpu"
    )
    theirs.run_standard_evaluation(x, y, batch_size=20, state_path=tmp_path / "state.json")
    ours = evaluate(model, x, y, Threat("linf", 0.02), attacks=["apgd-ce"], checks=False)
    found = compare(ours, tmp_path / "state.json")
    assert found.agree == 20
    assert 0 < ours.robust.sum() < 20
    assert found.theirs.note == ""
    assert found.theirs.clean_accuracy == 1
