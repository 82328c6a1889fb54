"""Transfer: adversarial examples that were made elsewhere, tried as they are; one look at each (no gradients)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robudget.attacks.driver import Rows, State, initial
from robudget.attacks.geometry import enforce
from robudget.attacks.noise import Stream
from robudget.attacks.victim import Victim, margin
from robudget.threat import Threat


@dataclass
class Transfer:
    """The state machine: a row looks at the example that the `restart`-th of the sources has of its image, if any.

    `sources`: an image's row in the full split → its example (C, H, W). An example outside the ball is moved into it.
    """

    victim: Victim
    threat: Threat
    sources: Sequence[Mapping[int, Tensor]]
    name: str = "transfer"
    stride: int = 1

    @property
    def calls(self) -> int:
        return 1

    def init(self, rows: Rows, x: Tensor, y: Tensor, stream: Stream) -> State:
        base = initial(rows, x, y, stream.index)
        x0, start, none = base["x0"], base["x"], base["done"]
        for n, (index, source) in enumerate(zip(stream.index.tolist(), rows.restart.tolist(), strict=True)):
            example = self.sources[source].get(index)
            none[n] = example is None
            if example is not None:
                start[n] = example.to(start)
        base["x"] = enforce(start, x0, self.threat.eps, self.threat.norm)
        return State(**base)

    def step(self, s: State) -> None:
        at = (~s.done).nonzero().squeeze(1)
        if len(at):
            logits = self.victim.logits(s.x[at])
            wrong, gap = torch.zeros_like(s.fooled), torch.full_like(s.worst, torch.inf)
            wrong[at] = (logits.argmax(1) != s.y[at]) | ~logits.isfinite().all(1)
            gap[at] = margin(logits, s.y[at])
            s.it[at] += 1
            s.claim(wrong, s.x, gap)
        s.done[:] = True
