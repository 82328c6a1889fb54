import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import robudget as rb
from robudget.environment import resolve_device
from robudget.errors import InputError
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.runner import Progress
from robudget.store import RunFolder


@pytest.fixture(scope="module")
def finished(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("runs")
    return rb.run(tiny, store=store, site=Site(device="cpu", threads=1)).folder.path


def test_a_run_leaves_the_folder_that_the_design_names(finished: Path, tiny: Recipe) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names >= {"recipe.yaml", "environment.json", "log.jsonl", "last.pt", "best.safetensors", "evals", "run.json"}
    evaluation = finished / "evals" / tiny.evaluation_id
    assert {p.name for p in evaluation.iterdir()} >= {"verdicts.parquet", "result.json"}
    assert Recipe.load(finished / "recipe.yaml") == tiny


def test_the_record_adds_up(finished: Path, tiny: Recipe) -> None:
    record = json.loads((finished / "run.json").read_text())
    for stage in ("training", "evaluation"):
        assert sum(record[stage]["flops_by_phase"].values()) == record[stage]["flops_exact"] > 0
        assert record[stage]["seconds"] > 0
        assert record[stage]["energy"]["how"] in ("measured", "estimated")
        assert record[stage]["energy"]["kwh"] > 0
    calls = record["training"]["calls"]
    images = 2 * 256
    assert record["training"]["images_seen"] == images
    assert calls["craft_forward"] == calls["craft_backward"] == tiny.craft.steps * images
    assert calls["update_forward"] == calls["update_backward"] == images
    # K = 1, adversarial training, by the paper's convention: 3(K+2)F per image
    forward = record["model"]["flops_per_image"]["forward"]
    assert record["training"]["flops_paper"] == 9 * forward * images
    assert record["evaluation"]["n"] == 12
    assert record["dataset"]["validation"] == 20
    assert record["training"]["collapsed_at"] == []
    assert record["training"]["stopped"] is None
    assert record["environment"]["processes"] == 1
    assert record["environment"].keys() >= {"precision", "threads", "tf32", "deterministic"}


def test_the_table_row_is_the_record(finished: Path) -> None:
    row = rb.load_runs(finished).iloc[0]
    record = json.loads((finished / "run.json").read_text())
    assert row.aa_acc == pytest.approx(100 * record["evaluation"]["robust"])
    assert row.aa_acc_low <= row.aa_acc <= row.aa_acc_high
    assert row.train_flops_exact == record["training"]["flops_exact"]
    assert row.parameters == sum(p.numel() for p in load_file(finished / "best.safetensors").values()) - _buffers(
        finished
    )
    assert math.isnan(row.beta)
    assert row.train_energy_how == record["training"]["energy"]["how"]


def _buffers(folder: Path) -> int:
    weights = load_file(folder / "best.safetensors")
    buffers = ("running_mean", "running_var", "num_batches_tracked", "mean", "std")
    return sum(t.numel() for name, t in weights.items() if name.rpartition(".")[2] in buffers)


def test_the_verdicts_are_the_models_own(finished: Path, tiny: Recipe) -> None:
    result = rb.run(tiny, store=finished.parent)
    again = rb.Verdicts.load(finished / "evals" / tiny.evaluation_id)
    assert again.robust_accuracy == result.record["evaluation"]["robust"]
    assert again.clean_accuracy == result.record["evaluation"]["clean"]
    assert len(again) == 12
    # Each attack has its own FLOPs and energy; together they are the evaluation's.
    judged = result.record["evaluation"]
    assert again.flops == judged["flops_exact"]
    assert again.energy_kwh is not None
    assert 0 < again.energy_kwh <= judged["energy"]["kwh"]


def test_a_finished_run_is_only_read_again(finished: Path, tiny: Recipe) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    said: list[Progress] = []
    rb.run(tiny, store=finished.parent, progress=said.append)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before
    assert not said


def test_the_same_recipe_and_seed_give_the_same_bits(finished: Path, tiny: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(123)  # the global generator must not matter
    other = rb.run(tiny, store=tmp_path, site=Site(device="cpu", threads=1))
    mine, theirs = load_file(finished / "best.safetensors"), load_file(other.folder.best)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    here, there = rb.Verdicts.load(finished / "evals" / tiny.evaluation_id), other.verdicts
    assert list(here.broken_by) == list(there.broken_by)


def test_another_evaluation_needs_no_training(finished: Path, tiny: Recipe) -> None:
    said: list[Progress] = []
    (finished / "run.json").rename(finished / "run.json.old")
    try:
        rb.run(tiny, store=finished.parent, site=Site(device="cpu", threads=1), progress=said.append)
    finally:
        (finished / "run.json.old").unlink()
    assert {p.phase for p in said} == {"train"}  # where it stood; nothing was trained or attacked again
    events = [json.loads(line)["event"] for line in (finished / "log.jsonl").read_text().splitlines()]
    assert events.count("epoch") == 2


def test_another_evaluation_of_a_trained_run_is_made(finished: Path, tiny: Recipe) -> None:
    """It goes from the kept weights, under any number of threads, and the training's record stays as it is."""
    before, last = json.loads((finished / "run.json").read_text()), (finished / "last.pt").stat().st_mtime_ns
    other = tiny.with_({"evaluation.images": 5})
    assert other.id == tiny.id
    try:
        result = rb.run(other, store=finished.parent, site=Site(device="cpu"))
        assert result.folder.path == finished
        assert result.record["evaluation"]["n"] == 5
        assert result.record["evaluation"]["robust"] == result.verdicts.robust_accuracy
        energy = result.record["evaluation"]["energy"]["kwh"]
        assert 0 < energy != before["evaluation"]["energy"]["kwh"]
        assert result.record["training"] == before["training"]
        assert (finished / "last.pt").stat().st_mtime_ns == last
        assert RunFolder(finished).recipe == other
    finally:  # and back: both evaluations are there, so nothing is attacked again
        again = rb.run(tiny, store=finished.parent, site=Site(device="cpu", threads=1))
    assert again.record["evaluation"] == before["evaluation"]


def test_how_it_is_computed_changes_no_bit_but_is_billed(finished: Path, tiny: Recipe, tmp_path: Path) -> None:
    site = Site(device="cpu", threads=1, checkpointing=True, deterministic=True, cpu_watts=50.0)
    other = rb.run(tiny, store=tmp_path, site=site)
    mine, theirs = load_file(finished / "best.safetensors"), load_file(other.folder.best)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    calls = other.record["training"]["calls"]
    assert calls["recompute_forward"] == sum(n for name, n in calls.items() if name.endswith("_backward")) > 0
    assert other.record["training"]["flops_by_phase"]["recompute_forward"] > 0
    assert other.record["environment"]["deterministic"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_images_are_scaled_as_the_recipe_asks(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUDGET_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(number):
                picture = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(picture).save(tmp_path / "data" / split / name / f"{i}.png")
    recipe = tiny.with_(
        {
            "data.name": "folder",
            "data.image_size": 8,
            "epochs": 1,
            "epoch_images": 32,
            "batch_size": 16,
            "validation.images": 4,
            "evaluation.images": 4,
        }
    )
    result = rb.run(
        recipe, store=tmp_path / "runs", site=Site(data_root=str(tmp_path / "data"), device="cpu", threads=1)
    )
    assert result.record["model"]["flops_per_image"]["image_shape"] == [3, 8, 8]
    assert result.record["dataset"] | {"fingerprint": ""} == {
        "name": "folder",
        "fingerprint": "",
        "train": 34,
        "validation": 4,
        "test": 8,
        "synthetic": 0,
        "synthetic_fingerprint": None,
        "synthetic_fid": None,
    }


@pytest.mark.parametrize(
    ("name", "said"), [("cuda:99", "CUDA GPUs"), ("tpu", "unknown device"), ("mps", "not supported")]
)
def test_a_device_that_is_not_there_is_one_line(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        resolve_device(name)


def test_an_unknown_model_or_dataset_leaves_nothing_behind(tiny: Recipe, tmp_path: Path) -> None:
    for change, said in (
        ({"data.name": "cifar"}, "did you mean 'cifar10'"),
        ({"model.name": "wrn-11-1"}, "depth must be 6n + 4"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            rb.run(tiny.with_(change), store=tmp_path / "runs")
        assert not list(tmp_path.glob("runs/*/run.json"))
