"""What an adversary may do to an image: stay within `eps` of it in a norm, and inside [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from robudget.errors import InputError, unknown

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def parse_number(value: object) -> float:
    """A finite float from a number or from text such as `0.031`, `1e-2` or `8/255`. Raises InputError."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and "/" in value:
            numerator, denominator = value.split("/")
            number = float(numerator) / float(denominator)
        else:
            number = float(cast(float, value))
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, ZeroDivisionError):
        raise InputError(f"not a number: {value!r} (allowed: 0.031, 1e-2, 8/255)") from None
    return number


def parse_eps(value: object) -> float:
    """A radius in (0, ∞); `Threat` and `Recipe` both read ε through this one function."""
    eps = parse_number(value)
    if eps < 0:
        raise InputError(f"eps = {value} is negative (allowed: eps >= 0, e.g. 8/255)")
    return eps


def format_eps(eps: float) -> str:
    """`8/255` where ε is a whole number of 255ths, else the shortest decimal that reads back the same."""
    n = round(eps * 255)
    return f"{n}/255" if n > 0 and n / 255 == eps else f"{eps!r}"


@dataclass(frozen=True)
class Threat:
    """An Lp ball of radius `eps` around each image, intersected with [0, 1].

    `norm` is "linf", "l2" or "l1" ("Linf" and the like are accepted); `eps` is in units of the [0, 1] image and may be
    written "8/255". ε = 0 is allowed and means the unattacked image; an L∞ radius above 1 allows every image and is
    refused.
    """

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        norm = str(self.norm).lower()
        if norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        eps = parse_eps(self.eps)
        if norm == "linf" and eps > 1:
            raise InputError(
                f"eps = {self.eps} is outside [0, 1]: images live in [0, 1] (did you mean {self.eps}/255?)"
            )
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "eps", eps)

    @classmethod
    def parse(cls, text: str) -> Threat:
        """`linf:8/255`: a norm and its radius. Raises InputError."""
        norm, colon, eps = text.partition(":")
        if not colon or not eps:
            raise InputError(f"threat = {text!r} (allowed: a norm and its radius, e.g. linf:8/255, l2:0.5 or l1:12)")
        return cls(norm, eps)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.norm} {format_eps(self.eps)}"

    @property
    def slug(self) -> str:
        """For a file's name: `linf-8-255`, `l2-0.5`."""
        return str(self).replace(" ", "-").replace("/", "-")


CUSTOMARY = {
    "cifar10": Threat("linf", 8 / 255),
    "cifar100": Threat("linf", 8 / 255),
    "imagenet": Threat("linf", 4 / 255),
}
"""The threat that a dataset's robust accuracies are usually reported for, as RobustBench does (Croce et al. 2021)."""

_CIFAR = (Threat("linf", 8 / 255), Threat("l2", 0.5), Threat("l1", 12.0))
USUAL = {
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "imagenet": (Threat("linf", 4 / 255), Threat("l2", 2.0), Threat("l1", 255.0)),
}
"""The radii at which robustness to all three norms is usually reported (Croce & Hein 2022, arXiv 2105.12508)."""


def parse_threats(texts: Sequence[str], dataset: str) -> list[Threat]:
    """Threats as a user writes them; `all` stands for the usual ones of the data set. Raises InputError, also for one
    that is given twice."""
    out: list[Threat] = []
    for text in texts:
        if text == "all" and dataset not in USUAL:
            raise InputError(f"threat = 'all' with {dataset} (allowed: with {', '.join(USUAL)}; else e.g. linf:0.1)")
        for threat in USUAL[dataset] if text == "all" else (Threat.parse(text),):
            if threat in out:
                raise InputError(f"threat = {threat} twice (allowed: each once)")
            out.append(threat)
    return out
