"""Evaluations beyond one threat: work in pieces with results per image, each saved when done; metered and resumable."""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robudget import files
from robudget.attacks.build import check_images
from robudget.attacks.victim import Model, frozen, margin
from robudget.backend.batch_size import keep_freed_memory
from robudget.backend.precision import float32_as
from robudget.errors import InputError
from robudget.evaluation.specification import Precision, Specification
from robudget.evaluation.spent import Spent, by_attack
from robudget.evaluation.state import Account, Progress, Window, refuse_other
from robudget.evaluation.victims import Backward, Images, Victims, on_device, surrogate_of
from robudget.threat import Norm, Threat

FORMAT = 1
Arrays = Mapping[str, NDArray[Any]]
EVERYTHING_IN = {"linf": lambda d: 1.0, "l2": math.sqrt, "l1": float}  # of the entries of an image: the largest radius


@dataclass(frozen=True)
class Setting:
    """How a measurement executes. `seed` keys noise by an image's row in the split; at most `batch_size` images are in
    a call of the model; `precision` is what attacks compute in (every success is confirmed in float32 on the model as
    given). `device` None: where the model is. `state`: a folder that it resumes from and writes to. `progress`,
    `window`, `backward`: as an `Evaluator` takes them."""

    batch_size: int = 500
    precision: Precision = "auto"
    seed: int = 0
    device: torch.device | str | None = None
    state: str | Path | None = None
    progress: Callable[[Progress], None] | None = None
    window: Window | None = None
    backward: Backward = "own"


@dataclass(frozen=True)
class Piece:
    """A part of a measurement with a name of its own, on so many images. `compute` gives arrays, and how many images
    were misclassified; `line` is the line of the account that it belongs to."""

    name: str
    line: str
    images: int
    compute: Callable[[], tuple[Arrays, int]]


@dataclass
class Work:
    """A model and images, ready to be measured; what was measured and what it took."""

    setting: Setting
    images: Images
    victims: Victims
    spent: list[Spent] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.images)

    def blocks(self) -> list[slice]:
        """The images in parts: few are lost with a part on a CPU, and an accelerator is kept busy."""
        size = self.setting.batch_size if self.images.device.type != "cpu" else min(self.setting.batch_size, 100)
        return [slice(first, min(first + size, self.n)) for first in range(0, self.n, size)]

    def about(self, **more: Any) -> dict[str, Any]:
        """What has to be equal for a resume: the model, the images, the settings, and `more`."""
        return self.victims.identity() | {"seed": self.setting.seed} | more

    def clean(self) -> Piece:
        """The clean pass: `margin` (n,)."""

        def compute() -> tuple[Arrays, int]:
            parts = []
            for _, x, y in self.images.batches(self.setting.batch_size):
                parts.append(margin(self.victims.given.logits(x), y).cpu().numpy())
            margins = np.concatenate(parts)
            return {"margin": margins}, int((~(margins > 0)).sum())

        return Piece("clean", "clean", self.n, compute)

    def run(self, pieces: Sequence[Piece], about: Mapping[str, Any]) -> list[Arrays]:
        """The arrays of each piece, from the disk where they are there. Raises InputError where the folder has pieces
        of another measurement."""
        folder = None if self.setting.state is None else Path(self.setting.state)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            identity = folder / "measurement.json"
            if identity.exists():
                refuse_other(identity, json.loads(identity.read_text("utf-8")), about)
            else:
                files.write_json(identity, about)
        out, began, of_line = [], time.monotonic(), Spent("")
        whole, done, fresh = sum(piece.images for piece in pieces), 0, 0
        for piece in pieces:
            path = None if folder is None else folder / f"{piece.name}.npz"
            found = None if path is None else _load(path)
            if found is None:
                found = self._compute(piece)
                fresh += piece.images
                if path is not None:
                    _save(path, *found)
            arrays, spent = found
            out.append(arrays)
            self.spent.append(spent)
            done += piece.images
            of_line = of_line + spent if of_line.attack == spent.attack else spent
            if self.setting.progress is not None:
                left = (time.monotonic() - began) * (whole - done) / fresh if fresh else None
                right = 1 - of_line.broken / max(of_line.images, 1)
                self.setting.progress(Progress(piece.line, done, whole, right, done / max(whole, 1), left))
        return out

    def _compute(self, piece: Piece) -> tuple[Arrays, Spent]:
        window = self.setting.window or (lambda name: nullcontext())
        with window(f"evaluation/{piece.line}") as meter:
            account = Account(Spent(piece.line, images=piece.images), lambda: self.victims.passes, meter)
            arrays, account.broken = piece.compute()
            if self.images.device.type == "cuda":
                torch.cuda.synchronize(self.images.device)
        return arrays, account.total(done=True)


@contextmanager
def prepared(
    model: Model, x: Tensor, y: Tensor, setting: Setting, *, index: Tensor | None = None, classes: int | None = None
) -> Iterator[Work]:
    """A model in evaluation mode, left as it was, and its images x (N, C, H, W; float32 in [0, 1] or uint8) with labels
    y (N,) int64; `index` is each image's row in the full split (default 0 … N − 1). Raises InputError."""
    check_images(x, y, stored=True)
    if setting.batch_size < 1:
        raise InputError(f"batch_size = {setting.batch_size} (allowed: at least 1)")
    index = torch.arange(len(x)) if index is None else index.to("cpu", torch.int64)
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    home = x.device if parameter is None else parameter.device
    device = torch.device(setting.device) if setting.device is not None else home
    model, surrogate = on_device(device, model), surrogate_of(model, setting.backward)
    surrogate = None if surrogate is None else on_device(device, surrogate)
    if device.type == "cpu":
        keep_freed_memory()
    with frozen(model), nullcontext() if surrogate is None else frozen(surrogate), float32_as(tf32=False):
        images = Images(x, y, index, device)
        how = Specification(Threat("linf", 1), batch_size=setting.batch_size, precision=setting.precision)
        yield Work(setting, images, Victims(model, images, how, classes, surrogate))


