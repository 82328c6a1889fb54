"""Adversarial examples kept in one compact file, to be replayed against another model (transfer)."""

from __future__ import annotations

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
from robudget.attacks.victim import Victim, frozen
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
