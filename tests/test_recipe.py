import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robudget.config import named, parse_overrides
from robudget.datasets import PUBLISHED
from robudget.errors import InputError
from robudget.execution import Site
from robudget.forecast.forecast import forecast
from robudget.forecast.passes import training_passes
from robudget.losses import passes_per_image
from robudget.recipe import Recipe, keys
from robudget.training.losses import smooth
from robudget.training.optimisation import peak_lr
from robudget.training.validation import validation_adversary

ID_OF_DEFAULT = "67d6291b3014"  # changing it orphans every run: bump SCHEMA instead


def test_the_default_id_has_not_changed() -> None:
    assert Recipe().id == ID_OF_DEFAULT


def test_a_warm_up_of_the_radius_is_part_of_the_training_alone() -> None:
    warm = Recipe().with_({"threat.warmup_epochs": 10})
    assert warm.id != Recipe().id
    assert warm.with_({"threat.warmup_epochs": 0}).id == Recipe().id
    assert (warm.evaluation_id, warm.threat.threat()) == (Recipe().evaluation_id, Recipe().threat.threat())
    assert validation_adversary(warm) == validation_adversary(Recipe())
    assert training_passes(warm, PUBLISHED["cifar10"]) == training_passes(Recipe(), PUBLISHED["cifar10"])


