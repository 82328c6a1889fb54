"""What an evaluation has found so far, per image; written atomically, so that a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robudget import files
from robudget.errors import InputError
from robudget.evaluation.examples import Examples
from robudget.evaluation.verdicts import Spent
from robudget.threat import Threat

FILE = "evaluation.npz"
STANDING = "robust"


@dataclass
class State:
    """Per image: `broken_by` ("robust" while it stands), when, restart, target, margins, and whether the stage in
    progress is over for it. `spent` has an entry per stage begun; `examples` maps a broken image to its example."""

    broken_by: NDArray[np.str_]
    when: NDArray[np.int64]
    restart: NDArray[np.int64]
    target: NDArray[np.int64]
    clean_margin: NDArray[np.float32]
    worst_margin: NDArray[np.float32]
    finished: NDArray[np.bool_]
    spent: dict[str, Spent] = field(default_factory=dict)
    examples: dict[int, NDArray[np.float32]] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def blank(cls, n: int, *, keep_examples: bool) -> State:
        counts = np.zeros(n, dtype=np.int64)
        return cls(
            broken_by=np.full(n, STANDING, dtype="U16"),
            when=counts,
            restart=counts.copy(),
            target=counts - 1,
            clean_margin=np.full(n, np.nan, dtype=np.float32),
            worst_margin=np.full(n, np.inf, dtype=np.float32),
            finished=np.zeros(n, dtype=bool),
            examples={} if keep_examples else None,
        )

    @property
    def standing(self) -> NDArray[np.bool_]:
        return np.asarray(self.broken_by == STANDING)

    def table(self, index: NDArray[np.int64], label: NDArray[np.int64]) -> pd.DataFrame:
        """`Verdicts.frame`, of images with these rows of the split and labels."""
        return pd.DataFrame(
            {
                "index": index,
                "label": label,
                "broken_by": self.broken_by.astype(object),
                "when": self.when,
                "restart": self.restart,
                "target": self.target,
                "clean_margin": self.clean_margin,
                "worst_margin": np.where(np.isfinite(self.worst_margin), self.worst_margin, self.clean_margin),
            }
        )

    def kept(
        self, index: NDArray[np.int64], label: NDArray[np.int64], shape: Sequence[int], threat: Threat
    ) -> Examples | None:
        """The examples of images of this shape (C, H, W); None where they were not wanted."""
        if self.examples is None:
            return None
        at = sorted(self.examples)
        x_adv = np.stack([self.examples[i] for i in at]) if at else np.empty((0, *shape), dtype=np.float32)
        return Examples(index[at], label[at], x_adv, threat)

    def save(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Write the whole state into `folder`, atomically."""
        about = {
            "identity": dict(identity),
            "spent": {name: asdict(item) for name, item in self.spent.items()},
            "notes": self.notes,
            "keeps": self.examples is not None,
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if self.examples:
            arrays["example_of"] = np.array(list(self.examples), dtype=np.int64)
            arrays["examples"] = np.stack(list(self.examples.values()))

        def write(path: Path) -> None:
            np.savez(path, about=np.array(json.dumps(files.to_plain(about))), **arrays)

        folder.mkdir(parents=True, exist_ok=True)
        files.replace(folder / FILE, write)

    @classmethod
    def load(cls, folder: Path, identity: Mapping[str, Any]) -> State | None:
        """The state in `folder`, None where there is none. Raises InputError, with the reason, if it is of another
        evaluation than `identity` says."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as data:
                about = json.loads(str(data["about"]))
                arrays = {name: data[name] for name in _ARRAYS}
                found = (
                    {int(i): x for i, x in zip(data["example_of"], data["examples"], strict=True)}
                    if ("examples" in data)
                    else {}
                )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"cannot resume from {path}: {error} (delete it, --restart, to start again)") from None
        theirs = about["identity"]
        for key, value in files.to_plain(identity).items():
            if theirs.get(key) != value:
                raise InputError(
                    f"cannot resume from {path}: {_SPOKEN.get(key, key)} differs ({_brief(theirs.get(key))} there, "
                    f"{_brief(value)} now); use another folder, or delete it (--restart) to start again"
                )
        spent = {name: Spent(**item) for name, item in about["spent"].items()}
        return cls(**arrays, spent=spent, notes=about["notes"], examples=found if about["keeps"] else None)


def begun_seed(folder: Path) -> int | None:
    """The seed of the evaluation whose state is in `folder`; None where there is none."""
    if not (folder / FILE).exists():
        return None
    with np.load(folder / FILE, allow_pickle=False) as data:
        return int(json.loads(str(data["about"]))["identity"]["seed"])


_ARRAYS = ("broken_by", "when", "restart", "target", "clean_margin", "worst_margin", "finished")
_SPOKEN = {
    "weights": "the model (its weights)",
    "images": "the data (images)",
    "labels": "the data (labels)",
    "index": "the data (which rows of the split)",
    "attacks": "the version (its attacks)",
    "members": "the version (its attacks' settings)",
}


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def fingerprint(*tensors: Tensor) -> str:
    """12 hex digits of the tensors' dtypes, shapes and bytes, a bounded piece at a time."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().view(-1)
        for piece in flat.split(1 << 22) if flat.numel() else ():  # type: ignore[no-untyped-call]
            digest.update(piece.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def weights_of(model: Callable[[Tensor], Tensor], logits: Callable[[], Tensor]) -> str:
    """A model's fingerprint: its class and everything in its state dict; of a plain function, the logits it gives."""
    if not isinstance(model, nn.Module):
        return f"function {fingerprint(logits())}"
    state = cast(dict[str, Tensor], {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)})
    names = hashlib.sha256("\n".join(state).encode()).hexdigest()[:4]
    return f"{type(model).__name__} {names}{fingerprint(*state.values())}"
