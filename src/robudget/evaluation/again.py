"""Survivors put through attacks in float32 once more: in order of worst margin (confirmation), or a sample (audit)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from robudget.attacks.ensemble import Member, ensemble, fit_to_classes
from robudget.attacks.noise import Stream
from robudget.evaluation.audit import Audit, audit_more
from robudget.evaluation.confirmation import Confirmation, Part, block_size, enough, images_if_none_falls
from robudget.evaluation.specification import Specification, Stage, stages
from robudget.evaluation.state import State
from robudget.evaluation.victims import Images, Victims

# What puts the images at some positions, as far as they are still robust, through stages and notes what it found.
Attack = Callable[[Sequence[Stage], Sequence[int]], None]


@dataclass(frozen=True)
class Again:
    """Which survivors are attacked again, and by what. `members`: the evaluation's attacks, as they fit the model."""

    specification: Specification
    images: Images
    victims: Victims
    members: Sequence[Member]

    @property
    def stages(self) -> list[Stage]:
        """The attacks, in float32: those of the standard ensemble (audit), or the evaluation's own (confirmation)."""
        if not self.specification.audited:
            return stages(self.members, precise=True, again="float32")
        whole = ensemble("standard", self.specification.threat.norm)
        return stages([fit_to_classes(m, self.victims.classes)[0] for m in whole], precise=True, again="audit")

    def if_none_falls(self, survivors: int) -> int:
        """How many of so many survivors will be attacked again, if none of them falls."""
        specification = self.specification
        if specification.audited:
            return min(audit_more(survivors, len(self.images), (), (), specification.until), survivors)
        if self.victims.precision == "float32" or specification.confirm == "none":
            return 0
        return survivors if specification.confirm == "all" else images_if_none_falls(survivors)

    def run(self, state: State, attack: Attack) -> Confirmation | Audit | None:
        """Attack survivors again as long as is due; None where nothing is."""
        if self.specification.audited:
            return self._audit(state, attack)
        return None if self.victims.precision == "float32" else self._confirm(state, attack)

    def _confirm(self, state: State, attack: Attack) -> Confirmation:
        """Low precision may miss what float32 finds: attack survivors again (`confirmation.py`)."""
        mode = self.specification.confirm
        if "order" not in state.notes:
            robust = state.robust.nonzero()[0]
            state.notes["order"] = robust[np.argsort(state.worst_margin[robust], kind="stable")].tolist()
        survivors = len(state.notes["order"])

        def more(blocks: Sequence[int], fell: Sequence[int]) -> int:
            if mode != "auto":
                return survivors if mode == "all" else 0
            return 0 if enough(survivors, blocks, fell) else block_size(len(blocks), survivors)

        return Confirmation((Part.of(survivors, *self._in_blocks(state, attack, more)),))

    def _audit(self, state: State, attack: Attack) -> Audit:
        """Put a random sample of what the short attacks left through the standard ensemble in float32 (`audit.py`)."""
        images, specification = self.images, self.specification
        if "order" not in state.notes:
            robust = state.robust.nonzero()[0]
            index = images.index[torch.from_numpy(robust)]
            zero = torch.zeros_like(index)
            high, low = Stream(specification.seed, "audit", index, zero, zero).words(0, 2).T.numpy()
            state.notes["order"] = robust[np.lexsort((low, high))].tolist()
        survivors = len(state.notes["order"])

        def more(blocks: Sequence[int], fell: Sequence[int]) -> int:
            return audit_more(survivors, len(images), blocks, fell, specification.until)

        blocks, fell = self._in_blocks(state, attack, more)
        return Audit((Part(survivors, sum(blocks), sum(fell), max(len(blocks) - 1, 0)),))

    def _in_blocks(
        self, state: State, attack: Attack, more: Callable[[Sequence[int], Sequence[int]], int]
    ) -> tuple[list[int], list[int]]:
        """Attack images again in the order that is noted, as many at a time as `more` says; those and how many fell."""
        order, blocks = state.notes["order"], state.notes.setdefault("blocks", [])
        fell: list[int] = []
        while True:
            if len(fell) == len(blocks):
                wanted, left = more(blocks, fell), len(order) - sum(blocks)
                if not wanted or (blocks and not left):
                    return blocks, fell
                blocks.append(min(wanted, left))
            first = sum(blocks[: len(fell)])
            plan = [replace(stage, block=len(fell) + 1) for stage in self.stages]
            attack(plan, order[first : first + blocks[len(fell)]])
            fell.append(sum(state.spent[stage.name].broken for stage in plan))