def test_the_id_does_not_depend_on_process_hash_seed_or_key_order() -> None:
    code = (
        "from robudget.recipe import Recipe;"
        "print(Recipe.from_dict({'craft': {'steps': 5, 'step_size': '2/255'}, 'seed': 3}).id,"
        "Recipe.from_dict({'seed': 3, 'craft': {'step_size': 2/255, 'steps': 5}}).id)"
    )
    seen = set()
    for seed in ("0", "1", "random"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        seen.update(out.stdout.split())
    assert len(seen) == 1


def test_a_default_written_out_changes_no_id_and_any_other_value_does() -> None:
    assert Recipe.from_dict(Recipe().to_dict()).id == Recipe().id
    ids = {Recipe().id}
    for change in (
        {"seed": 1},
        {"craft.steps": 9},
        {"ema.decay": 0.995},
        {"threat.eps": "4/255"},
        {"data.flip": False},
    ):
        ids.add(Recipe().with_(change).id)
    assert len(ids) == 6


def test_training_and_evaluation_hash_apart() -> None:
    other = Recipe().with_({"evaluation.images": 100})
    assert other.id == Recipe().id
    assert other.evaluation_id != Recipe().evaluation_id
    # the evaluation's threat is resolved before it is hashed: said or inherited, it is the same evaluation
    said = Recipe().with_({"evaluation.threat": {"norm": "linf", "eps": "8/255"}})
    assert said.evaluation_id == Recipe().evaluation_id


@pytest.mark.parametrize("name", named("recipes"))
def test_named_recipes_round_trip_through_yaml(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml(), "utf-8")
    again = Recipe.load(path)
    assert again == recipe
    assert (again.id, again.evaluation_id) == (recipe.id, recipe.evaluation_id)
    json.dumps(recipe.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "loss", "lr", "epochs", "passes"),
    [
        ("fast-pgi", "fgsm-pgi", 0.1, 110, 7),
        ("wang2023", "trades", 0.2, 400, 27),
        ("gowal2021", "trades", 0.4, 400, 27),
    ],
)
def test_published_recipes_are_as_published(name: str, loss: str, lr: float, epochs: int, passes: int) -> None:
    """`passes`: what an image of a step costs in forward passes, a backward pass to the weights being two."""
    recipe = Recipe.load(name)
    assert (recipe.data.name, recipe.loss, recipe.epochs, recipe.epoch_images) == ("cifar10", loss, epochs, 50_000)
    assert recipe.threat == Recipe().threat  # L∞, 8/255
    assert peak_lr(recipe.optim, recipe.batch_size) == pytest.approx(lr)
    assert recipe.synthetic.share == (0.7 if loss == "trades" else 0)
    target = smooth(torch.tensor([3]), 10, recipe.label_smoothing)
    assert target[0, 3] == pytest.approx(0.91 if loss == "trades" else 0.6)
    per = passes_per_image(loss, recipe.craft.steps)
    assert per.craft_forward + per.craft_backward + per.update_forward + 2 * per.update_backward == passes
    cost = forecast(recipe, device="h100")
    images = epochs * (50_000 // recipe.batch_size) * recipe.batch_size
    assert 0.97 < cost.train_flops_exact / (passes * cost.forward_flops * images) < 1.25  # the rest is validation


def test_the_recipe_of_bartoldson_is_as_published() -> None:
    """10,000 epochs of 25 batches of 2,048; only generated images for 6,000 of them, then an eighth of real ones."""
    recipe = Recipe.load("bartoldson2024")
    plan = training_passes(recipe, PUBLISHED["cifar10"])
    assert (plan.steps, plan.images) == (250_000, 512_000_000)
    assert recipe.synthetic.phases == ((0, 1), (6000, 0.875))
    assert recipe.to_row()["synthetic_fraction"] == pytest.approx(0.6 + 0.4 * 0.875)
    assert (recipe.model.name, recipe.loss, recipe.beta, recipe.craft.step_size) == ("wrn-94-16", "trades", 5, 2 / 255)
    assert peak_lr(recipe.optim, recipe.batch_size) == 0.1
    smaller = {"model.name": "wrn-82-8", "epochs": 6820, "synthetic.fraction": 0.875, "synthetic.later": []}
    assert recipe.with_(smaller).to_row()["synthetic_fraction"] == 0.875
    assert Recipe.from_yaml(recipe.to_yaml()).id == recipe.id


def test_a_schedule_of_fractions_is_part_of_the_id() -> None:
    plain = Recipe().with_({"synthetic.source": "file"})
    assert plain.with_({"synthetic.later": []}).id == plain.id
    assert plain.with_({"synthetic.later": [[50, "7/8"]]}).id not in (
        plain.id,
        plain.with_({"synthetic.fraction": 1}).id,
    )


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Recipe().craft.steps = 3  # type: ignore[misc]


def test_recipes_share_the_parts_that_they_have_in_common() -> None:
    recipe = Recipe().with_({"seed": 1, "craft.steps": 5})
    other = recipe.with_({"seed": 2, "optim.lr": 0.3})
    assert other.craft is recipe.craft
    assert other.evaluation is recipe.evaluation
    assert (recipe.optim.lr, other.optim.lr, other.seed) == (Recipe().optim.lr, 0.3, 2)
    assert Recipe.from_dict(other.to_dict()) == other


def test_overrides_read_yaml_and_fractions() -> None:
    changes = parse_overrides(
        ["threat.eps=8/255", "ema.decay=0.995", "data.amount=null", "optim.lr=1e-2", "loss=trades"]
    )
    recipe = Recipe.load("digits", changes)
    assert recipe.threat.eps == 8 / 255
    assert recipe.ema.decay == 0.995
    assert recipe.data.amount is None
    assert recipe.optim.lr == 0.01
    assert recipe.loss == "trades"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"loss": "att"}, "did you mean 'at'"),
        ({"craft": {"stpes": 3}}, "did you mean 'craft.steps'"),
        ({"steps": 3}, "did you mean 'craft.steps'"),
        ({"craft": {"steps": 0}}, "craft.steps = 0 with loss = 'at'"),
        ({"loss": "fgsm-pgi", "craft": {"steps": 2}}, "craft.steps = 2 with loss = 'fgsm-pgi': it takes 1 step"),
        (
            {"loss": "fgsm-pgi", "craft": {"steps": 1}, "data": {"cutmix": True}},
            "data.cutmix = True with loss = 'fgsm-pgi', which remembers a perturbation of every real image",
        ),
        (
            {"loss": "fgsm-pgi", "craft": {"steps": 1}, "synthetic": {"source": "mixture"}},
            "synthetic.source = mixture with loss = 'fgsm-pgi'",
        ),
        (
            {"threat": {"warmup_epochs": 5}, "loss": "standard"},
            "threat.warmup_epochs = 5 with loss = 'standard', which",
        ),
        (
            {"threat": {"warmup_epochs": 5}, "loss": "fgsm-pgi", "craft": {"steps": 1}},
            "threat.warmup_epochs = 5 with loss = 'fgsm-pgi', whose perturbations outlive a step",
        ),
        (
            {"loss": "at", "craft": {"method": "n-fgsm", "steps": 1}},
            "craft.method = n-fgsm with loss = 'at' is loss=n-fgsm",
        ),
        ({"loss": "trades", "craft": {"method": "n-fgsm"}}, "craft.steps = 10 with craft.method = n-fgsm (allowed: 1)"),
        (
            {"loss": "trades", "craft": {"objective": "kl"}},
            "craft.objective = kl with loss = 'trades', whose own it is",
        ),
        (
            {"loss": "free-at", "craft": {"objective": "kl"}},
            "craft.objective = kl with loss = 'free-at', which says how",
        ),
        ({"loss": "standard", "craft": {"grad_align": 0.2}}, "craft.grad_align = 0.2 with loss = 'standard'"),
        ({"threat": {"norm": "l2"}, "craft": {"grad_align": 0.2}}, "craft.grad_align = 0.2 with threat.norm = l2"),
        ({"optim": {"decay_epochs": 5}}, "optim.decay_epochs = 5 with optim.schedule = cosine"),
        ({"optim": {"schedule": "trapezoid"}}, "optim.decay_epochs = null with optim.schedule = trapezoid"),
        ({"optim": {"schedule": "trapezoid", "decay_epochs": 200}}, "optim.decay_epochs = 200 (allowed: at most 100"),
        ({"ema": {"equal_after": 2, "decay": 0.9}}, "ema.decay = 0.9 with ema.equal_after = 2 (allowed: one"),
        ({"ema": {"equal_after": 100}}, "ema.equal_after = 100 leaves nothing of epochs = 100"),
        ({"awp": {"gamma": 0.01}, "loss": "grad-norm"}, "awp.gamma = 0.01 with a penalty on gradients"),
        ({"threat": {"warmup_epochs": 5}, "epochs": 5}, "threat.warmup_epochs = 5 leaves nothing of epochs = 5"),
        ({"evaluation": {"threat": {"warmup_epochs": 5}}}, "unknown key 'evaluation.threat.warmup_epochs'"),
        ({"craft": {"steps": "many"}}, "craft.steps = 'many'"),
        ({"threat": {"eps": 2}}, "outside (0, 1]"),
        ({"threat": {"eps": 0}}, "outside (0, 1]"),
        ({"threat": {"eps": "x"}}, "not a number: 'x'"),
        ({"model": "wrn"}, "model = 'wrn' must hold keys"),
        ({"model": {"activation": "rel"}}, "did you mean 'relu'"),
        ({"synthetic": {"fraction": 1.5}}, "synthetic.fraction = 1.5"),
        ({"synthetic": {"later": [[50, 2]]}}, "synthetic.later"),
        ({"synthetic": {"later": [[100, 0.5]]}}, "synthetic.later has a fraction from epoch 100 on (allowed: epochs"),
        ({"synthetic": {"later": [[9, 0.5], [9, 0.7]]}}, "synthetic.later has a fraction from epoch 9 on"),
        ({"schema": 99}, "another version"),
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": 1.5}, "epochs = 1.5"),
    ],
)
def test_a_bad_field_is_one_line_with_the_thing_its_value_and_what_is_allowed(data: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.from_dict(data)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message


def test_standard_training_needs_no_steps() -> None:
    assert Recipe.from_dict({"loss": "standard", "craft": {"steps": 0}}).slug == "cifar10-wrn-28-10-standard"


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just text"])
def test_yaml_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"mapping|not YAML"):
        Recipe.from_yaml(text)


def test_unknown_and_missing_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'digits'"):
        Recipe.load("digit")
    with pytest.raises(InputError, match="No such file"):
        Recipe.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("item", ["steps", "=3", "a=[", ""])
def test_an_override_that_is_no_assignment_is_refused(item: str) -> None:
    with pytest.raises(InputError, match="override"):
        parse_overrides([item])


def test_where_a_run_happens_is_not_in_the_recipe() -> None:
    site, rest = Site.take({"data.root": "/somewhere", "threads": 1, "craft.steps": 5})
    assert site == Site(data_root="/somewhere", threads=1)
    assert rest == {"craft.steps": 5}
    assert Site.take({"data.root": "~/cifar10"})[0].data_root == os.path.expanduser("~/cifar10")
    assert not set(keys()) & {"data.root", "device", "threads"}
    with pytest.raises(InputError, match=r"did you mean 'data\.root'"):
        Site.take({"data.rot": "x"})
