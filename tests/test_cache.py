"""Kept numbers are used while nothing that they depend on has changed, and never otherwise."""

import math

import numpy as np
import pytest

from robudget import cache
from robudget.cache import remembered
from robudget.prediction import PaperGBR, Predictor


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUDGET_CACHE", str(tmp_path))
    monkeypatch.delenv("ROBUDGET_REMEMBER")
    return tmp_path / "numbers"


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"values": [1.5, math.nan, 0.1 + 0.2], "calls": self.calls}


def test_the_same_question_is_computed_once(folder):
    compute, data = Counted(), [np.arange(3.0), ("a", 1)]
    one, two = (remembered("test", data, ("accuracy.py",), compute) for _ in range(2))
    assert compute.calls == 1
    assert one["calls"] == two["calls"] == 1
    assert two["values"][2] == 0.1 + 0.2  # every bit of it
    assert math.isnan(two["values"][1])
    assert len(list(folder.iterdir())) == 1


def test_they_are_kept_where_asked(folder, monkeypatch):
    monkeypatch.setenv("ROBUDGET_REMEMBER", str(folder / "elsewhere"))
    remembered("test", [1], ("accuracy.py",), Counted())
    assert [path.name.partition("-")[0] for path in (folder / "elsewhere").iterdir()] == ["test"]
    monkeypatch.setenv("ROBUDGET_REMEMBER", "no")
    compute = Counted()
    for _ in range(2):
        remembered("test", [2], ("accuracy.py",), compute)
    assert compute.calls == 2
    assert len(list(folder.glob("*.json"))) == 0


def test_changed_data_parameters_code_and_damage_are_computed_anew(folder, monkeypatch):
    compute = Counted()
    remembered("test", [np.arange(3.0), 1], ("accuracy.py",), compute)
    remembered("test", [np.array([0.0, 1.0, 2.0 + 1e-15]), 1], ("accuracy.py",), compute)
    remembered("test", [np.arange(3.0), 2], ("accuracy.py",), compute)
    remembered("test", [np.arange(3.0), 1], ("accuracy.py", "columns.py"), compute)
    assert compute.calls == 4
    for path in folder.iterdir():
        path.write_text(path.read_text().replace("1.5", "2.5"))
    assert remembered("test", [np.arange(3.0), 1], ("accuracy.py",), compute)["values"][0] == 1.5
    assert compute.calls == 5
    for path in folder.iterdir():
        path.write_bytes(b"\xff\x00")
    remembered("test", [np.arange(3.0), 1], ("accuracy.py",), compute)
    assert compute.calls == 6


def test_the_version_of_the_code_is_its_source(tmp_path, monkeypatch):
    (tmp_path / "room").mkdir()
    (tmp_path / "cache.py").write_text("")
    (tmp_path / "room" / "a.py").write_text("x = 1")
    monkeypatch.setattr(cache, "_SOURCE", tmp_path)
    version = cache.code_version.__wrapped__
    before = version(("room",))
    assert version(("room",)) == before
    (tmp_path / "room" / "a.py").write_text("x = 2")
    assert version(("room",)) != before


def test_it_is_bounded_and_a_folder_that_cannot_be_written_costs_nothing(folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)
    for i in range(30):
        remembered("test", [i], (), Counted())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1000
    monkeypatch.setenv("ROBUDGET_CACHE", "/dev/null/here")
    assert remembered("test", [0], (), Counted())["calls"] == 1


def test_a_predictor_from_kept_numbers_is_the_same_and_a_changed_table_is_fitted(folder, grid, monkeypatch):
    def explained():
        predictor, gbr = Predictor.fit(grid, groups=()), PaperGBR.fit(grid)
        assert predictor.importances
        said = predictor.partial("steps").to_dict(), predictor.collapse_map("steps", "loss").to_dict(), gbr.to_dict()
        return predictor, said

    fitted, of_models = explained()
    files = len(list(folder.iterdir()))
    with monkeypatch.context() as nothing_is_fitted:
        for name in ("predictor.FittedModels", "predictor.Calibration", "paper_predictor.paper_gbr"):
            nothing_is_fitted.setattr(f"robudget.prediction.{name}", None)
        kept, of_numbers = explained()
    assert of_numbers == of_models
    assert kept.coverage == fitted.coverage
    assert kept.scores == fitted.scores
    assert kept.importances == fitted.importances
    assert kept.predict(grid.iloc[:4]) == fitted.predict(grid.iloc[:4])
    assert len(list(folder.iterdir())) == files
    changed = grid.assign(aa_acc=grid.aa_acc.where(grid.index != 3, grid.aa_acc + 0.01))
    Predictor.fit(changed, groups=())
    assert len(list(folder.glob("predictor-*"))) == len(list(folder.glob("coverage-*"))) == 2
