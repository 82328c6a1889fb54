"""Accuracy under common corruptions: each kind at each severity, their mean, and relative to another model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from torch import Tensor

from robudget.accuracy import wilson
from robudget.attacks.victim import Model, to_float
from robudget.errors import InputError
from robudget.evaluation.measurement import Arrays, Measured, Piece, Setting, Work, prepared, read, together
from robudget.evaluation.spent import by_attack
from robudget.evaluation.victims import misclassified

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True, kw_only=True)
class Corruptions(Measured):
    """`frame` has a line per image: `index`, `label`, and whether it is classified correctly, `clean` and under each
    corruption: a column `<kind>-<severity>`."""

    kind = "corruptions"

    @property
    def kinds(self) -> list[str]:
        return list(self.about["kinds"])

    def accuracy(self, kind: str, severity: int) -> float:
        return float(self.frame[f"{kind}-{severity}"].mean())

    def interval(self, kind: str, severity: int) -> tuple[float, float]:
        """95% Wilson interval of `accuracy`."""
        return wilson(int(self.frame[f"{kind}-{severity}"].sum()), self.n)

    def of_kind(self, kind: str) -> float:
        """The mean over the severities."""
        return float(np.mean([self.accuracy(kind, severity) for severity in SEVERITIES]))

    @property
    def mean(self) -> float:
        """The mean over kinds and severities."""
        return float(np.mean([self.of_kind(kind) for kind in self.kinds]))

    @property
    def mean_interval(self) -> tuple[float, float]:
        """95% interval of `mean` for other images of the kind: normal, from the spread of the images' own means (the
        answers for one image under 75 corruptions are not independent)."""
        columns = [f"{kind}-{severity}" for kind in self.kinds for severity in SEVERITIES]
        each = self.frame[columns].to_numpy(dtype=float).mean(1)
        half = 1.959964 * each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        return max(self.mean - half, 0.0), min(self.mean + half, 1.0)

    def relative_to(self, reference: Corruptions) -> float:
        """The mean corruption error (mCE): over kinds, the mean of this model's errors over those of the reference,
        each summed over severities (Hendrycks & Dietterich 2019, there with AlexNet as the reference)."""
        missing = sorted(set(self.kinds) - set(reference.kinds))
        if missing or self.about.get("source") != reference.about.get("source"):
            what = f"lacks {', '.join(missing)}" if missing else f"is of {reference.about.get('source')}"
            raise InputError(f"the reference {what} (allowed: the same corruptions, of {self.about.get('source')})")
        ratios = []
        for kind in self.kinds:
            error = 1 - reference.of_kind(kind)
            if error == 0:
                raise InputError(f"the reference makes no error under {kind}, to which errors would be relative")
            ratios.append((1 - self.of_kind(kind)) / error)
        return float(np.mean(ratios))

    def results(self) -> dict[str, Any]:
        clean = int(self.frame["clean"].sum())
        return {
            "clean_accuracy": clean / self.n,
            "clean_interval": list(wilson(clean, self.n)),
            "corruption_accuracy": self.mean,
            "corruption_interval": list(self.mean_interval),
            "made": self.about.get("made"),
            "source": self.about.get("source"),
            "relative": self.about.get("relative"),
            "kinds": {
                kind: {
                    "mean": self.of_kind(kind),
                    "accuracy": [self.accuracy(kind, severity) for severity in SEVERITIES],
                    "interval": [list(self.interval(kind, severity)) for severity in SEVERITIES],
                }
                for kind in self.kinds
            },
        }

    def page(self) -> str:
        low, high = (100 * end for end in self.mean_interval)
        clean = int(self.frame["clean"].sum())
        clean_low, clean_high = (100 * end for end in wilson(clean, self.n))
        computed = self.about.get("made") == "computed"
        note = "with ImageNet-C's constants, so not comparable with CIFAR-10-C" if computed else "read from files"
        lines = [
            f"Accuracy under corruptions {100 * self.mean:.2f}% [{low:.2f}, {high:.2f}], the mean of {len(self.kinds)} "
            f"kinds at 5 severities, on {self.n} images",
            f"Clean accuracy {100 * clean / self.n:.2f}% [{clean_low:.2f}, {clean_high:.2f}]",
            f"Corruptions by {self.about.get('source')}, {note}",
            *self._relative(),
            "",
            f"{'accuracy %, by severity':<24}" + "".join(f"{severity:>8}" for severity in SEVERITIES) + f"{'mean':>8}",
            *(
                f"{kind:<24}"
                + "".join(f"{100 * self.accuracy(kind, severity):>8.2f}" for severity in SEVERITIES)
                + f"{100 * self.of_kind(kind):>8.2f}"
                for kind in self.kinds
            ),
            "",
            f"Each with its 95% interval in {self.kind}.json.",
            "",
            *self.bill_lines(),
        ]
        return "\n".join(lines) + "\n"

    def _relative(self) -> list[str]:
        relative = self.about.get("relative")
        if relative is None:
            return []
        return [f"Mean corruption error {100 * relative['mce']:.1f}% of that of {relative['reference']}"]

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote. Raises InputError."""
        data, frame, spent = read(folder, cls.kind)
        return cls(frame=frame, spent=spent, about=data["about"])


def corruptions(
    model: Model,
    x: Tensor,
    y: Tensor,
    corrupted: Callable[[str, int, range], Tensor],
    kinds: Sequence[str],
    *,
    setting: Setting | None = None,
    index: Tensor | None = None,
    classes: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Corruptions:
    """The accuracy on images x (N, C, H, W; float32 in [0, 1] or uint8), label y (N,) int64, under each kind of
    corruption at each severity. `corrupted(kind, severity, rows)` gives the images of these rows of x, corrupted;
    `about`: what more has to be equal for a resume. Raises InputError."""
    if not kinds:
        raise InputError("corruptions = none (allowed: at least one kind)")
    with prepared(model, x, y, setting or Setting(), index=index, classes=classes) as work:
        identity = work.about(measures="corruptions", kinds=list(kinds), **(about or {}))
        (clean,) = work.run([work.clean()], identity)
        grid = [(kind, severity) for kind in kinds for severity in SEVERITIES]
        found = work.run([_piece(work, corrupted, kind, severity) for kind, severity in grid], identity)
        columns = {f"{kind}-{severity}": arrays["right"] for (kind, severity), arrays in zip(grid, found, strict=True)}
        frame = pd.DataFrame(
            {
                "index": work.images.index.numpy(),
                "label": work.images.y.cpu().numpy(),
                "clean": clean["margin"] > 0,
                **columns,
            }
        )
        return Corruptions(frame=frame, spent=by_attack(work.spent), about=identity)


def _piece(work: Work, corrupted: Callable[[str, int, range], Tensor], kind: str, severity: int) -> Piece:
    """`right` (n,) bool."""

    def compute() -> tuple[Arrays, int]:
        right = np.zeros(work.n, dtype=bool)
        for part, _, y in work.images.batches(work.setting.batch_size):
            rows = range(part.start, min(part.stop, work.n))
            images = to_float(corrupted(kind, severity, rows).to(work.images.device))
            right[part] = ~misclassified(work.victims.given.logits(images), y).cpu().numpy()
        return {"right": right}, int((~right).sum())

    return Piece(f"{kind}-{severity}", kind, work.n, compute)


def merge_corruptions(parts: Sequence[Corruptions]) -> Corruptions:
    """One over the images of all parts. Raises InputError."""
    frame, spent, about = together(parts)
    about.pop("relative", None)
    return Corruptions(frame=frame, spent=spent, about=about)
