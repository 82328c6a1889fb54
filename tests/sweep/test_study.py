from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from robudget.config import named
from robudget.data import load
from robudget.datasets import sizes_of
from robudget.errors import InputError
from robudget.forecast.forecast import image_flops, training_flops
from robudget.meter.flops import of_recipe, totals, training_calls
from robudget.models import build
from robudget.sweep.study import Study, sizes_in
from robudget.training import Trainer


def test_the_paper_study_is_its_320_recipes() -> None:
    study = Study.load("paper-320")
    assert len(study.recipes) == 320
    assert len({recipe.slug for recipe in study.recipes}) == 320, "a reader of the leaderboard can tell them apart"
    assert {r.craft.steps for r in study.recipes} == {1, 2, 5, 7, 10}
    assert {r.loss for r in study.recipes} == {"at", "trades"}
    assert all((r.epochs == 400) == (r.ema.decay == 0.995) == r.data.cutmix for r in study.recipes)
    assert sum(r.synthetic.share == 0.7 for r in study.recipes) == 160


@pytest.mark.parametrize(
    "name", [f"{name}:{size}" if size else name for name in named("studies") for size in sizes_in(name) or [""]]
)
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
        (
            {"axes": {"a": {"x": {"seed": 1}}, "b": {"y": {"seed": 2}}}},
            "a: x sets seed = 1 and b: y sets 2 .allowed: one axis for a key",
        ),
        ({"axes": {str(i): {str(j): {"seed": j} for j in range(11)} for i in range(6)}}, "1,771,561 combinations"),
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


EQUAL = {
    "question": "which size is best at equal compute?",
    "base": {"model": {"name": "wrn-10-1"}, "data": {"name": "digits"}, "epochs": 2, "batch_size": 32,
             "validation": {"steps": 2, "images": 64}},
    "axes": {
        "size": {"small": {"model.base": 2}, "large": {"model.base": 6}},
        "training": {"standard": {"loss": "standard"}, "at": {"craft.steps": 3}, "trades": {"loss": "trades"}},
    },
    "flops": "4e10",
}  # fmt: skip


def test_recipes_of_equal_flops_take_equal_flops() -> None:
    """To half a step an epoch, by the forecast; and one of them by what its training counted."""
    sizes = sizes_of("digits")
    recipes = Study.from_dict(EQUAL, name="equal").recipes
    assert len(recipes) == 6
    for recipe in recipes:
        assert recipe.epoch_images is not None
        longer = recipe.with_({"epoch_images": recipe.epoch_images + recipe.batch_size})
        step = training_flops(longer, sizes) - training_flops(recipe, sizes)
        assert abs(training_flops(recipe, sizes) - 4e10) <= 0.5 * step
    small, large = (r.epoch_images for r in recipes if r.loss == "trades")
    assert small > 4 * large
    recipe = next(r for r in recipes if r.loss == "trades" and r.model.base == 6)
    last = list(Trainer(recipe, load("digits")))[-1]
    calls = training_calls(recipe, last.calls, last.steps)
    counted = sum(totals(of_recipe(recipe, 10, (1, 8, 8)), calls).values())
    assert counted == pytest.approx(4e10, rel=0.05)  # validation attacks only what the model gets right


@pytest.mark.parametrize(
    ("flops", "message"),
    [("1e3", "too little for 2 epochs"), ("much", "allowed: a positive number"), (-1, "allowed: a positive number"),
     (True, "allowed: a positive number")],
)  # fmt: skip
def test_flops_that_no_epoch_meets(flops: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Study.from_dict(EQUAL | {"flops": flops}, name="equal")


FAMILIES = {
    "question": "which architecture, at one size?",
    "base": {"data": {"name": "cifar10"}, "model": {"name": "wrn-16-1"}, "loss": "at"},
    "axes": {
        "architecture": {
            "wrn": {},
            "convnext": {"model.name": "convnext_atto"},
            "vit": {"model.name": "vit_tiny_patch16_224", "model.patch": 4},
            "preact": {"model.name": "preact-resnet-18"},
            "xcit": {"model.name": "xcit_nano_12_p8_224"},
        }
    },
    "model_flops": "1e8",
}


def test_architectures_of_equal_flops() -> None:
    """By torch's own counter, on the models that are built."""
    recipes = Study.from_dict(FAMILIES, name="families").recipes
    assert len(recipes) == len(FAMILIES["axes"]["architecture"])
    for recipe in recipes:
        part = recipe.model
        with torch.device("meta"):
            model = build(part.name, classes=10, image_size=32, base=part.base, patch=part.patch)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, 3, 32, 32, device="meta"))
        assert 0.8e8 <= counter.get_total_flops() <= 1.25e8, part
        exact = of_recipe(recipe, 10, (3, 32, 32)).forward
        more = 2e-3 if part.name.startswith("xcit") else 0  # `forward_of` says why
        assert image_flops(recipe, sizes_of("cifar10")) == pytest.approx(exact, rel=more, abs=0), part


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_flops": "1e3"}, r"families: wrn: model_flops = 1e\+03, but wrn-16-1 takes .* at model.base = 1"),
        ({"model_flops": 1e30}, "which is the nearest"),
        ({"model_flops": "big"}, "model_flops = 'big' .allowed: a positive number"),
        ({"axes": {"a": {"resnet": {"model.name": "resnet18"}}}}, "whose width can't be changed"),
    ],
)
def test_a_size_that_no_width_meets(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Study.from_dict(FAMILIES | changes, name="families", where="families")


def test_an_alternative_sets_a_budget_for_itself() -> None:
    sizes = {"small": {"model_flops": 1e5}, "large": {"model_flops": 1e6, "flops": 2e10}}
    study = Study.from_dict(EQUAL | {"axes": {"size": sizes}}, name="equal")
    small, large = (image_flops(recipe, sizes_of("digits")) for recipe in study.recipes)
    assert [0.8e5 <= small <= 1.25e5, 0.8e6 <= large <= 1.25e6] == [True, True]
    spent = [training_flops(recipe, sizes_of("digits")) for recipe in study.recipes]
    assert spent == pytest.approx([4e10, 2e10], rel=0.05)
    with pytest.raises(InputError, match=r"equal: tiny: model_flops = 10, but wrn-10-1 takes .*, which is the nearest"):
        Study.from_dict(EQUAL | {"axes": {"size": {"tiny": {"model_flops": 10}}}}, name="equal", where="equal")
    assert Study.from_dict(EQUAL | {"flops": None}, name="equal").recipes[0].epoch_images is None
