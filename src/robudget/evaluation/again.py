"""Survivors attacked once more: the nearest at length, in order of worst margin in float32, or a sample (audit)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robudget.attacks.ensemble import Member, ensemble, fit_to_classes
from robudget.attacks.noise import Stream
from robudget.evaluation.audit import Audit, audit_more, near_more
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
    def rounds(self) -> list[tuple[list[Stage], Callable[[int], int]]]:
        """In order, the attacks of each round, and how many of so many survivors will meet them if none of them falls.

        Of version quick: the standard ensemble's APGD-T on the nearest, then that ensemble in float32 on a sample.
        Else the evaluation's own attacks in float32, where they were in another precision.
        """
        specification = self.specification
        precise = self.victims.precision == "float32"
        if not specification.audited:
            return [(stages(self.members, precise=True, again="float32"), self._confirmed_if_none_falls)]
        whole = [fit_to_classes(m, self.victims.classes)[0] for m in ensemble("standard", specification.threat.norm)]
        long = [member for member in whole if member.name == "apgd-t"]

        def nearest(survivors: int) -> int:
            return min(near_more(survivors, ()), survivors)

        def sample(survivors: int) -> int:
            return min(audit_more(survivors, len(self.images), (), (), specification.until), survivors)

        return [
            (stages(long, precise=precise, again="near"), nearest),
            (stages(whole, precise=True, again="audit"), sample),
        ]

    def _confirmed_if_none_falls(self, survivors: int) -> int:
        if self.victims.precision == "float32" or self.specification.confirm == "none":
            return 0
        return survivors if self.specification.confirm == "all" else images_if_none_falls(survivors)

    def run(self, state: State, attack: Attack) -> Confirmation | Audit | None:
        """Attack survivors again as long as is due; None where nothing is."""
        if self.specification.audited:
            near, sample = (plan for plan, _ in self.rounds)
            self._attack_nearest(state, attack, near)
            return self._audit(state, attack, sample)
        return None if self.victims.precision == "float32" else self._confirm(state, attack)

    def _confirm(self, state: State, attack: Attack) -> Confirmation:
        """Low precision may miss what float32 finds: attack survivors again (`confirmation.py`)."""
        mode = self.specification.confirm
        if "order" not in state.notes:
            state.notes["order"] = _nearest_first(state).tolist()
        survivors = len(state.notes["order"])

        def more(blocks: Sequence[int], fell: Sequence[int]) -> int:
            if mode != "auto":
                return survivors if mode == "all" else 0
            return 0 if enough(survivors, blocks, fell) else block_size(len(blocks), survivors)

        ((plan, _),) = self.rounds
        return Confirmation((Part.of(survivors, *_in_blocks(state, state.notes, attack, plan, more)),))

    def _attack_nearest(self, state: State, attack: Attack, plan: Sequence[Stage]) -> None:
        """Attack at length the survivors that came near; an audit that has begun draws from those that it found."""
        if "order" in state.notes:
            return
        near = state.notes.setdefault("near", {"order": _nearest_first(state).tolist()})
        survivors = len(near["order"])
        _in_blocks(state, near, attack, plan, lambda blocks, fell: near_more(survivors, fell))

    def _audit(self, state: State, attack: Attack, plan: Sequence[Stage]) -> Audit:
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

        blocks, fell = _in_blocks(state, state.notes, attack, plan, more)
        return Audit((Part(survivors, sum(blocks), sum(fell), max(len(blocks) - 1, 0)),))


def _nearest_first(state: State) -> NDArray[np.int64]:
    """The positions of the robust images, in order of worst margin."""
    robust = state.robust.nonzero()[0]
    return robust[np.argsort(state.worst_margin[robust], kind="stable")]


def _in_blocks(
    state: State,
    notes: dict[str, Any],
    attack: Attack,
    plan: Sequence[Stage],
    more: Callable[[Sequence[int], Sequence[int]], int],
) -> tuple[list[int], list[int]]:
    """Attack images by a plan, in the order noted, as many at a time as `more` says; the blocks and how many fell."""
    order, blocks = notes["order"], notes.setdefault("blocks", [])
    fell: list[int] = []
    while True:
        if len(fell) == len(blocks):
            wanted, left = more(blocks, fell), len(order) - sum(blocks)
            if not wanted or (blocks and not left):
                return blocks, fell
            blocks.append(min(wanted, left))
        first = sum(blocks[: len(fell)])
        block = [replace(stage, block=len(fell) + 1) for stage in plan]
        attack(block, order[first : first + blocks[len(fell)]])
        fell.append(sum(state.spent[stage.name].broken for stage in block))
