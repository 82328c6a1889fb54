import errno
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from robudget import files
from robudget.columns import stored
from robudget.errors import InputError
from robudget.meter.prices import Prices
from robudget.recipe import Recipe
from robudget.store import Busy, RunFolder, Store, writing
from robudget.tables.read import load_runs


def make(store: Store, recipe: Recipe, **parts: object) -> RunFolder:
    folder = store.folder(recipe)
    folder.open(recipe)
    folder.finish({"id": recipe.id, "status": "done", "recipe": recipe.to_dict(), **parts})
    return folder


def test_a_run_is_done_when_its_record_is_there(tmp_path: Path) -> None:
    store, recipe = Store(tmp_path), Recipe()
    folder = store.folder(recipe)
    folder.open(recipe)
    assert not folder.done
    assert load_runs(tmp_path).empty
    folder.finish({"status": "done", "recipe": recipe.to_dict()})
    assert folder.done
    assert RunFolder(folder.path).recipe == recipe
    assert len(load_runs(tmp_path)) == 1


def test_the_table_is_percent_with_unknown_as_nan(tmp_path: Path) -> None:
    recipe = Recipe().with_({"loss": "trades", "craft.steps": 2})
    make(
        Store(tmp_path),
        recipe,
        evaluation={"clean": 0.8, "robust": 0.5, "low": 0.4, "high": 0.6, "n": 100},
        training={"flops_exact": 1e12, "seconds": 3.0, "energy": {"kwh": 2.0, "how": "estimated"}},
    )
    table = load_runs(tmp_path)
    assert list(table.columns) == list(stored())
    row = table.iloc[0]
    assert (row.aa_acc, row.clean_acc, row.aa_acc_low, row.n_eval) == (50.0, 80.0, 40.0, 100)
    assert (row.loss, row.beta, row.steps) == ("trades", 6.0, 2)
    assert row.cost_usd == pytest.approx(2.0 * 1.58 * 0.12)
    assert row.co2_kg == pytest.approx(2.0 * 0.5663)
    assert row.cost_usd_how == "estimated"
    assert math.isnan(row.eval_energy_kwh)
    assert math.isnan(row.train_flops_paper)
    assert math.isnan(row.eval_cost_usd)


def test_rent_and_synthetic_images_have_lines_of_their_own(tmp_path: Path) -> None:
    recipe = Recipe().with_({"synthetic.source": "file", "synthetic.amount": 1000})
    make(
        Store(tmp_path),
        recipe,
        environment={"device": "cuda", "processes": 4},
        dataset={"synthetic": 1000},
        training={"seconds": 7200.0, "energy": {"kwh": 2.0, "how": "measured"}},
    )
    bare = load_runs(tmp_path).iloc[0]
    assert (bare.synthetic_energy_how, bare.gpu_hours) == ("not counted", 8)
    assert math.isnan(bare.synthetic_energy_kwh)
    assert math.isnan(bare.rent_usd)
    priced = load_runs(tmp_path, prices=Prices(usd_per_gpu_hour=3, synthetic_wh_per_image=0.5)).iloc[0]
    assert priced.rent_usd == pytest.approx(4 * 2 * 3)
    assert priced.synthetic_energy_kwh == pytest.approx(0.5)
    assert priced.cost_usd == bare.cost_usd


def test_a_run_trained_for_another_evaluation_is_not_this_one_done(tmp_path: Path) -> None:
    recipe = Recipe()
    folder = make(Store(tmp_path), recipe, evaluation={"id": recipe.evaluation_id})
    assert folder.has(recipe)
    assert folder.done
    assert not folder.has(recipe.with_({"evaluation.images": 7}))
    folder.open(recipe.with_({"evaluation.images": 7}))
    assert RunFolder(folder.path).recipe.evaluation.images == 7


@pytest.mark.parametrize(
    ("loss", "robust", "collapsed"), [("at", 0.2, True), ("at", 0.25, False), ("standard", 0.0, False)]
)
def test_collapse_is_an_adversarial_loss_below_three_tenths_of_clean(
    tmp_path: Path, loss: str, robust: float, collapsed: bool
) -> None:
    make(Store(tmp_path), Recipe().with_({"loss": loss}), evaluation={"clean": 0.8, "robust": robust, "n": 10})
    assert bool(load_runs(tmp_path).collapsed.iloc[0]) is collapsed


def test_a_log_line_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log("epoch", epoch=1, loss=float("nan"))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "epoch", "ep')
    assert [e["epoch"] for e in folder.events("epoch")] == [1]
    assert next(folder.events("epoch"))["loss"] is None
    folder.log("epoch", epoch=2)
    assert [e["epoch"] for e in folder.events("epoch")] == [1, 2]


def test_records_of_another_version_and_broken_ones_are_refused(tmp_path: Path) -> None:
    folder = make(Store(tmp_path), Recipe())
    record = json.loads((folder.path / "run.json").read_text())
    (folder.path / "run.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(InputError, match="another version"):
        load_runs(tmp_path)
    (folder.path / "run.json").write_text('{"format": 1')
    with pytest.raises(InputError, match="cannot read"):
        load_runs(tmp_path)


def test_no_such_store_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such store"):
        load_runs(tmp_path / "none")


def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a part of the path is a file"):
        RunFolder(tmp_path / "file" / "run").open(Recipe())
    for code, said in (
        (errno.ENOSPC, "no space left"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no write permission"),
    ):
        with pytest.raises(InputError, match=said), writing(tmp_path):
            raise OSError(code, os.strerror(code))


def _hold(path: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with RunFolder(path).lock():
        ready.set()
        signal.pause()


def test_a_run_has_one_worker_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(10)
    with pytest.raises(Busy), RunFolder(tmp_path).lock():
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(10)
    with RunFolder(tmp_path).lock(), pytest.raises(Busy), RunFolder(tmp_path).lock():  # in this process, too
        pass
    with RunFolder(tmp_path).lock():
        pass


def test_replace_leaves_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.replace(path, fail)
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
