"""Adversarial examples kept in one compact file, to be replayed against another model (transfer)."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robudget import files
from robudget.accuracy import wilson
from robudget.attacks.geometry import GEOMETRY
from robudget.attacks.victim import Victim, frozen, to_float
from robudget.backend.precision import float32_as
from robudget.errors import InputError
from robudget.threat import Threat


@dataclass(frozen=True)
class Examples:
    """x_adv (m, C, H, W) float32, bit for bit what broke the images `index` (rows of the full split) with `label`."""

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    x_adv: NDArray[np.float32]
    threat: Threat

    def __len__(self) -> int:
        return len(self.index)

    def save(self, path: str | Path) -> None:
        """Write a compressed npz, atomically. Bytes of equal significance lie together, which compresses better."""
        planes = np.ascontiguousarray(self.x_adv).view(np.uint8).reshape(*self.x_adv.shape, 4)
        arrays: dict[str, Any] = {
            "index": self.index,
            "label": self.label,
            "planes": np.moveaxis(planes, -1, 0),
            "norm": np.array(self.threat.norm),
            "eps": np.array(self.threat.eps),
        }
        files.replace(Path(path), lambda temporary: np.savez_compressed(temporary, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> Examples:
        """What `save` wrote. Raises InputError where it is not there or not readable."""
        try:
            with np.load(path, allow_pickle=False) as data:
                planes = np.ascontiguousarray(np.moveaxis(data["planes"], 0, -1))
                x_adv = planes.view(np.float32)[..., 0].copy()
                return cls(data["index"], data["label"], x_adv, Threat(str(data["norm"]), float(data["eps"])))  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"cannot read adversarial examples from {str(path)!r}: {error}") from None


@dataclass(frozen=True)
class Source:
    """The examples of a file that belong to the images of an evaluation: an image's row in the split → its example.

    `outside` of them lie outside the evaluation's ball, and are moved into it when they are shown.
    """

    file: str
    made: Threat
    of: dict[int, Tensor]
    outside: int
    digest: str

    @classmethod
    def load(cls, file: str, x: Tensor, y: Tensor, index: Tensor, threat: Threat) -> Source:
        """For images x (N, C, H, W) with labels y, rows `index` of the split. Raises InputError where an example has
        another shape or label than the image of its row, or lies farther from it than it was made."""
        path = Path(file)
        kept = Examples.load(path / "examples.npz" if path.is_dir() else path)
        if kept.x_adv.shape[1:] != x.shape[1:]:
            raise InputError(f"{file!r} holds images {kept.x_adv.shape[1:]} (allowed: {tuple(x.shape[1:])})")
        place = {row: n for n, row in enumerate(index.tolist())}
        here = [(n, place[row]) for n, row in enumerate(kept.index.tolist()) if row in place]
        mine, at = torch.tensor(here, dtype=torch.int64).view(-1, 2).T
        x_adv, x0, rows = torch.from_numpy(kept.x_adv)[mine], to_float(x.cpu()[at]), kept.index[mine.numpy()]
        other = (torch.from_numpy(kept.label)[mine] != y.cpu()[at]).nonzero()
        if len(other):
            n = int(other[0])
            raise InputError(
                f"{file!r} is of other images: its example of row {rows[n]} has label {kept.label[mine[n]]}, and the "
                f"image {int(y[at[n]])}"
            )
        far = GEOMETRY[kept.threat.norm].distance(x_adv, x0)
        wrong = (~(far <= kept.threat.eps * (1 + 1e-3) + 1e-6)).nonzero()
        if len(wrong):
            n = int(wrong[0])
            raise InputError(
                f"{file!r} is of other images: its example of row {rows[n]} is {float(far[n]):.4g} "
                f"({kept.threat.norm}) away from the image, and was made within {kept.threat.eps:.4g}"
            )
        outside = int((GEOMETRY[threat.norm].distance(x_adv, x0) > threat.eps * (1 + 1e-5)).sum())
        of = {int(row): example for row, example in zip(rows, x_adv, strict=True)}
        digest = hashlib.sha256()
        for array in (kept.index, kept.label, kept.x_adv):
            digest.update(np.ascontiguousarray(array).tobytes())
        return cls(file, kept.threat, of, outside, digest.hexdigest()[:12])

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "threat": str(self.made), "examples": len(self.of), "outside": self.outside}


@dataclass(frozen=True)
class Replay:
    """How another model fares: `fooled` (m,) bool per example."""

    examples: Examples
    fooled: NDArray[np.bool_]

    @property
    def transfer(self) -> float:
        """The fraction of the examples that fool this model too; NaN without examples."""
        return float(self.fooled.mean()) if len(self.fooled) else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of `transfer`."""
        return wilson(int(self.fooled.sum()), len(self.fooled))

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval if len(self.fooled) else (None, None)
        return {"threat": str(self.examples.threat), "n": len(self.fooled), "fooled": int(self.fooled.sum())} | {
            "transfer": self.transfer,
            "interval": [low, high],
        }

    def __str__(self) -> str:
        if not len(self.fooled):
            return "no examples to show"
        low, high = (100 * end for end in self.interval)
        return (
            f"{int(self.fooled.sum())} of {len(self.fooled)} examples ({self.examples.threat}) fool this model too: "
            f"{100 * self.transfer:.1f}% [{low:.1f}, {high:.1f}]"
        )


def replay(
    model: Callable[[Tensor], Tensor],
    examples: Examples | str | Path,
    *,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> Replay:
    """Show `examples` (or the file they are in) to a model, which lies on `device`, and see which it gets wrong."""
    examples = examples if isinstance(examples, Examples) else Examples.load(examples)
    x, y = torch.from_numpy(examples.x_adv), torch.from_numpy(examples.label)
    fooled = np.zeros(len(examples), dtype=bool)
    with frozen(model), float32_as(tf32=False):
        victim = Victim(model, most=batch_size)
        for first in range(0, len(examples), batch_size):
            part = slice(first, first + batch_size)
            wrong = victim.logits(x[part].to(device)).argmax(1).cpu() != y[part]
            fooled[part] = wrong.numpy()
    return Replay(examples, fooled)
