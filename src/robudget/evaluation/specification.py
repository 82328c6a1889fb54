"""What is asked of an evaluation, as pure data: the threat, the attacks and how they compute. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from robudget.attacks.ensemble import Member, ensemble
from robudget.errors import InputError, unknown
from robudget.threat import Threat

Precision = Literal["auto", "float32", "bfloat16"]
Confirm = Literal["auto", "all", "none"]


@dataclass(frozen=True)
class Specification:
    """One evaluation, whatever the model, the images and the machine.

    `version` names the ensemble (standard, plus, rand); `attacks` replaces it by a list of `Member`s, or of their text
    (`pgd:steps=50,restarts=5,loss=cw`). `seed` keys the noise. At most `batch_size` images are in a call of the model.
    `precision`: what the attacks compute in; every success is confirmed in float32 on the model as given. `checks`:
    look for what would make the robust accuracy meaningless; `examples`: keep the adversarial examples. `confirm`: how
    many survivors of a low precision are attacked again in float32: some (`auto`: `confirmation.py` says which), all or
    none. Raises InputError.
    """

    threat: Threat
    version: str = "standard"
    attacks: Sequence[str | Member] | None = None
    seed: int = 0
    batch_size: int = 500
    precision: Precision = "auto"
    checks: bool = True
    examples: bool = False
    confirm: Confirm = "auto"

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if not names:
            raise InputError("attacks = [] (allowed: at least one attack, or a version)")
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise InputError(f"attacks has {name!r} twice (allowed: each attack once; see its restarts)")
        if self.confirm not in get_args(Confirm):
            raise unknown("confirm", self.confirm, get_args(Confirm))
        if self.batch_size < 1:
            raise InputError(f"batch_size = {self.batch_size} (allowed: at least 1)")

    @property
    def members(self) -> list[Member]:
        """The attacks in order, not yet fitted to the model's number of classes."""
        if self.attacks is None:
            return ensemble(self.version, self.threat.norm)
        return [item if isinstance(item, Member) else Member.parse(item) for item in self.attacks]

    @property
    def ensemble_name(self) -> str:
        """The version, or `custom`."""
        return self.version if self.attacks is None else "custom"


@dataclass(frozen=True)
class Stage:
    """One attack of an evaluation; `precise`: in float32.

    `again` 0: the ensemble itself; k: the k-th block of survivors that is attacked again in float32.
    """

    member: Member
    precise: bool
    again: int = 0

    @property
    def name(self) -> str:
        return self.member.name + ("" if not self.again else AGAIN + (f"-{self.again}" if self.again > 1 else ""))


AGAIN = "@float32"


def stages(members: Sequence[Member], *, precise: bool, again: int = 0) -> list[Stage]:
    """A stage for each attack."""
    return [Stage(member, precise, again) for member in members]
