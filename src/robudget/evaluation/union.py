"""Several threats at once: the verdicts under each, and the images that stand against all of them."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from robudget import files
from robudget.accuracy import wilson
from robudget.attacks.victim import Model
from robudget.errors import InputError
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.spent import Spent
from robudget.evaluation.state import Progress
from robudget.evaluation.verdicts import Verdicts, merge
from robudget.threat import Threat

FILE = "union.json"
FORMAT = 1


@dataclass(frozen=True)
class Union:
    """The verdicts under each threat, of one model on the same images. An image stands if no threat breaks it."""

    parts: Sequence[Verdicts]

    def __post_init__(self) -> None:
        first = self.parts[0]
        for part in self.parts[1:]:
            if any(part.about.get(key) != first.about.get(key) for key in ("weights", "images", "labels")) or not (
                np.array_equal(part.frame["index"], first.frame["index"])
            ):
                raise InputError(f"{first.threat} and {part.threat} are of different models or images (allowed: one)")

    @property
    def threats(self) -> list[Threat]:
        return [part.threat for part in self.parts]

    @property
    def n(self) -> int:
        return len(self.parts[0])

    @property
    def robust(self) -> NDArray[np.bool_]:
        """(n,) bool: survived every attack of every threat."""
        return np.asarray(np.logical_and.reduce([part.robust for part in self.parts]))

    @property
    def robust_accuracy(self) -> float:
        return float(self.robust.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of `robust_accuracy`."""
        return wilson(int(self.robust.sum()), self.n)

    @property
    def clean_accuracy(self) -> float:
        return self.parts[0].clean_accuracy

    @property
    def total(self) -> Spent:
        """Passes, FLOPs, energy and seconds of all of them; the clean pass is in the first alone."""
        return functools.reduce(operator.add, (part.total for part in self.parts))

    def to_frame(self) -> pd.DataFrame:
        """A line per image: index, label, what broke it under each threat (a column each), robust."""
        frame = self.parts[0].frame[["index", "label"]].copy()
        for part in self.parts:
            frame[part.threat.slug] = part.frame["broken_by"].to_numpy()
        return frame.assign(robust=self.robust)

    def summary(self) -> dict[str, Any]:
        """What `union.json` holds: accuracies are fractions."""
        return {
            "format": FORMAT,
            "kind": "union",
            "n": self.n,
            "clean_accuracy": self.clean_accuracy,
            "union_accuracy": self.robust_accuracy,
            "interval": list(self.interval),
            "threats": [
                {
                    "threat": str(part.threat),
                    "folder": part.threat.slug,
                    "robust_accuracy": part.robust_accuracy,
                    "interval": list(part.interval),
                    "only": self._only(part),
                    "forward": part.total.forward,
                    "backward": part.total.backward,
                    "flops": part.flops,
                    "seconds": part.seconds,
                    "energy_kwh": part.energy_kwh,
                    "findings": [finding.name for finding in part.findings],
                }
                for part in self.parts
            ],
            **self.total.bill,
            "about": {key: self.parts[0].about.get(key) for key in ("weights", "dataset", "version", "seed")},
        }

    def _only(self, part: Verdicts) -> int:
        """How many images this threat alone breaks."""
        others = [other.robust for other in self.parts if other is not part]
        return int((np.logical_and.reduce([~part.robust & part.clean, *others])).sum())

    def page(self) -> str:
        """One table of all threats; ends with a newline."""
        low, high = (100 * end for end in self.interval)
        clean_low, clean_high = (100 * end for end in self.parts[0].clean_interval)
        lines = [
            f"Robust accuracy {100 * self.robust_accuracy:.2f}% [{low:.2f}, {high:.2f}] against all of "
            f"{_named(self.threats)}, image by image, on {self.n} images (95% Wilson interval)",
            f"Clean accuracy  {100 * self.clean_accuracy:.2f}% [{clean_low:.2f}, {clean_high:.2f}]",
            "",
            f"{'threat':<16}{'robust %':>10}{'95% interval':>18}{'only this breaks':>18}{'forward':>12}{'backward':>12}"
            f"{'FLOP':>10}{'seconds':>10}{'Wh':>9}  findings",
        ]
        for part in self.parts:
            low, high = (100 * end for end in part.interval)
            lines.append(
                f"{part.threat!s:<16}{100 * part.robust_accuracy:>10.2f}{f'[{low:.2f}, {high:.2f}]':>18}"
                f"{self._only(part):>18}{cost(part.total)}  {', '.join(f.name for f in part.findings) or 'none'}"
            )
        low, high = (100 * end for end in self.interval)
        lines.append(
            f"{'all':<16}{100 * self.robust_accuracy:>10.2f}{f'[{low:.2f}, {high:.2f}]':>18}{'':>18}{cost(self.total)}"
        )
        lines += ["", "Each threat's own page, verdicts and checks are in its folder. The clean pass was made once."]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write union.parquet, verdict.txt and (last) union.json; the verdicts of each threat have folders of their own
        in it already, or get them."""
        path = Path(folder)
        for part in self.parts:
            if not (path / part.threat.slug / "result.json").exists():
                part.save(path / part.threat.slug)
        files.replace(path / "union.parquet", lambda temporary: self.to_frame().to_parquet(temporary, index=False))
        files.write_text(path / "verdict.txt", self.page())
        files.write_json(path / FILE, self.summary())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote. Raises InputError."""
        path = Path(folder)
        try:
            data = json.loads((path / FILE).read_text("utf-8"))
            if data.get("format") != FORMAT:
                raise InputError(f"{path / FILE} has format {data.get('format')} (this version reads {FORMAT})")
            names = [item["folder"] for item in data["threats"]]
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise InputError(f"cannot read the threats from {str(path)!r}: {error}") from None
        return cls([Verdicts.load(path / name) for name in names])


