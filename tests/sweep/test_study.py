from pathlib import Path

import pytest

from robudget.config import named
from robudget.errors import InputError
from robudget.sweep.study import Study


def test_the_paper_study_is_its_320_recipes() -> None:
    study = Study.load("paper-320")
    assert len(study.recipes) == 320
    assert len({recipe.slug for recipe in study.recipes}) == 320, "a reader of the leaderboard can tell them apart"
    assert {r.craft.steps for r in study.recipes} == {1, 2, 5, 7, 10}
    assert {r.loss for r in study.recipes} == {"at", "trades"}
    assert all((r.epochs == 400) == (r.ema.decay == 0.995) == r.data.cutmix for r in study.recipes)
    assert sum(r.synthetic.share == 0.7 for r in study.recipes) == 160


@pytest.mark.parametrize("name", named("studies"))
def test_named_studies_expand_to_distinct_recipes(name: str) -> None:
    study = Study.load(name)
    assert study.question
    assert len({r.id for r in study.recipes}) == len(study.recipes) >= 2


def test_alternatives_that_amount_to_the_same_recipe_run_once() -> None:
    study = Study.from_dict({"axes": {"a": {"x": {"seed": 1}, "y": {"seed": 1}}}}, name="t")
    assert len(study.recipes) == 1


def test_overrides_reach_every_recipe() -> None:
    study = Study.load("paper-320", {"evaluation.images": 100})
    assert {r.evaluation.images for r in study.recipes} == {100}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"axis": {}}, "did you mean 'axes'"),
        ({"axes": {"size": ["small"]}}, "named alternatives"),
        (
            {"axes": {"size": {"small": {"craft.stpes": 1}}}},
            r"small: unknown key 'craft\.stpes'; did you mean 'craft\.steps'",
        ),
        ({"base": "digit"}, "did you mean 'digits'"),
    ],
)
def test_a_bad_study_is_one_line(data: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Study.from_dict(data, name="t")


def test_a_study_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'paper-320'"):
        Study.load("paper320")
    with pytest.raises(InputError, match="No such file"):
        Study.load(tmp_path / "none.yaml")
