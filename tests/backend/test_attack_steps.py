"""Steps of attacks over padded buffers: the verdicts and passes of plain steps, and nothing that waits for a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robudget.attacks.build import build
from robudget.attacks.driver import drive
from robudget.attacks.noise import Noise
from robudget.attacks.victim import Victim
from robudget.backend import graph
from robudget.backend.attack_steps import StepGraphs, one_line, why_called
from robudget.backend.folding import crafting_copy
from robudget.backend.graph import Graphs
from robudget.evaluation import evaluator
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.victims import Victims
from robudget.threat import Threat

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
NAMES = ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "pgd", "fmn"]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_buffers_change_no_verdict(small: nn.Module, short_attack: Any, name: str, norm: str) -> None:
    x, y, threat, rows, member = short_attack(name, norm)
    outcomes, passes = [], []
    for graphs in (None, Graphs(CPU, pytest.fail)):
        victim = Victim(small, sizes=(4, 8, 16), most=16)
        machine = build(member, victim, threat, seed=0)
        machine.stride = 5
        *_, last = drive(
            machine,
            rows,
            x,
            y,
            threat,
            noise=Noise(0),
            verify=lambda at, label: small(at).argmax(1) != label,
            batch_size=16,
            steps_of=None if graphs is None else StepGraphs(machine, victim, graphs),
        )
        outcomes.append(last.outcome)
        passes.append(victim.passes)
    for field in fields(outcomes[0]):
        mine, theirs = (getattr(outcome, field.name) for outcome in outcomes)
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs, field.name
    assert 0 < int(outcomes[0].broken.sum()) < len(rows)
    if name != "square":  # which proposes more at once where rows are few, so that padding changes what is thrown away
        assert passes[0] == passes[1]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "fab"])
def test_a_step_never_waits_for_the_device(
    small: nn.Module, short_attack: Any, name: str, norm: str, waits: Any
) -> None:
    x, y, threat, rows, member = short_attack(name, norm)
    rows.keep(torch.arange(8))
    machine = build(member, Victim(small), threat, seed=0)
    state = machine.init(rows, x, y, Noise(0).stream(machine.name, rows.image, rows.rank, rows.restart))
    for field in fields(state):
        setattr(state, field.name, getattr(state, field.name).to(META))
    machine.victim.model = type(small)(6).to(META)  # type: ignore[attr-defined]
    machine.step(state)  # tables are made once
    with waits() as seen:
        machine.step(state)
    assert not seen.seen
    assert seen.operations > 50


def test_only_traced_copies_on_cuda_are_graphed(small: nn.Module, images: Any) -> None:
    folded = Victim(crafting_copy(small, images[0], "float32"))
    assert why_called(folded, CUDA, asked=True) == ""
    assert why_called(folded, CUDA, asked=False) == "cuda_graphs=false"
    assert why_called(folded, CPU, asked=True) == "the device is cpu"
    given = "the model is called as given, not a traced copy of it"
    assert why_called(Victim(small), CUDA, asked=True) == given
    assert why_called(Victim(small, surrogate=folded.model), CUDA, asked=True) == given
    assert one_line({"apgd-ce": "on", "square": "off: cuda", "fab-t": "on"}) == "apgd-ce, fab-t on; square off: cuda"
    assert one_line({"apgd-ce": "on", "fab-t": "on"}) == "on"
    assert one_line({}) == "off: nothing was attacked"


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Victims of a few sizes, as on an accelerator."""
    copy = Victims.copy

    def sized(self: Victims, *, precise: bool) -> Victim:
        victim = copy(self, precise=precise)
        victim.sizes = (8, 32, victim.most)
        return victim

    monkeypatch.setattr(Victims, "copy", sized)
    monkeypatch.setattr(evaluator, "why_called", lambda victim, device, asked: "" if asked else "cuda_graphs=false")


def test_an_evaluation_records_its_graphs_and_can_do_without(
    small: nn.Module, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = images
    asked = {"attacks": ["apgd-ce:steps=5", "square:steps=20"], "checks": False}
    plain = evaluate(small, x, y, Threat("linf", 0.04), **asked)  # type: ignore[arg-type]
    assert plain.about["fast_paths"] == {"CUDA graphs": "off: the device is cpu"}
    as_on_cuda(monkeypatch)
    found = {on: evaluate(small, x, y, Threat("linf", 0.04), **asked, cuda_graphs=on) for on in (True, False)}  # type: ignore[arg-type]
    assert found[True].about["fast_paths"] == {"CUDA graphs": "on"}
    assert found[False].about["fast_paths"] == {"CUDA graphs": "off: cuda_graphs=false"}
    assert [list(v.broken_by) for v in found.values()] == [list(plain.broken_by)] * 2
    assert 0 < plain.robust.sum() < len(x)


def test_a_capture_that_fails_leaves_the_verdicts(
    small: nn.Module, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = images
    asked = {"attacks": ["apgd-ce:steps=5", "fab-t:steps=5"], "checks": False}
    plain = evaluate(small, x, y, Threat("linf", 0.04), **asked)  # type: ignore[arg-type]
    as_on_cuda(monkeypatch)
    back: list[str] = []

    class Stream:
        def __init__(self, *_: object) -> None: ...
        def wait_stream(self, other: object) -> None: ...

    @contextmanager
    def inside(*_: object, **__: object) -> Iterator[None]:
        yield

    @contextmanager
    def failing(*_: object, **__: object) -> Iterator[None]:
        yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    fakes = {"Stream": Stream, "current_stream": Stream, "stream": inside, "graph": failing, "CUDAGraph": object}
    for name, fake in (fakes | {"set_stream": lambda stream: back.append("main")}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(evaluator, "Graphs", lambda device, notify: graph.Graphs(CUDA, notify))
    with pytest.warns(UserWarning, match="no CUDA graph could be captured, going on without"):
        found = evaluate(small, x, y, Threat("linf", 0.04), **asked)  # type: ignore[arg-type]
    cause = "CUDA error: operation not permitted when stream is capturing"
    assert found.about["fast_paths"] == {"CUDA graphs": f"off: {cause}"}
    assert back == ["main"] * 2  # once an attack: a capture is not tried again
    assert list(found.broken_by) == list(plain.broken_by)
