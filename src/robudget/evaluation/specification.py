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
    none.

    Version quick: short attacks on every image, then the standard ensemble in float32 on a random sample of what they
    leave (`audit.py`); `until`: the sample grows until the interval of the accuracy is so many points to either side.
    Raises InputError.
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
    until: float | None = None

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if not names:
            raise InputError("attacks = [] (allowed: at least one attack, or a version)")
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise InputError(f"attacks has {name!r} twice (allowed: each attack once; see its restarts)")
        if self.confirm not in get_args(Confirm):
            raise unknown("confirm", self.confirm, get_args(Confirm))
        if self.until is not None and not self.until > 0:
            raise InputError(f"until = {self.until:g} (allowed: more than 0 points)")
        if self.until is not None and not self.audited:
            raise InputError(f"until = {self.until:g} with version {self.ensemble_name} (allowed: with version quick)")
        if self.audited and self.confirm != "auto":
            raise InputError(
                f"confirm = {self.confirm} with version quick, whose audit is in float32 (allowed: auto; see until)"
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size = {self.batch_size} (allowed: at least 1)")

    @property
    def members(self) -> list[Member]:
        """The attacks in order, not yet fitted to the model's number of classes."""
        if self.attacks is None:
            return ensemble(self.version, self.threat.norm)
        return [item if isinstance(item, Member) else Member.parse(item) for item in self.attacks]

    @property
    def audited(self) -> bool:
        """Is a sample of the survivors put through the standard ensemble?"""
        return self.ensemble_name == "quick"

    @property
    def ensemble_name(self) -> str:
        """The version, or `custom`."""
        return self.version if self.attacks is None else "custom"


Again = Literal["", "float32", "audit"]


@dataclass(frozen=True)
class Stage:
    """One attack of an evaluation; `precise`: in float32.

    `again` "": on all robust images; else on the `block`-th (from 1) of the survivors that are attacked again: in
    float32 by the same attacks, or by those of the audit.
    """

    member: Member
    precise: bool
    again: Again = ""
    block: int = 1

    @property
    def name(self) -> str:
        line = self.member.name + (f"@{self.again}" if self.again else "")
        return f"{line}-{self.block}" if self.again and self.block > 1 else line


def line_of(stage: str) -> str:
    """All blocks of an attack are one line of the account: `square@float32-3` → `square@float32`."""
    name, at, again = stage.partition("@")
    return name + at + again.partition("-")[0]


def stages(members: Sequence[Member], *, precise: bool, again: Again = "", block: int = 1) -> list[Stage]:
    """A stage for each attack."""
    return [Stage(member, precise, again, block) for member in members]
