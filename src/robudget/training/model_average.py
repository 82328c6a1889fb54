"""An exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """`model` is an averaged copy: w̄ ← d·w̄ + (1 − d)·w after every update, with d = `decay`.

    Floating-point buffers (BatchNorm's running mean and variance) are averaged in the same way; integer buffers are
    copied. With `warmup` the decay of update t is min(decay, (1 + t)/(10 + t)), t from 0, so that the random start is
    forgotten quickly (Rebuffi et al. 2021 and TensorFlow's ExponentialMovingAverage do the same).
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        live = [*model.parameters(), *model.buffers()]
        mine = [*self.model.parameters(), *self.model.buffers()]
        averaged = [t.is_floating_point() for t in live]
        self._live = [t.detach() for t, a in zip(live, averaged, strict=True) if a]
        self._mine = [t.detach() for t, a in zip(mine, averaged, strict=True) if a]
        self._copied = [(m, t) for m, t, a in zip(mine, live, averaged, strict=True) if not a]

    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        torch._foreach_lerp_(self._mine, self._live, 1 - decay)
        for mine, live in self._copied:
            mine.copy_(live)

    def state(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **{f"model.{k}": v for k, v in self.model.state_dict().items()}}

    def load(self, state: dict[str, Tensor | int]) -> None:
        weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        self.model.load_state_dict(weights)
        self.updates = int(state["updates"])
