"""The robustness curve: how near the nearest adversarial point of each image is, by minimum-norm attacks, at every ε.

An image falls at the smallest ε at which an attack found a point that the model as given misclassifies. Attacks find
points that are near, not the nearest: the curve is an upper bound of robust accuracy at each ε.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robudget.accuracy import wilson
from robudget.attacks.build import build, rows_of
from robudget.attacks.driver import drive
from robudget.attacks.ensemble import MINIMUM_NORM, Member, fit_to_classes
from robudget.attacks.geometry import GEOMETRY
from robudget.attacks.noise import Noise
from robudget.attacks.victim import Model, to_float
from robudget.errors import InputError, unknown
from robudget.evaluation.measurement import (
    Arrays,
    Measured,
    Piece,
    Setting,
    Work,
    everything,
    prepared,
    read,
    together,
)
from robudget.evaluation.spent import by_attack
from robudget.threat import NORMS, Norm, format_eps

# FMN finds most of the nearest points; FAB-T, which goes for one class at a time, finds some that FMN missed.
ATTACKS = ("fmn:steps=100", "fab-t:targets=3,steps=30")
POINTS = 101  # of the curve in the JSON file and the figure, from 0 to the limit
INSIDE = 1 + 1e-6  # a point counts as within ε up to this factor, as the contract of attacks allows


@dataclass(frozen=True, kw_only=True)
class Curve(Measured):
    """`frame` has a line per image: `index`, `label`, `clean_margin`, `distance` (0 where it is misclassified
    unattacked, NaN where no attack found a point), `found_by`."""

    norm: Norm
    limit: float
    kind = "curve"

    @property
    def distance(self) -> NDArray[np.float64]:
        """(n,) in the curve's norm; ∞ where no adversarial point was found."""
        return self.frame["distance"].fillna(np.inf).to_numpy(dtype=np.float64)

    def robust(self, eps: float) -> NDArray[np.bool_]:
        """(n,) bool: no adversarial point within ε was found."""
        distance = self.distance
        return np.asarray((distance > 0) & (distance > eps * INSIDE))

    def accuracy(self, eps: float) -> float:
        """The share of the images that are classified correctly and for which no point within ε was found."""
        return float(self.robust(eps).mean())

    def interval(self, eps: float) -> tuple[float, float]:
        """95% Wilson interval of `accuracy(eps)`, of that ε alone."""
        return wilson(int(self.robust(eps).sum()), self.n)

    @property
    def median(self) -> float:
        """The median distance of the images that are classified correctly; ∞ where most have no point."""
        distance = self.distance[self.distance > 0]
        return float(np.sort(distance)[(len(distance) - 1) // 2]) if len(distance) else float("nan")

    def points(self, count: int = POINTS) -> list[dict[str, float]]:
        """`count` points of the curve, evenly from ε = 0 to the limit: eps, accuracy, low, high."""
        out = []
        for eps in np.linspace(0, self.limit, count).tolist():
            low, high = self.interval(eps)
            out.append({"eps": eps, "accuracy": self.accuracy(eps), "low": low, "high": high})
        return out

    def results(self) -> dict[str, Any]:
        return {
            "norm": self.norm,
            "limit": self.limit,
            "upper_bound": True,
            "clean_accuracy": self.accuracy(0),
            "median_distance": self.median,
            "without_a_point": int(np.isinf(self.distance).sum()),
            "found_by": {str(name): int(n) for name, n in self.frame["found_by"].value_counts().items()},
            "at": self.about.get("at"),
            "curve": self.points(),
        }

    def page(self) -> str:
        rows = self.points(11)
        low, high = (100 * end for end in self.interval(0))
        median = "unknown" if not np.isfinite(self.median) else f"{self.median:.4g}"
        lines = [
            f"Robustness curve in {self.norm} up to ε = {_eps(self.norm, self.limit)}, on {self.n} images",
            f"Clean accuracy {100 * self.accuracy(0):.2f}% [{low:.2f}, {high:.2f}]; median distance to the nearest "
            f"adversarial point found: {median}",
            "",
            f"{'ε':>12}{'accuracy %':>12}{'95% interval':>18}",
            *(
                f"{row['eps']:>12.5g}{100 * row['accuracy']:>12.2f}"
                f"{'[' + format(100 * row['low'], '.2f') + ', ' + format(100 * row['high'], '.2f') + ']':>18}"
                for row in rows
            ),
            "",
            *textwrap.wrap(
                "An upper bound of robust accuracy: minimum-norm attacks "
                f"({', '.join(self.about.get('members', ()))}) find near adversarial points, not the nearest. "
                "Intervals are Wilson's, for each ε alone.",
                100,
            ),
            *([] if self.about.get("at") is None else textwrap.wrap(_beside(self.norm, self.about["at"]), 100)),
            "",
            *self.bill_lines(),
        ]
        return "\n".join(lines) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote. Raises InputError."""
        data, frame, spent = read(folder, cls.kind)
        return cls(frame=frame, spent=spent, about=data["about"], norm=data["norm"], limit=data["limit"])


def _eps(norm: Norm, eps: float) -> str:
    return format_eps(eps) if norm == "linf" else f"{eps:g}"


def _beside(norm: Norm, at: dict[str, Any]) -> str:
    text = f"At ε = {_eps(norm, at['eps'])} the curve says {100 * at['accuracy']:.2f}%"
    if at.get("autoattack") is None:
        return text + "; there is no evaluation by AutoAttack of this model and these images beside it."
    return (
        f"{text}, AutoAttack ({at['version']}) {100 * at['autoattack']:.2f}% of the same images: "
        f"{at['only_autoattack']} fell to AutoAttack alone, {at['only_curve']} to the curve's attacks alone."
    )


def curve(
    model: Model,
    x: Tensor,
    y: Tensor,
    norm: Norm = "linf",
    *,
    limit: float,
    attacks: Sequence[str | Member] = ATTACKS,
    setting: Setting | None = None,
    index: Tensor | None = None,
    classes: int | None = None,
) -> Curve:
    """The distance of each image x (N, C, H, W; float32 in [0, 1] or uint8), label y (N,) int64, to the nearest
    adversarial point found, and the accuracy at every ε up to `limit`. Attacks compute in float32.

    `attacks` are minimum-norm ones (fmn, fab-t, fab); the nearest point of any counts. Raises InputError.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if not limit > 0:
        raise InputError(f"eps = {limit:g} is where the curve ends (allowed: more than 0)")
    members = [item if isinstance(item, Member) else Member.parse(item) for item in attacks]
    for member in members:
        if member.name not in MINIMUM_NORM:
            raise unknown("minimum-norm attack", member.name, MINIMUM_NORM)
    if len({member.name for member in members}) < max(len(members), 1):
        raise InputError(f"attacks = {', '.join(map(str, members)) or 'none'} (allowed: at least one, each once)")
    with prepared(model, x, y, setting or Setting(), index=index, classes=classes) as work:
        if not work.victims.differentiable:
            raise InputError(f"{members[0].name} needs a gradient, and the model's logits carry none to the image")
        fitted = [fit_to_classes(member, work.victims.classes)[0] for member in members]
        about = work.about(kind="curve", norm=norm, members=[str(member) for member in fitted])
        (clean,) = work.run([work.clean()], about)
        right = torch.from_numpy(clean["margin"] > 0)
        pieces = [_piece(work, member, norm, limit, block, right) for member in fitted for block in work.blocks()]
        found = work.run(pieces, about)
        distance = np.where(right.numpy(), np.inf, 0.0)
        found_by = np.where(right.numpy(), "", "clean").astype(object)
        each = len(work.blocks())
        for n, arrays in enumerate(found):
            block, name = work.blocks()[n % each], fitted[n // each].name
            nearer = arrays["distance"] < distance[block]
            distance[block] = np.where(nearer, arrays["distance"], distance[block])
            found_by[block] = np.where(nearer, name, found_by[block])
        frame = pd.DataFrame(
            {
                "index": work.images.index.numpy(),
                "label": work.images.y.cpu().numpy(),
                "clean_margin": clean["margin"],
                "distance": np.where(np.isinf(distance), np.nan, distance),
                "found_by": found_by,
            }
        )
        return Curve(frame=frame, spent=by_attack(work.spent), about=about, norm=norm, limit=float(limit))


def _piece(work: Work, member: Member, norm: Norm, limit: float, block: slice, right: Tensor) -> Piece:
    """One attack on the correctly classified images of a block: `distance` (of the block), ∞ where it found none; those
    within the limit count as broken."""

    def compute() -> tuple[Arrays, int]:
        images, victims, setting = work.images, work.victims, work.setting
        x, y = images.x[block], images.y[block]
        threat, size = everything(norm, tuple(x.shape[1:])), GEOMETRY[norm].size
        out = torch.full((len(x),), torch.inf, dtype=torch.float64)
        some = right[block].nonzero().squeeze(1).to(images.device)
        if len(some):
            logits = torch.cat(
                [
                    victims.given.logits(to_float(part.to(images.device)))
                    for part in x.split(setting.batch_size)  # type: ignore[no-untyped-call]
                ]
            )
            reports = drive(
                build(member, victims.copy(precise=True), threat, setting.seed, first=False),
                rows_of(member, some, logits),
                x,
                y,
                threat,
                noise=Noise(setting.seed, images.index[block]),
                verify=victims.misclassified,
                batch_size=setting.batch_size,
                exhaust=True,
            )
            for report in reports:
                if len(report.image):
                    at = report.image.cpu()
                    away = size(report.x_adv.cpu().double() - to_float(x[at]).cpu().double())
                    out.scatter_reduce_(0, at, away, "amin")
        return {"distance": out.numpy()}, int((out <= limit).sum())

    return Piece(f"{member.name}-{block.start}-{block.stop}", member.name, int(right[block].sum()), compute)


def merge_curves(parts: Sequence[Curve]) -> Curve:
    """One curve over the images of all parts. Raises InputError."""
    frame, spent, about = together(parts)
    about.pop("at", None)
    limit = max(part.limit for part in parts)
    return Curve(frame=frame, spent=spent, about=about, norm=parts[0].norm, limit=limit)
