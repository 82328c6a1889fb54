"""Where an evaluation is: verdicts so far, what each attack took, how far it is; saved, so that it resumes."""

from __future__ import annotations

import hashlib
import json
import math
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robudget import files
from robudget.attacks.driver import Outcome
from robudget.attacks.ensemble import Passes
from robudget.attacks.victim import to_float
from robudget.errors import InputError
from robudget.evaluation.examples import Examples
from robudget.evaluation.specification import Stage, line_of
from robudget.evaluation.spent import Spent
from robudget.threat import Norm, Threat

FILE = "evaluation.npz"
ROBUST = "robust"
TELL_EVERY_SECONDS = 0.2  # at least, between two reports of progress


# -- the verdicts so far ----------------------------------------------------------------------------------------------


@dataclass
class State:
    """Per image: `broken_by` ("robust" until it is broken), when, restart, target, margins, and whether the attack in
    progress is over for it. `spent` has an entry per attack that was saved; `examples` maps a broken image to its
    example."""

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
            broken_by=np.full(n, ROBUST, dtype="U16"),
            when=counts,
            restart=counts.copy(),
            target=counts - 1,
            clean_margin=np.full(n, np.nan, dtype=np.float32),
            worst_margin=np.full(n, np.inf, dtype=np.float32),
            finished=np.zeros(n, dtype=bool),
            examples={} if keep_examples else None,
        )

    @property
    def robust(self) -> NDArray[np.bool_]:
        return np.asarray(self.broken_by == ROBUST)

    def done(self, stage: str) -> bool:
        """Is the stage of this name over?"""
        return stage in self.spent and self.spent[stage].done

    def record(self, attack: str, outcome: Outcome) -> None:
        """Enter what an attack did; may be entered again later."""
        finished = outcome.finished.nonzero().squeeze(1).cpu().numpy()
        broken = outcome.broken.nonzero().squeeze(1).cpu().numpy()
        self.finished[finished] = True
        self.broken_by[broken] = attack
        for name in ("when", "restart", "target"):
            getattr(self, name)[broken] = getattr(outcome, name).cpu().numpy()[broken]
        self.worst_margin = np.fmin(self.worst_margin, outcome.worst.cpu().numpy())

    def keep(self, at: Tensor, x_adv: Tensor) -> None:
        """Keep the examples x_adv of the images at these positions, if examples are wanted."""
        if self.examples is not None and len(at):
            self.examples |= dict(zip(at.tolist(), x_adv.cpu().numpy(), strict=True))

    def table(
        self, index: NDArray[np.int64], label: NDArray[np.int64], audited: Sequence[int] | None = None
    ) -> pd.DataFrame:
        """`Verdicts.frame`, of images with these rows of the split and labels; `audited` are the positions of those
        that went through an audit, None where there was none."""
        frame = pd.DataFrame(
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
        return frame if audited is None else frame.assign(audited=np.isin(np.arange(len(frame)), audited))

    def examples_of(
        self, index: NDArray[np.int64], label: NDArray[np.int64], shape: Sequence[int], threat: Threat
    ) -> Examples | None:
        """The examples, of images with these rows and labels and shape (C, H, W); None where they were not wanted."""
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

        files.make_folder(folder)
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
                pairs = zip(data["example_of"], data["examples"], strict=True) if "examples" in data else ()
                examples = {int(i): x for i, x in pairs}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"cannot resume from {path}: {error} (delete it, --restart, to start again)") from None
        refuse_other(path, about["identity"], identity)
        spent = {name: Spent(**item) for name, item in about["spent"].items()}
        _adopt_confirmation(about["notes"], spent, arrays)
        return cls(**arrays, spent=spent, notes=about["notes"], examples=examples if about["keeps"] else None)


