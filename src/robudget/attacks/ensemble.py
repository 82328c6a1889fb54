"""What an ensemble is, as pure data: its attacks with their settings (Croce & Hein 2020), and the passes they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

from robudget.errors import InputError, unknown
from robudget.threat import Norm, parse_number

VERSIONS = ("standard", "plus", "rand", "quick")
# Every attack, with the number of its noise: an attack keeps its number for ever.
ATTACKS = {
    "pgd": 1, "apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 5, "fab-t": 6, "square": 7, "transfer": 8, "fmn": 16,
}  # fmt: skip

MINIMUM_NORM = ("fab", "fab-t", "fmn")  # attacks that look for the nearest adversarial point


@dataclass(frozen=True)
class Passes:
    """Image passes through a model: forward, and backward to the image; and those through a surrogate of it."""

    forward: int = 0
    backward: int = 0
    surrogate_forward: int = 0
    surrogate_backward: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: Passes) -> Passes:
        return Passes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Passes) -> Passes:
        return Passes(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Member:
    """One attack of an ensemble, with what its defaults leave open. `steps` None: 100, or 5,000 queries for square."""

    name: str
    restarts: int = 1
    targets: int = 9
    steps: int | None = None
    eot: int = 1
    large_eps: bool = False
    loss: str | None = None
    step_size: float | None = None
    """PGD only; None: 2.5·ε/steps."""
    p: float = 0.8
    """Square only: the share of the image that the first window covers."""
    files: tuple[str, ...] = ()
    """Transfer only: where the examples are (examples.npz, or the folder of the evaluation that kept it)."""

    @classmethod
    def parse(cls, text: str) -> Member:
        """`square` or `pgd:steps=50,restarts=5,loss=cw`: a name, then any fields of this class; or `transfer:FILE`.

        Raises InputError.
        """
        name, _, rest = text.partition(":")
        if name == "transfer":
            return cls(name, files=(rest,) if rest else ())
        settings: dict[str, Any] = {}
        for item in rest.split(",") if rest else ():
            key, _, value = item.partition("=")
            if key not in _READ:
                raise unknown(f"setting of {name}", key, _READ)
            try:
                settings[key] = _READ[key](value)
            except (KeyError, ValueError):
                raise InputError(f"{name}: {key} = {value!r} (allowed, e.g.: {_SAMPLES[key]})") from None
        return cls(name, **settings)

    def __str__(self) -> str:
        """What `parse` reads: the name, and what differs from the defaults."""
        if self.files:
            return f"{self.name}:{' '.join(self.files)}"
        changed = [
            f"{f.name}={str(value).lower() if isinstance(value, bool) else value}"
            for f in fields(self)
            if f.name != "name" and (value := getattr(self, f.name)) != f.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise unknown("attack", self.name, ATTACKS)
        if (self.name == "transfer") != bool(self.files):
            raise InputError(f"{self.name}: files = {self.files} (allowed: transfer:FILE; no other attack has files)")
        losses = _LOSSES.get(self.name, ())
        if self.loss is not None and self.loss not in losses:
            raise unknown(f"loss of {self.name}", self.loss, losses or ("its own",))
        if self.step_size is not None and not self.step_size > 0:
            raise InputError(f"{self.name}: step_size = {self.step_size} (allowed: more than 0)")
        if not 0 < self.p <= 1:
            raise InputError(f"{self.name}: p = {self.p} (allowed: more than 0, at most 1)")
        for key in ("restarts", "targets", "eot"):
            if getattr(self, key) < 1:
                raise InputError(f"{self.name}: {key} = {getattr(self, key)} (allowed: at least 1)")
        if self.steps is not None and self.steps < 0:
            raise InputError(f"{self.name}: steps = {self.steps} (allowed: at least 0)")

    @property
    def targeted(self) -> bool:
        return self.name in ("apgd-t", "fab-t")

    @property
    def length(self) -> int:
        """Iterations of a row (queries for square)."""
        if self.steps is not None:
            return self.steps
        return {"square": 5000, "pgd": 40, "transfer": 0}.get(self.name, 100)

    def passes(self, classes: int, norm: Norm) -> Passes:
        """The passes for an image that survives this attack, against a model with so many classes.

        APGD and PGD evaluate each iterate and the start (of each of its three phases where `large_eps` applies); FAB
        linearises and then evaluates the point it moves to; FMN takes a gradient a step; Square evaluates its start and
        every query. What Square evaluates in vain, because it proposes several queries at a time, is not counted.
        """
        member, _ = fit_to_classes(self, classes)
        rows = member.restarts * (member.targets if member.targeted else 1)
        n = member.length
        if self.name == "transfer":
            return Passes(len(self.files), 0)
        if self.name == "square":
            return Passes(rows * (n + 1), 0)
        if self.name == "fab-t":
            return Passes(2 * rows * n, rows * n)
        if self.name == "fab":  # the gradient of every class
            return Passes(2 * rows * n, classes * rows * n)
        starts = 3 if self.large_eps and norm == "l1" and self.name != "pgd" else 1
        if self.name == "fmn":
            return Passes(rows * n, rows * n)
        evaluations = rows * (n + starts) * self.eot
        return Passes(evaluations, evaluations)


_LOSSES = {
    "pgd": ("ce", "cw", "dlr"),
    "apgd-ce": ("ce",),
    "apgd-dlr": ("dlr", "ce"),
    "apgd-t": ("dlr-targeted", "ce-targeted"),
}
_READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("restarts", "targets", "steps", "eot"), int),
    "large_eps": {"true": True, "false": False}.__getitem__,
    "loss": str,
    **dict.fromkeys(("step_size", "p"), parse_number),
}
_SAMPLES = {
    **dict.fromkeys(("restarts", "targets", "steps", "eot"), "a whole number"),
    "large_eps": "true, false",
    **dict.fromkeys(("step_size", "p"), "0.8, 2/255"),
}


def ensemble(version: str, norm: Norm) -> list[Member]:
    """The members of a version, in order, as the authors set them for this norm."""
    if version not in VERSIONS:
        raise unknown("version", version, VERSIONS)
    if version == "quick":
        # Ours: the short attacks that stand before an audit by the standard ensemble. On the reference model they leave
        # 1 image of 512 (L∞) and none of 256 (L2) that it breaks; more targets helped, more steps did not.
        if norm == "l1":
            return [
                Member("apgd-ce", steps=30, large_eps=True),
                Member("apgd-t", steps=30, targets=5, large_eps=True),
            ]
        return [Member("apgd-ce", steps=10), Member("apgd-t", steps=15)]
    if version == "rand":
        return [Member("apgd-ce", eot=20), Member("apgd-dlr", eot=20)]
    if version == "plus":
        return [
            Member("apgd-ce", restarts=5),
            Member("apgd-dlr", restarts=5),
            Member("fab", restarts=5),
            Member("square"),
            Member("apgd-t"),
            Member("fab-t"),
        ]
    l1 = norm == "l1"
    return [
        Member("apgd-ce", restarts=5 if l1 else 1, large_eps=l1),
        Member("apgd-t", targets=5 if l1 else 9, large_eps=l1),
        Member("fab-t"),
        Member("square"),
    ]


def one_transfer(members: Sequence[Member]) -> list[Member]:
    """The same with all transfers as one, where the first of them is: its rows are those of the files in order."""
    files = tuple(file for member in members for file in member.files)
    whole = Member("transfer", restarts=len(files), files=files) if files else None
    first = next((n for n, member in enumerate(members) if member.files), None)
    return [whole if n == first and whole else m for n, m in enumerate(members) if n == first or not m.files]


def fit_to_classes(member: Member, classes: int) -> tuple[Member, str | None]:
    """A member as it can run with so many classes, and what was changed (None: nothing).

    DLR needs 3 classes and targeted DLR 4: below that cross-entropy takes their place; at most classes − 1 targets.
    """
    notes = []
    if (member.name == "apgd-dlr" or member.loss == "dlr") and classes < 3:
        member = replace(member, loss="ce")
        notes.append(f"{member.name} runs on cross-entropy: DLR needs 3 classes and the model has {classes}")
    if member.name == "apgd-t" and classes < 4:
        member = replace(member, loss="ce-targeted")
        notes.append(f"apgd-t runs on cross-entropy: targeted DLR needs 4 classes and the model has {classes}")
    if member.targeted and member.targets > classes - 1:
        notes.append(
            f"{member.name} has {classes - 1} targets instead of {member.targets}: the model has {classes} classes"
        )
        member = replace(member, targets=max(classes - 1, 1))
    return member, "; ".join(notes) or None
