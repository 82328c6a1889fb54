"""The steps of an attack as CUDA graphs, over states padded to a few fixed sizes and compacted only at looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robudget.attacks.driver import Attack, State
from robudget.attacks.ensemble import Passes
from robudget.attacks.victim import Victim
from robudget.backend.folding import Folded
from robudget.backend.graph import Graphs


def why_called(victim: Victim, device: torch.device, *, asked: bool) -> str:
    """Why an attack's steps on this victim are called one by one; "" where they may be graphs.

    A graph repeats what one call did. Only a folded copy, which was traced, is known to do the same in every call."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if not asked:
        return "cuda_graphs=false"
    return "" if isinstance(victim.model, Folded) else "the model is called as given, not a traced copy of it"


def one_line(record: Mapping[str, str]) -> str:
    """What each attack's steps were ("on", or "off" and why): once where it is the same of all."""
    attacks: dict[str, list[str]] = {}
    for attack, value in record.items():
        attacks.setdefault(value, []).append(attack)
    if len(attacks) < 2:
        return next(iter(attacks), "off: nothing was attacked")
    return "; ".join(f"{', '.join(names)} {value}" for value, names in attacks.items())


class StepGraphs:
    """`steps(state, times)` makes so many steps of `attack`, as `drive` takes it: by one graph for each of the victim's
    `sizes` that is met.

    A state is filled up to the next size with copies of its last row that are done, and has its own rows again
    afterwards. Passes are counted as if every step had been called (the filling too, the warm-up of a capture not).
    What the attack does to a row must not depend on values that the host would have to wait for; where a capture fails
    for that, `notify` is told once, `record` says why, and the steps are called.
    """

    def __init__(self, attack: Attack[Any], victim: Victim, graphs: Graphs) -> None:
        self._attack, self._victim, self._graphs = attack, victim, graphs
        self._passes: dict[int, Passes] = {}  # of one step, by size

    @property
    def record(self) -> str:
        return "on" if self._graphs.failed is None else f"off: {self._graphs.failed}"

    def __call__(self, state: State, times: int) -> None:
        n = len(state)
        size = next((size for size in self._victim.sizes if size >= n), None)
        if size is None or self._graphs.failed is not None:
            for _ in range(times):
                self._attack.step(state)
            return
        names = [field.name for field in fields(state)]
        rows = torch.arange(size, device=state.image.device).clamp_(max=n - 1)
        filled = [getattr(state, name)[rows] for name in names]
        filled[names.index("done")][n:] = True
        step = self._graphs.of(size, partial(self._step, type(state)), filled)
        for _ in range(times):
            step()
            self._victim.passes += self._passes[size]
        for name, buffer in zip(names, step.buffers, strict=True):
            setattr(state, name, buffer[:n].clone())

    def _step(self, kind: Callable[..., State], *buffers: Tensor) -> None:
        """One step of the state that lies in these buffers, its result put back into them."""
        before = self._victim.passes
        try:
            state = kind(*buffers)
            self._attack.step(state)
            self._passes[len(buffers[0])] = self._victim.passes - before
        finally:
            self._victim.passes = before
        after = [getattr(state, field.name) for field in fields(state)]
        # A field may have become the tensor of another one, which is about to be overwritten.
        taken = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        moved = [
            new.clone() if new is not old and new.untyped_storage().data_ptr() in taken else new
            for new, old in zip(after, buffers, strict=True)
        ]
        for new, old in zip(moved, buffers, strict=True):
            if new is not old:
                old.copy_(new)
