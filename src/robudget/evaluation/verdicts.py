"""A verdict per image, what each attack took and what the checks found: saved, merged from shards, told on a page."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget import files
from robudget.accuracy import wilson
from robudget.errors import InputError
from robudget.evaluation.audit import Audit
from robudget.evaluation.confirmation import Blocks, Confirmation
from robudget.evaluation.examples import Examples
from robudget.evaluation.page import page as page
from robudget.evaluation.spent import PASSES, Finding, Spent, by_attack
from robudget.threat import Threat

FORMAT = 1
COLUMNS = ("index", "label", "broken_by", "when", "restart", "target", "clean_margin", "worst_margin")


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
    confirmation: Confirmation | None = None
    """What attacking survivors again in float32 showed; None where all attacks were in float32, or it was not kept."""
    audit: Audit | None = None
    """Of version quick: what the full ensemble did to a sample; `frame` has a column `audited` then."""
    votes: Mapping[str, int] | None = None
    """Of a randomised model: how many passes decided on an image, and on how many examples; `frame` has then the
    columns `clean_error` and `worst_error`, shares of those passes in which the model errs (`votes.py`)."""

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
        """Fraction of the images; with an audit, what the full ensemble is expected to leave."""
        return float(self.robust.mean()) if self.audit is None else self.audit.estimate / self.n

    @property
    def audit_deviation(self) -> float:
        """Standard deviation, a fraction, that an audit leaves to `robust_accuracy`; 0 without one, when every image
        has its verdict."""
        return 0.0 if self.audit is None else self.audit.deviation / self.n

    @property
    def clean_accuracy(self) -> float:
        return float(self.clean.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the robust accuracy. With an audit it is at least 95%, of both the images and the
        audit: half of the error is spent on each (Bonferroni)."""
        if self.audit is None:
            return wilson(int(self.robust.sum()), self.n)
        low, high = self.audit.robust(0.025)
        return wilson(low, self.n, 0.975)[0], wilson(high, self.n, 0.975)[1]

    @property
    def audit_interval(self) -> tuple[float, float] | None:
        """With an audit: where the full ensemble's accuracy on these very images lies (95%; the upper end is sure)."""
        if self.audit is None:
            return None
        low, high = self.audit.robust()
        return low / self.n, high / self.n

    @property
    def clean_interval(self) -> tuple[float, float]:
        return wilson(int(self.clean.sum()), self.n)

    @property
    def right_in_passes(self) -> tuple[float, float] | None:
        """Of a randomised model, the share of single passes that are right: on the images, and on the strongest
        examples found. The second is an upper bound: images misclassified by most passes are not attacked."""
        if self.votes is None:
            return None
        return 1 - float(self.frame["clean_error"].mean()), 1 - float(self.frame["worst_error"].mean())

    @property
    def calls(self) -> dict[str, int]:
        """Image passes as `<attack>_forward` and `<attack>_backward`, times the FLOPs of a pass of the model."""
        return {f"{item.attack}_{way}": getattr(item, way) for item in self.spent for way in PASSES[:2]}

    @property
    def surrogate_calls(self) -> dict[str, int]:
        """The same through the surrogate: `<attack>_surrogate_forward` and so on; {} where there was none."""
        calls = {f"{item.attack}_{way}": getattr(item, way) for item in self.spent for way in PASSES[2:]}
        return {name: number for name, number in calls.items() if number}

    @property
    def total(self) -> Spent:
        """Of all attacks, clean pass and checks included; its `images` and `broken` are of no use."""
        return functools.reduce(operator.add, self.spent)

    @property
    def seconds(self) -> float:
        return self.total.seconds

    @property
    def flops(self) -> float | None:
        """Of all attacks, clean pass and checks included; None: unknown."""
        return self.total.flops

    @property
    def energy_kwh(self) -> float | None:
        """Of all attacks, clean pass and checks included; None: unknown."""
        return self.total.energy_kwh

    @property
    def energy_how(self) -> str | None:
        """`measured`, `estimated` or `unknown`, as the least certain attack's; None without a meter."""
        return self.total.energy_how

    def with_flops(self, forward: float, backward: float, surrogate: tuple[float, float] | None = None) -> Verdicts:
        """The same with each attack's FLOPs, from those of one image's pass forward and back to the image; `surrogate`
        has those of the surrogate: where they are unknown (None), so is what an attack took that used it."""
        return replace(self, spent=[item.with_flops(forward, backward, surrogate) for item in self.spent])

    def after_each(self) -> dict[str, float]:
        """Accuracy left after each stage, in order: {"clean": …, "apgd-ce": …, …}, fractions."""
        left, out = np.ones(self.n, dtype=bool), {}
        audited = self.frame["audited"].to_numpy() if self.audit is not None else np.zeros(self.n, dtype=bool)
        for item in self.spent:
            name = item.attack
            # What the confirmation in float32 broke is booked under the attack's own name; an audit's hits are apart.
            if name not in ("checks", "votes") and "@" not in name:
                left = left & ((self.broken_by != name) | audited)
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
            "votes": None if self.votes is None else {**self.votes, "right_in_passes": self.right_in_passes},
            "confirmation": None if self.confirmation is None else self.confirmation.to_dict(),
            "audit": None
            if self.audit is None
            else self.audit.to_dict() | {"estimate": self.robust_accuracy, "interval": list(self.audit_interval or ())},
        }

    def save(self, folder: str | Path) -> Path:
        """Write verdicts.parquet, verdict.txt and (last) result.json into `folder`, each atomically."""
        path = Path(folder)
        files.make_folder(path)
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
        names = {f.name for f in fields(Spent)}
        return cls(
            frame=frame,
            threat=Threat(data["norm"], data["eps"]),
            spent=[Spent(**{k: v for k, v in item.items() if k in names}) for item in data["spent"]],
            findings=[Finding(**item) for item in data["findings"]],
            about=data["about"],
            confirmation=Confirmation.from_dict(data["confirmation"]) if data.get("confirmation") else None,
            audit=Audit.from_dict(data["audit"]) if data.get("audit") else None,
            votes={k: v for k, v in data["votes"].items() if k != "right_in_passes"} if data.get("votes") else None,
            examples=Examples.load(path / "examples.npz") if (path / "examples.npz").exists() else None,
        )


