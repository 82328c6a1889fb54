"""Stochastic gradient descent over lists of tensors.

torch.optim's does the same, but its first use imports the compiler (three seconds of every worker's start) and its
bookkeeping takes longer than the update of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Sgd:
    """b ← m·b + (g + d·w); w ← w − lr·b, or with Nesterov w ← w − lr·(g + d·w + m·b) (Sutskever et al. 2013).

    The same recurrence as torch.optim.SGD without dampening, from the same `param_groups` (`params`, `lr`,
    `weight_decay`), with as much of its interface as a training loop needs. Parameters without a gradient stay.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": lr, **group} for group in groups]
        self._momentum, self._nesterov = momentum, nesterov
        self._buffers: dict[int, Tensor] = {}

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            moves = [p.grad for p in weights]
            if not weights:
                continue
            if group["weight_decay"]:
                moves = list(torch._foreach_add(moves, weights, alpha=group["weight_decay"]))
            if self._momentum:
                moves = self._with_momentum(weights, moves)
            torch._foreach_add_(weights, moves, alpha=-group["lr"])

    def _with_momentum(self, weights: list[Tensor], moves: list[Tensor]) -> list[Tensor]:
        fresh = [w for w in weights if id(w) not in self._buffers]
        for weight in fresh:
            self._buffers[id(weight)] = torch.zeros_like(weight)
        buffers = [self._buffers[id(w)] for w in weights]
        torch._foreach_mul_(buffers, self._momentum)
        torch._foreach_add_(buffers, moves)
        return list(torch._foreach_add(moves, buffers, alpha=self._momentum)) if self._nesterov else buffers

    def state_dict(self) -> dict[str, Any]:
        """The buffers in the order of the parameters (None before the first step)."""
        return {"momentum": [self._buffers.get(id(p)) for group in self.param_groups for p in group["params"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._buffers = {
            id(p): torch.empty_like(p).copy_(b)
            for p, b in zip(parameters, state["momentum"], strict=True)
            if b is not None
        }