def everything(norm: Norm, shape: Sequence[int]) -> Threat:
    """The threat that allows any image of this shape (C, H, W)."""
    return Threat(norm, EVERYTHING_IN[norm](math.prod(shape)))


def _save(path: Path, arrays: Arrays, spent: Spent) -> None:
    about = np.array(json.dumps(files.to_plain(asdict(spent))))
    files.replace(path, lambda temporary: np.savez(temporary, **{"spent": about, **arrays}))  # type: ignore[arg-type]


def _load(path: Path) -> tuple[Arrays, Spent] | None:
    """None where there is no such piece."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files if name != "spent"}
            return arrays, Spent(**json.loads(str(data["spent"])))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot resume from {path}: {error} (delete it, --restart, to start again)") from None


# -- what a measurement leaves -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What every measurement has: a line per image, what each part took, and what it was made of."""

    frame: pd.DataFrame
    spent: Sequence[Spent]
    about: Mapping[str, Any]

    kind = ""  # of measurement, and the name of its file

    @property
    def n(self) -> int:
        return len(self.frame)

    @property
    def total(self) -> Spent:
        """Of all parts; its `images` and `broken` are of no use."""
        first, *others = self.spent
        for other in others:
            first = first + other
        return first

    @property
    def calls(self) -> dict[str, int]:
        """Image passes as `<part>_forward` and `<part>_backward`, to be multiplied by FLOPs per pass."""
        return {f"{item.attack}_{way}": getattr(item, way) for item in self.spent for way in ("forward", "backward")}

    def summary(self) -> dict[str, Any]:
        """What its JSON file holds; accuracies are fractions."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "n": self.n,
            **self.results(),
            **self.total.bill,
            "spent": [asdict(item) for item in self.spent],
            "about": dict(self.about),
        }

    def results(self) -> dict[str, Any]:
        raise NotImplementedError

    def page(self) -> str:
        raise NotImplementedError

    def save(self, folder: str | Path) -> Path:
        """Write <kind>.parquet, verdict.txt and (last) <kind>.json, each atomically."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        files.replace(path / f"{self.kind}.parquet", lambda temporary: self.frame.to_parquet(temporary, index=False))
        files.write_text(path / "verdict.txt", self.page())
        files.write_json(path / f"{self.kind}.json", self.summary())
        return path

    def bill_lines(self) -> list[str]:
        """The account, a line for each part, for a page."""
        lines = [f"{'part':<24}{'images':>8}{'forward':>12}{'backward':>12}{'FLOP':>10}{'seconds':>10}{'Wh':>9}"]
        items = [*self.spent, replace(self.total, attack="in all", images=self.n)]
        for item in items:
            flops = "unknown" if item.flops is None else f"{item.flops:.2e}"
            wh = "unknown" if item.energy_kwh is None else f"{1000 * item.energy_kwh:.3g}"
            lines.append(
                f"{item.attack:<24}{item.images:>8}{item.forward:>12}{item.backward:>12}{flops:>10}"
                f"{item.seconds:>10.1f}{wh:>9}"
            )
        return [*lines, f"Energy of GPU, CPU and memory, without PUE: {self.total.energy_how or 'not metered'}"]


def read(folder: str | Path, kind: str) -> tuple[dict[str, Any], pd.DataFrame, list[Spent]]:
    """The JSON, the table and the account of what `Measured.save` wrote. Raises InputError."""
    path = Path(folder)
    try:
        data = json.loads((path / f"{kind}.json").read_text("utf-8"))
        frame = pd.read_parquet(path / f"{kind}.parquet")
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read {kind} from {str(path)!r}: {error}") from None
    if data.get("format") != FORMAT:
        raise InputError(f"{path / kind}.json has format {data.get('format')} (this version reads {FORMAT})")
    names = {f.name for f in fields(Spent)}
    return data, frame, [Spent(**{k: v for k, v in item.items() if k in names}) for item in data["spent"]]


def together(parts: Sequence[Measured]) -> tuple[pd.DataFrame, list[Spent], dict[str, Any]]:
    """The lines, the account and the about of shards. Raises InputError for parts of different measurements, and for
    images that are in two of them."""
    first = parts[0]
    own = ("images", "labels", "index", "device", "threads", "torch")
    for part in parts[1:]:
        for key, value in first.about.items():
            if key not in own and part.about.get(key) != value and not str(value).startswith("function"):
                raise InputError(
                    f"the shards are of different evaluations: {key} = {value!r} and {part.about.get(key)!r}"
                )
    frame = pd.concat([part.frame for part in parts]).sort_values("index", kind="stable").reset_index(drop=True)
    twice = frame["index"][frame["index"].duplicated()]
    if len(twice):
        raise InputError(f"{len(twice)} images are in more than one shard (row {twice.iloc[0]} among them)")
    return frame, by_attack(item for part in parts for item in part.spent), {**first.about, "shards": len(parts)}
