"""A verdict per image, with what each attack took and what the checks found; saved as parquet and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget import files
from robudget.accuracy import wilson
from robudget.errors import InputError
from robudget.evaluation.examples import Examples
from robudget.evaluation.page import page
from robudget.threat import Threat

FORMAT = 1
COLUMNS = ("index", "label", "broken_by", "when", "restart", "target", "clean_margin", "worst_margin")


@dataclass(frozen=True)
class Finding:
    """A named warning: what was seen (`evidence`) and what to do about it (`advice`)."""

    name: str
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Spent:
    """What one attack took. `images` entered it, `broken` of them fell; passes are of images, padding included.

    `refuted` claims were made in the attack's own arithmetic and not confirmed in float32. `energy_kwh` (at the plug,
    without PUE, `energy_how` obtained) is known where the evaluation ran inside a meter, `flops` where the model's were
    counted: None is unknown.
    """

    attack: str
    images: int = 0
    broken: int = 0
    refuted: int = 0
    seconds: float = 0.0
    forward: int = 0
    backward: int = 0
    flops: float | None = None
    energy_kwh: float | None = None
    energy_how: str | None = None
    done: bool = False

    def add_energy(self, kwh: float, how: str) -> None:
        """Book what a meter's window took. Once a part of it is unknown (NaN), so is the whole."""
        known = not math.isnan(kwh) and not (self.energy_how is not None and self.energy_kwh is None)
        self.energy_kwh = (self.energy_kwh or 0.0) + kwh if known else None
        self.energy_how = how if known and self.energy_how in (None, how) else "estimated" if known else "unknown"


@dataclass(frozen=True)
class Verdicts:
    """One line per image (in the order of the images), and how it was come by.

    `frame` has the columns `index` (row in the full split), `label`, `broken_by` ("clean", an attack's name, "robust"),
    `when` (the evaluation of the model within its row that broke it, 0 otherwise), `restart`, `target` (class, −1:
    none), `clean_margin` and `worst_margin` (z_y − the largest other logit: unattacked, and the smallest seen). `about`
    holds seed, version, precision, threads, device, batch size and fingerprints.
    """

    frame: pd.DataFrame
    threat: Threat
    spent: Sequence[Spent]
    findings: Sequence[Finding]
    about: Mapping[str, Any]
    examples: Examples | None = None
    """The adversarial examples, where they were asked for; `save` writes them to examples.npz."""

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def n(self) -> int:
        return len(self.frame)

    @property
    def broken_by(self) -> NDArray[np.str_]:
        """(n,) names: `clean` (misclassified unattacked), the attack that broke the image first, or `robust`."""
        return self.frame["broken_by"].to_numpy(dtype=str)

    @property
    def robust(self) -> NDArray[np.bool_]:
        """(n,) bool: survived everything."""
        return np.asarray(self.broken_by == "robust")

    @property
    def clean(self) -> NDArray[np.bool_]:
        """(n,) bool: classified correctly, unattacked."""
        return np.asarray(self.broken_by != "clean")

    @property
    def robust_accuracy(self) -> float:
        """Fraction of the images."""
        return float(self.robust.mean())

    @property
    def clean_accuracy(self) -> float:
        return float(self.clean.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the robust accuracy."""
        return wilson(int(self.robust.sum()), self.n)

    @property
    def clean_interval(self) -> tuple[float, float]:
        return wilson(int(self.clean.sum()), self.n)

    @property
    def calls(self) -> dict[str, int]:
        """Image passes as `<attack>_forward` and `<attack>_backward`, to be multiplied by FLOPs per pass."""
        out = {}
        for item in self.spent:
            out[f"{item.attack}_forward"] = item.forward
            out[f"{item.attack}_backward"] = item.backward
        return out

    @property
    def seconds(self) -> float:
        return sum(item.seconds for item in self.spent)

    @property
    def flops(self) -> float | None:
        """Of all attacks, clean pass and checks included; None: unknown."""
        return _sum(item.flops for item in self.spent)

    @property
    def energy_kwh(self) -> float | None:
        """Of all attacks, clean pass and checks included; None: unknown."""
        return _sum(item.energy_kwh for item in self.spent)

    @property
    def energy_how(self) -> str | None:
        """`measured`, `estimated` or `unknown`, as the least certain attack's; None without a meter."""
        ways = {item.energy_how for item in self.spent}
        return ways.pop() if len(ways) == 1 else "unknown" if self.energy_kwh is None else "estimated"

    def with_flops(self, forward: float, backward: float) -> Verdicts:
        """The same with each attack's FLOPs, from those of one image's pass forward and back to the image."""
        priced = [replace(item, flops=item.forward * forward + item.backward * backward) for item in self.spent]
        return replace(self, spent=priced)

    def after_each(self) -> dict[str, float]:
        """Accuracy left after each stage, in order: {"clean": …, "apgd-ce": …, …}, fractions."""
        left, out = np.ones(self.n, dtype=bool), {}
        for item in self.spent:
            name = item.attack
            # What the confirmation in float32 broke is booked under the attack's own name.
            if name != "checks" and "@" not in name:
                left = left & (self.broken_by != name)
                out[name] = float(left.mean())
        return out

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def summary(self) -> dict[str, Any]:
        """What `result.json` holds beside the table: accuracies are fractions."""
        return {
            "format": FORMAT,
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "n": self.n,
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": list(self.clean_interval),
            "robust_accuracy": self.robust_accuracy,
            "interval": list(self.interval),
            "after_each": self.after_each(),
            "seconds": self.seconds,
            "flops": self.flops,
            "energy_kwh": self.energy_kwh,
            "energy_how": self.energy_how,
            "spent": [asdict(item) for item in self.spent],
            "findings": [finding.to_dict() for finding in self.findings],
            "about": dict(self.about),
        }

    def save(self, folder: str | Path) -> Path:
        """Write verdicts.parquet, verdict.txt and (last) result.json into `folder`, each atomically."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        files.replace(path / "verdicts.parquet", lambda temporary: self.frame.to_parquet(temporary, index=False))
        files.write_text(path / "verdict.txt", page(self))
        if self.examples is not None:
            self.examples.save(path / "examples.npz")
        files.write_json(path / "result.json", self.summary())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Verdicts:
        """What `save` wrote. Raises InputError where it is not there, or not of this format."""
        path = Path(folder)
        try:
            data = json.loads((path / "result.json").read_text("utf-8"))
            if data.get("format") != FORMAT:
                raise InputError(
                    f"{path / 'result.json'} has format {data.get('format')} (this version reads {FORMAT})"
                )
            frame = pd.read_parquet(path / "verdicts.parquet")
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"cannot read an evaluation from {str(path)!r}: {error}") from None
        known = {f.name for f in fields(Spent)}
        return cls(
            frame=frame,
            threat=Threat(data["norm"], data["eps"]),
            spent=[Spent(**{k: v for k, v in item.items() if k in known}) for item in data["spent"]],
            findings=[Finding(**item) for item in data["findings"]],
            about=data["about"],
            examples=Examples.load(path / "examples.npz") if (path / "examples.npz").exists() else None,
        )


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if any(value is None for value in known) else sum(value for value in known if value is not None)
