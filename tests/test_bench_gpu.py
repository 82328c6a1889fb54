"""`bench/gpu.py` on a CPU at its smallest size: lines, bars, going on, and what is not there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu.py"
FEW = ["training on CPU and device", "graphs and plain calls", "compiled update"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    return module


def test_lines_are_written_one_by_one_and_not_measured_again(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    asked = ["--device", "cpu", "--size", "tiny", "--out", str(out), "--only"]
    assert bench.main([*asked, *FEW[:2]]) == 0
    told = json.loads(out.read_text())["results"]
    assert list(told) == FEW[:2]
    assert told[FEW[0]]["value"].startswith("weights differ by 0.0e+00")
    assert told[FEW[1]]["value"].startswith("graphs off: the device is cpu; weights differ by 0.0e+00")
    assert [line["met"] for line in told.values()] == [None, None]  # a CPU meets no bar of a GPU's

    monkeypatch.setitem(bench.LINES, FEW[0], pytest.fail)
    monkeypatch.setitem(bench.LINES, FEW[1], pytest.fail)
    assert bench.main([*asked, *FEW]) == 0
    block = out.with_suffix(".md").read_text()
    assert f"| {FEW[2]} | not measured: only compiled on a GPU |" in block
    assert all(name in block for name in FEW)
    capsys.readouterr()

    def broken(bench: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setitem(bench.LINES, FEW[2], broken)  # what was skipped or failed is asked again
    assert bench.main([*asked, *FEW]) == 1
    assert json.loads(out.read_text())["results"][FEW[2]] == {
        "value": "failed: RunFailed: the GPU stopped answering (CUDA error: unspecified launch failure); "
        "run again to go on from what was saved", "bar": "", "met": False, "seconds": 0.0
    }  # fmt: skip
    assert bench.main([*asked, FEW[2], "--minutes", "-1"]) == 1
    assert "minutes are spent: run again" in capsys.readouterr().out


def test_after_an_error_of_the_gpu_a_new_process_measures_the_rest(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(bench: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")

    commands: list[list[str]] = []
    monkeypatch.setattr(bench.subprocess, "call", lambda command: commands.append(command) or 0)
    monkeypatch.setitem(bench.LINES, FEW[0], lost)
    monkeypatch.setitem(bench.LINES, FEW[1], pytest.fail)
    out = tmp_path / "gpu.json"
    asked = ["--device", "cpu", "--size", "tiny", "--out", str(out), "--only", *FEW[:2]]
    assert bench.main(asked) == 1
    (command,) = commands
    assert command[-2:] == ["--only", FEW[1]]
    monkeypatch.setitem(bench.LINES, FEW[1], lambda bench: bench.verdict("1", "2", True))
    assert bench.main(asked) == 1
    assert list(json.loads(out.read_text())["results"]) == FEW[:2]
    assert capsys.readouterr().out.index(f"{FEW[1]}: 1  [2]") > 0  # what failed before comes last
    assert len(commands) == 1


def test_bars_are_those_of_a_gpu(bench: Any) -> None:
    scale = bench.SCALES["tiny"]
    on_gpu, on_cpu = (bench.Bench(torch.device(name), scale) for name in ("cuda", "cpu"))
    assert on_gpu.verdict("1", "2", False).met is False
    assert on_cpu.verdict("1", "2", False).met is None


def test_without_a_gpu_it_says_so(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path / "gpu.json")]) == 2
    assert "needs a GPU that torch sees" in capsys.readouterr().err
