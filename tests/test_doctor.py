"""`robudget doctor`: what it says is what the machine, the meter and the backend say."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from robudget.backend.precision import has_bfloat16
from robudget.cli import app
from robudget.doctor import Line, diagnose
from robudget.execution import Site
from robudget.meter.machine import open_meter
from robudget.threads import cores


def by_name(lines: list[Line]) -> dict[str, Line]:
    return {line.name: line for line in lines}


def test_every_line_is_true_here(tmp_path: Path) -> None:
    found = by_name(diagnose(Site(device="cpu"), tmp_path / "not" / "there" / "yet"))
    assert list(tmp_path.iterdir()) == []  # what was written to time the disk is gone
    assert found["device"].value == "cpu"
    assert f"torch {torch.__version__.split('+')[0]}" in found["versions"].value
    assert f"{os.cpu_count()} threads" in found["CPU"].value
    assert f"{cores()} usable" in found["threads of a command"].why
    assert str(tmp_path) in found["disk of the store"].value
    assert found["bfloat16"].value == ("on" if has_bfloat16(torch.device("cpu")) else "off")
    with open_meter("cpu") as meter:
        for source in meter.sources:
            assert found[f"energy of {source.name}"].why == source.method
            assert found[f"energy of {source.name}"].value.startswith(source.how)
    assert found["fans, switches, supply"].value == "not counted"
    stated = by_name(diagnose(Site(device="cpu", overhead=1.2, cpu_watts=65), tmp_path))
    assert stated["fans, switches, supply"].why == "the user's factor 1.2 on the parts above"


def test_a_gpu_by_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = types.SimpleNamespace(name="NVIDIA H100", total_memory=80 * 10**9, major=9, minor=0, uuid="0123")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: about.name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    found = by_name(diagnose(Site(device="cuda:1", tf32=True), tmp_path))
    assert found["cuda:1"].value == "NVIDIA H100, 80 GB"
    assert found["bfloat16"].value == found["TensorFloat-32"].value == "on"
    assert found["energy of gpu"].value.startswith("estimated")
    assert found["CUDA graphs"].value == found["cudnn.benchmark"].value == "on"
    assert found["a compiled update"].value == "off"


def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["doctor", "device=cpu", "--store", str(tmp_path), "--json"])
    assert shown.exit_code == 0, shown.output
    assert {line["part"] for line in json.loads(shown.stdout)} == {"machine", "measuring", "fast paths"}
    wrong = run(app, ["doctor", "devise=cpu"])
    assert "did you mean 'device'?" in str(wrong.exception)