def refuse_other(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises InputError where what is in `path` is of another evaluation than this one."""
    for key, value in files.to_plain(now).items():
        if before.get(key) != value:
            raise InputError(
                f"cannot resume from {path}: {_WORDS.get(key, key)} differs ({_brief(before.get(key))} there, "
                f"{_brief(value)} now); use another folder, or delete it (--restart) to start again"
            )


def identity_of_state(folder: Path) -> dict[str, Any]:
    """What the evaluation whose state is in `folder` said of itself (`seed`, `threads`, …); {} where there is none, or
    a damaged one."""
    try:
        with np.load(folder / FILE, allow_pickle=False) as data:
            return dict(json.loads(str(data["about"]))["identity"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}


def _adopt_confirmation(notes: dict[str, Any], spent: dict[str, Spent], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Before there were blocks, the `nearest` were attacked again, and all if one of them fell: two blocks, of now."""
    if "nearest" not in notes:
        return
    nearest = notes.pop("nearest")
    rest = np.setdiff1d((arrays["broken_by"] == ROBUST).nonzero()[0], nearest)
    for name in [name for name in spent if name.endswith("@float32-all")]:
        spent[name.replace("-all", "-2")] = replace(spent.pop(name), attack=name.replace("-all", "-2"))
    notes["order"] = nearest + rest[np.argsort(arrays["worst_margin"][rest], kind="stable")].tolist()
    notes["blocks"] = [len(nearest)] + ([len(rest)] if any(name.endswith("@float32-2") for name in spent) else [])


_ARRAYS = ("broken_by", "when", "restart", "target", "clean_margin", "worst_margin", "finished")
_WORDS = {
    "weights": "the model (its weights)",
    "votes": "the number of passes that decide (votes)",
    "backward": "the surrogate (its weights)",
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
    """12 hex digits of the tensors' dtypes, shapes and bytes, a bounded piece at a time; of uint8 images, those of the
    floats that they stand for."""
    digest = hashlib.sha256()
    for tensor in tensors:
        images = tensor.dtype == torch.uint8 and tensor.dim() == 4
        digest.update(f"{torch.float32 if images else tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().view(-1)
        for piece in flat.split(1 << 22) if flat.numel() else ():  # type: ignore[no-untyped-call]
            piece = to_float(piece) if images else piece
            digest.update(piece.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def weights_of(model: Callable[[Tensor], Tensor], logits: Callable[[], Tensor]) -> str:
    """A model's fingerprint: its class and everything in its state dict; of a plain function, the logits it gives."""
    if not isinstance(model, nn.Module):
        return f"function {fingerprint(logits())}"
    state = cast(dict[str, Tensor], {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)})
    names = hashlib.sha256("\n".join(state).encode()).hexdigest()[:4]
    return f"{type(model).__name__} {names}{fingerprint(*state.values())}"


# -- what it took ------------------------------------------------------------------------------------------------------

Window = Callable[[str], AbstractContextManager[Any]]
"""A context around a stage, by its name. If what it gives has an `energy` with `kwh` (NaN: unknown) and `how`, that is
the stage's."""


@dataclass
class Account:
    """What a stage takes, on top of what earlier attempts at it took (`before`). `broken`, `refuted`: in this one."""

    before: Spent
    passes: Callable[[], Passes]
    """Of the whole evaluation in this process."""
    meter: Any
    broken: int = 0
    refuted: int = 0

    def __post_init__(self) -> None:
        self.began, self.passes_before = time.perf_counter(), self.passes()

    def total(self, *, done: bool = False) -> Spent:
        """Up to now."""
        passes = self.passes() - self.passes_before
        energy = getattr(self.meter, "energy", None)
        kwh, how = (None, None) if energy is None else (energy.kwh, energy.how)
        unknown = kwh is not None and math.isnan(kwh)
        now = Spent(
            self.before.attack,
            broken=self.broken,
            refuted=self.refuted,
            seconds=time.perf_counter() - self.began,
            **asdict(passes),
            energy_kwh=None if unknown else kwh,
            energy_how="unknown" if unknown else how,
        )
        return replace(self.before + now, done=done)


# -- how far it is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where an evaluation is: `fraction` of its estimated work; `robust` so far, a fraction of all images."""

    attack: str
    images_done: int
    images: int
    robust: float
    fraction: float
    seconds_left: float | None


class Estimate:
    """Tells `progress`, a few times a second, how much of the estimated work is done and how long the rest will take.

    `plan`: the stages of the ensemble, on a model with so many classes; `images`: how many there are; `rounds`: the
    stages of each later round, and how many of so many survivors are expected to meet them.
    """

    def __init__(
        self,
        plan: Sequence[Stage],
        rounds: Sequence[tuple[Sequence[Stage], Callable[[int], int]]],
        classes: int,
        norm: Norm,
        images: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        later = [stage for after, _ in rounds for stage in after]
        self.costs = {stage.name: stage.member.passes(classes, norm).total for stage in (*plan, *later)}
        self.rounds, self.images, self.progress = rounds, images, progress
        self.began = self.last = time.monotonic()
        self.first_fraction: float | None = None

    @property
    def due(self) -> bool:
        """Is it time to `tell` again? (A stage's end may always be told.)"""
        return self.progress is not None and time.monotonic() - self.last > TELL_EVERY_SECONDS

    def tell(
        self,
        stage: Stage,
        later: Sequence[Stage],
        spent: Mapping[str, Spent],
        *,
        images_done: int,
        images: int,
        part: float,
        robust: int,
    ) -> None:
        """`stage` is done for `images_done` of its `images`, to the fraction `part` of its work; `robust` of all images
        are robust so far; `later` stages are to come, those done are in `spent`."""
        if self.progress is None:
            return
        self.last = time.monotonic()
        cost = self.costs[line_of(stage.name)]
        past = sum(self.costs.get(line_of(s.attack), 0) * s.images for s in spent.values() if s.done)
        work = past + cost * images * part
        ahead = sum(self.costs[line_of(s.name)] for s in later) * (min(images, robust) if stage.again else robust)
        names = [after[0].again if after else "" for after, _ in self.rounds]
        for after, expected in self.rounds[names.index(stage.again) + 1 if stage.again else 0 :]:
            ahead += sum(self.costs[s.name] for s in after) * expected(robust)
        whole = past + cost * images + ahead
        fraction = work / whole if whole else 1.0
        self.first_fraction = fraction if self.first_fraction is None else self.first_fraction
        gain = fraction - self.first_fraction
        left = (self.last - self.began) * (1 - fraction) / gain if gain > 0 else None
        self.progress(Progress(stage.name, images_done, images, robust / self.images, fraction, left))