def merge_unions(parts: Sequence[Union]) -> Union:
    """One over the images of all parts, which are of the same threats. Raises InputError."""
    threats = parts[0].threats
    for part in parts:
        if part.threats != threats:
            raise InputError(f"the shards are of different threats: {_named(threats)} and {_named(part.threats)}")
    return Union([merge([part.parts[n] for part in parts]) for n in range(len(threats))])


def evaluate_threats(
    model: Model,
    x: Tensor,
    y: Tensor,
    threats: Sequence[Threat],
    *,
    state: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Union:
    """Verdicts under each of `threats`, and their union. `settings` and the rest are those of `evaluate`; `state`: a
    folder that gets a sub-folder for each threat. Raises InputError."""
    check_threats(threats, str(settings.get("version", "standard")))
    parts: list[Verdicts] = []
    for n, threat in enumerate(threats):
        parts.append(
            evaluate(
                model,
                x,
                y,
                threat,
                state=None if state is None else Path(state) / threat.slug,
                progress=told_of(progress, threat, n, len(threats)),
                known=parts[0] if parts else None,
                **settings,
            )
        )
    return Union(parts)


def check_threats(threats: Sequence[Threat], version: str) -> None:
    """Raises InputError for no threats, one that is there twice, and a version without a verdict for each image."""
    if not threats or len(set(threats)) < len(threats):
        raise InputError(f"threats = {_named(threats) or 'none'} (allowed: at least one, each once)")
    if version == "quick" and len(threats) > 1:
        raise InputError("several threats with version quick, which estimates (allowed: standard, plus, rand)")


def told_of(
    progress: Callable[[Progress], None] | None, threat: Threat, n: int, count: int
) -> Callable[[Progress], None] | None:
    """Progress of the n-th (from 0) of `count` threats as that of all."""
    if progress is None:
        return None

    def tell(now: Progress) -> None:
        progress(replace(now, attack=f"{threat}, {now.attack}", fraction=(n + now.fraction) / count, seconds_left=None))

    return tell


def _named(threats: Sequence[Threat]) -> str:
    return ", ".join(map(str, threats))


def cost(spent: Spent) -> str:
    """Forward and backward passes, FLOP, seconds and Wh, in columns of 12, 12, 10, 10 and 9."""
    flops = "unknown" if spent.flops is None else f"{spent.flops:.2e}"
    wh = "unknown" if spent.energy_kwh is None else f"{1000 * spent.energy_kwh:.3g}"
    return f"{spent.forward:>12}{spent.backward:>12}{flops:>10}{spent.seconds:>10.1f}{wh:>9}"
