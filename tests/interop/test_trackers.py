from pathlib import Path

import pytest

from robudget.errors import InputError
from robudget.interop import trackers
from robudget.recipe import Recipe
from robudget.store import RunFolder, Store


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run whose second epoch was killed and repeated."""
    recipe = Recipe.load("digits")
    folder = Store(tmp_path / "runs").folder(recipe)
    folder.open(recipe)
    for epoch, loss, robust in ((1, 2.0, None), (2, 9.0, 0.1), (2, 1.5, 0.4)):
        folder.log("epoch", epoch=epoch, train_loss=loss, val_robust=robust)
    folder.finish(
        {
            "status": "done",
            "recipe": recipe.to_dict(),
            "evaluation": {"clean": 0.9, "robust": 0.5, "low": 0.4, "high": 0.6, "n": 100},
        }
    )
    return folder


def test_tensorboard_gets_each_epoch_once_and_no_unknown_number(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers.export(run, "tensorboard", to=tmp_path / "tb")
    seen = EventAccumulator(str(tmp_path / "tb" / run.path.name))
    seen.Reload()
    assert [(e.step, e.value) for e in seen.Scalars("train/train_loss")] == [(1, 2.0), (2, 1.5)]
    assert [e.step for e in seen.Scalars("train/val_robust")] == [2]
    assert seen.Scalars("result/aa_acc")[0].value == 50.0
    assert "result/train_energy_kwh" not in seen.Tags()["scalars"]


def test_mlflow_gets_the_recipes_changes_and_the_results(run: RunFolder, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    trackers.export(run, "mlflow", to=f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = mlflow.search_runs(experiment_names=[trackers.PROJECT], output_format="list")
    assert found.data.params == {key: str(value) for key, value in run.recipe.changes().items()}
    assert found.data.metrics["aa_acc"] == 50.0
    assert found.data.metrics["train_loss"] == 1.5


def test_wandb_writes_an_offline_run(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers.export(run, "wandb", to=tmp_path / "wb")
    assert list((tmp_path / "wb" / "wandb").glob("offline-run-*/*.wandb"))


def test_what_cannot_be_exported_is_one_line(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean 'tensorboard'"):
        trackers.export(run, "tensorbord", to=tmp_path)
    with pytest.raises(InputError, match="not finished"):
        trackers.export(RunFolder(tmp_path), "tensorboard", to=tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(InputError, match=r"robudget\[mlflow\]"):
        trackers.export(run, "mlflow", to=tmp_path)
