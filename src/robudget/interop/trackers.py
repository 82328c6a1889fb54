"""A run's log replayed into a tracker: TensorBoard, Weights & Biases or MLflow.

After the run rather than from inside the training loop: the log is complete, a tracker that does not answer cannot stop
a run, and old runs can be exported too. Each tracker is an optional dependency, imported only here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from robudget.errors import InputError, unknown
from robudget.store import RunFolder
from robudget.tables.read import load_runs

PROJECT = "robudget"
_EPOCH_SERIES = ("train_loss", "train_acc", "craft_acc", "val_clean", "val_robust", "lr")


def export(run: RunFolder, tracker: str, *, to: str | Path) -> None:
    """Write a finished run's epochs, recipe and results to `tracker`: "tensorboard", "wandb" or "mlflow".

    `to` is a folder (TensorBoard's event files, W&B's offline runs) or, for MLflow, a tracking URI. Raises InputError
    for an unknown tracker, one that isn't installed, and a run that isn't finished.
    """
    if tracker not in TRACKERS:
        raise unknown("tracker", tracker, TRACKERS)
    results = _results(run)
    TRACKERS[tracker](run, results, str(to))


def _results(run: RunFolder) -> dict[str, float]:
    """The numbers of the run's row in the table; what is unknown is left out rather than sent as 0."""
    run.record()  # raises InputError for an unfinished run, which has no results
    row = load_runs(run.path).iloc[0]
    numbers = {str(k): v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: float(value) for name, value in numbers.items() if value == value}


def _epochs(run: RunFolder) -> Iterator[tuple[int, dict[str, float]]]:
    """(epoch, its numbers). An epoch that was repeated after a kill appears once, as it ended."""
    last = {event["epoch"]: event for event in run.events("epoch")}
    for epoch in sorted(last):
        yield epoch, {name: last[epoch][name] for name in _EPOCH_SERIES if last[epoch].get(name) is not None}


def _need(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{extra} is not installed (pip install 'robudget[{extra}]')") from None


def _tensorboard(run: RunFolder, results: dict[str, float], to: str) -> None:
    _need("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(Path(to) / run.path.name)) as writer:
        for epoch, numbers in _epochs(run):
            for name, value in numbers.items():
                writer.add_scalar(f"train/{name}", value, epoch)
        for name, value in results.items():
            writer.add_scalar(f"result/{name}", value)
        writer.add_text("recipe", f"```yaml\n{run.recipe.to_yaml()}```")


def _wandb(run: RunFolder, results: dict[str, float], to: str) -> None:
    wandb = _need("wandb", "wandb")
    Path(to).mkdir(parents=True, exist_ok=True)
    # Offline: robudget itself never talks to a network; `wandb sync` does, when its user says so.
    session = wandb.init(project=PROJECT, name=run.path.name, dir=to, mode="offline", config=run.recipe.to_dict())
    for epoch, numbers in _epochs(run):
        session.log(numbers, step=epoch)
    session.summary.update(results)
    session.finish()


def _mlflow(run: RunFolder, results: dict[str, float], to: str) -> None:
    mlflow = _need("mlflow", "mlflow")
    mlflow.set_tracking_uri(to)
    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=run.path.name):
        mlflow.log_params({key: str(value) for key, value in run.recipe.changes().items()})
        for epoch, numbers in _epochs(run):
            mlflow.log_metrics(numbers, step=epoch)
        mlflow.log_metrics(results)


TRACKERS: dict[str, Callable[[RunFolder, dict[str, float], str], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
