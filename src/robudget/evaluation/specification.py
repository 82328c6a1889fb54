"""What is asked of an evaluation, as pure data: the threat, the attacks and how they compute. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from robudget.attacks.ensemble import Member, ensemble, one_transfer
from robudget.errors import InputError, unknown
from robudget.threat import Threat

Precision = Literal["auto", "float32", "bfloat16"]
Confirm = Literal["auto", "all", "none"]
VOTES = 100  # passes that decide on an image of version rand


@dataclass(frozen=True)
class Specification:
    """One evaluation, whatever the model, the images and the machine.

    `version` names the ensemble (standard, plus, rand); `attacks` replaces it by a list of `Member`s, or of their text
    (`pgd:steps=50,restarts=5,loss=cw`), and `add` has more of them, to come last: so `transfer:FILE`, examples that
    another evaluation kept. `seed` keys the noise. At most `batch_size` images are in a call of the model.
    `precision`: what the attacks compute in; every success is confirmed in float32 on the model as given. `checks`:
    look for what would make the robust accuracy meaningless; `examples`: keep the adversarial examples. `confirm`: how
    many survivors of a low precision are attacked again in float32: some (`auto`: `confirmation.py` says which), all or
    none.

    Version quick: short attacks on every image, then the standard ensemble in float32 on a random sample of what they
    leave (`audit.py`); `until`: the sample grows until the interval of the accuracy is so many points to either side.
    `votes`: an image counts as misclassified where a randomised model errs in more than half of so many passes
    (`votes.py`); None: 100 with version rand, else 1.
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
    add: Sequence[str | Member] = ()
    votes: int | None = None

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
        if self.votes is not None and self.votes < 1:
            raise InputError(f"votes = {self.votes} (allowed: at least 1)")
        if self.passes > 1 and self.audited:
            raise InputError(f"votes = {self.passes} with version quick (allowed: with version rand, or named attacks)")
        if self.batch_size < 1:
            raise InputError(f"batch_size = {self.batch_size} (allowed: at least 1)")

    @property
    def members(self) -> list[Member]:
        """The attacks in order, not yet fitted to the model's number of classes; all transfers are one of them."""
        first = ensemble(self.version, self.threat.norm) if self.attacks is None else self.attacks
        return one_transfer([item if isinstance(item, Member) else Member.parse(item) for item in (*first, *self.add)])

    @property
    def files(self) -> tuple[str, ...]:
        """Where transferred examples come from, in order."""
        return tuple(file for member in self.members for file in member.files)

    def with_files(self, instead: Mapping[str, str]) -> Specification:
        """The same with the examples in other files."""

        def moved(item: str | Member) -> str | Member:
            member = item if isinstance(item, Member) else Member.parse(item)
            return replace(member, files=tuple(instead.get(file, file) for file in member.files))

        attacks = self.attacks if self.attacks is None else [moved(item) for item in self.attacks]
        return replace(self, attacks=attacks, add=[moved(item) for item in self.add])

    def on_other(self, attacks: Sequence[str]) -> Specification:
        """For a model whose examples are to be shown: these attacks, and what they find is kept and not the verdict."""
        return replace(
            self, version="standard", attacks=attacks, add=(), checks=False, examples=True, confirm="none", until=None,
            votes=None,
        )  # fmt: skip

    @property
    def passes(self) -> int:
        """Of the model as given, that decide on an image; 1: it is taken to be deterministic."""
        if self.votes is not None:
            return self.votes
        return VOTES if self.attacks is None and self.version == "rand" else 1

    @property
    def audited(self) -> bool:
        """Is a sample of the survivors put through the standard ensemble?"""
        return self.attacks is None and self.version == "quick"

    @property
    def ensemble_name(self) -> str:
        """The version, or `custom`; `standard+transfer` where attacks are added."""
        if self.attacks is not None:
            return "custom"
        added = self.members[len(ensemble(self.version, self.threat.norm)) :]
        return "+".join([self.version, *(member.name for member in added)])


Again = Literal["", "near", "float32", "audit"]


@dataclass(frozen=True)
class Stage:
    """One attack of an evaluation; `precise`: in float32.

    `again` "": on all robust images; else on the `block`-th (from 1) of the survivors that are attacked again: at full
    length where they came near, in float32 by the same attacks, or by those of the audit.
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
    """A stage for each attack. Transfer is always in float32, on the model as given, and so never made again."""
    return [Stage(member, precise, again, block) for member in members if not (again and member.name == "transfer")]