# -- shards -----------------------------------------------------------------------------------------------------------

# What has to be equal for two shards to be parts of one evaluation.
SAME = ("weights", "backward", "votes", "version", "attacks", "members", "seed", "precision", "batch_size")


def merge(parts: Sequence[Verdicts]) -> Verdicts:
    """One `Verdicts` over the images of all `parts`, in the order of their rows; times and passes are added up.

    Raises InputError for no parts, for parts of different evaluations, and for images that are in two of them.
    """
    if not parts:
        raise InputError("nothing to merge")
    first = parts[0]
    for part in parts[1:]:
        if part.threat != first.threat:
            raise InputError(f"the shards are of different threats: {first.threat} and {part.threat}")
        for key in SAME:
            functions = all(str(p.about.get(key)).startswith("function") for p in (part, first))
            if key in ("weights", "backward") and functions:
                continue  # a plain function is known by its answers to the images only, and those differ
            if part.about.get(key) != first.about.get(key):
                values = f"{first.about.get(key)!r} and {part.about.get(key)!r}"
                raise InputError(f"the shards are of different evaluations: {key} = {values}")
    frame = pd.concat([part.frame for part in parts]).sort_values("index", kind="stable").reset_index(drop=True)
    twice = frame["index"][frame["index"].duplicated()]
    if len(twice):
        raise InputError(f"{len(twice)} images are in more than one shard (row {twice.iloc[0]} among them)")
    spent = by_attack(item for part in parts for item in part.spent)
    # Each finding once, as the first shard that has it gives it.
    findings = {finding.name: finding for part in reversed(parts) for finding in part.findings}
    about = {**first.about, "shards": len(parts)}
    if "transfer" in about:
        counts = [part.about["transfer"] for part in parts]
        about["transfer"] = [
            items[0] | {name: sum(item[name] for item in items) for name in ("examples", "outside")}
            for items in zip(*counts, strict=True)
        ]
    return Verdicts(
        frame,
        first.threat,
        spent,
        list(findings.values()),
        about,
        _examples(parts),
        confirmation=_together([part.confirmation for part in parts]),
        audit=_together([part.audit for part in parts]),
        votes=_votes([part.votes for part in parts]),
    )


def _votes(parts: Sequence[Mapping[str, int] | None]) -> Mapping[str, int] | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return {name: n if name == "passes" else sum(part[name] for part in known) for name, n in known[0].items()}


B = TypeVar("B", bound=Blocks)


def _together(blocks: Sequence[B | None]) -> B | None:
    """Of all parts, where all have it."""
    known = [item for item in blocks if item is not None]
    return functools.reduce(operator.add, known) if len(known) == len(blocks) else None


def _examples(parts: Sequence[Verdicts]) -> Examples | None:
    """Those of all parts, where all have kept theirs."""
    examples = [part.examples for part in parts if part.examples is not None]
    if len(examples) < len(parts):
        return None
    index, label, x_adv = (np.concatenate([getattr(e, name) for e in examples]) for name in ("index", "label", "x_adv"))
    order = np.argsort(index, kind="stable")
    return Examples(index[order], label[order], x_adv[order], parts[0].threat)
