"""Verdicts of others on the same images, read from their files, beside ours: agreement, who broke what, McNemar's test.

Read: the folder of an evaluation; the JSON that AutoAttack keeps at `state_path`; a JSON with a list `verdicts` of
names ("clean", an attack, "robust"); a CSV with a column `robust` (true/false or 1/0) or `broken_by`, and `index` and
`label` where they are known; and an entry of RobustBench (`model_info/…/NAME.json`), which holds accuracies only.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robudget.accuracy import wilson
from robudget.errors import InputError
from robudget.evaluation.verdicts import Verdicts
from robudget.threat import Threat, parse_number

BROKEN = "broken"  # by what is not known
_NORMS = {"linf": "linf", "l2": "l2", "l1": "l1"}
_BOOLEANS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_SHOWN = 20  # images that differ, at most


@dataclass(frozen=True)
class Theirs:
    """Verdicts of others. `broken_by` (n,): "clean", an attack's name, `BROKEN` or "robust"; None where the file holds
    accuracies only. None too is what the file does not say."""

    what: str
    broken_by: NDArray[np.str_] | None
    index: NDArray[np.int64] | None = None
    label: NDArray[np.int64] | None = None
    norm: str | None = None
    eps: float | None = None
    dataset: str | None = None
    images: str | None = None
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    note: str = ""


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Theirs:
    """Raises InputError for what is none of the files above."""
    path = Path(path)
    if path.is_dir():
        return _evaluation(Verdicts.load(path))
    try:
        if path.suffix == ".csv":
            return _csv(path)
        data = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read verdicts from {str(path)!r}: {' '.join(str(error).split())}") from None
    if isinstance(data, dict):
        if "_robust_flags" in data:
            return _autoattack_state(path, data)
        if isinstance(data.get("verdicts"), list):
            return _names(data)
        if "autoattack_acc" in data:
            return _robustbench(path, data)
    raise InputError(
        f"{str(path)!r} holds no verdicts (allowed: an evaluation's folder, AutoAttack's state, a JSON with a list "
        "`verdicts`, a CSV with a column robust or broken_by, an entry of RobustBench)"
    )


def _evaluation(v: Verdicts) -> Theirs:
    about = v.about
    return Theirs(
        f"robudget, {about.get('version')}",
        v.broken_by,
        v.frame["index"].to_numpy(),
        v.frame["label"].to_numpy(),
        v.threat.norm,
        v.threat.eps,
        about.get("dataset"),
        None if "shards" in about else about.get("images"),
        v.clean_accuracy,
    )


def _autoattack_state(path: Path, data: Mapping[str, Any]) -> Theirs:
    flags = data["_robust_flags"]
    if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags) or not flags:
        raise InputError(
            f"{str(path)!r} is a state of AutoAttack without verdicts yet (_robust_flags = {str(flags)[:40]})"
        )
    # A set is not JSON: it was written as Python prints it.
    asked, run = (
        set(value if isinstance(value, list) else re.findall(r"'([^']+)'", str(value)))
        for value in (data.get("_attacks_to_run"), data.get("_run_attacks"))
    )
    left = sorted(asked - run)
    clean = data.get("_clean_accuracy")
    return Theirs(
        "AutoAttack's state",
        np.where(flags, "robust", BROKEN),
        clean_accuracy=float(clean) if isinstance(clean, (int, float)) and clean == clean else None,
        note=f"their evaluation is not finished: {', '.join(left)} to come" if left else "",
    )


def _names(data: Mapping[str, Any]) -> Theirs:
    broken_by = np.array([str(name) for name in data["verdicts"]])
    norm, eps = data.get("norm"), data.get("eps")
    return Theirs(
        str(data.get("implementation", "verdicts")),
        broken_by,
        norm=None if norm is None else str(norm).lower(),
        eps=None if eps is None else parse_number(str(eps)),
        clean_accuracy=float((broken_by != "clean").mean()),
    )


def _csv(path: Path) -> Theirs:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if table.shape[1] == 1 and str(table.columns[0]).strip().lower() in _BOOLEANS:  # no header
        table = pd.read_csv(path, dtype=str, keep_default_na=False, header=None, names=["robust"])
    table.columns = [str(name).strip().lower() for name in table.columns]
    if not {"robust", "broken_by"} & set(table.columns):
        raise InputError(f"{str(path)!r} has columns {', '.join(table.columns)[:100]} (allowed: robust or broken_by)")

    def booleans(name: str) -> NDArray[np.bool_]:
        values = table[name].str.strip().str.lower()
        wrong = ~values.isin(list(_BOOLEANS))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise InputError(f"{str(path)!r}: {name} = {values[row]!r} in row {row + 1} (allowed: true, false, 1, 0)")
        return np.array([_BOOLEANS[value] for value in values], dtype=bool)

    if "broken_by" in table:
        broken_by = table["broken_by"].str.strip().to_numpy(dtype=str)
    else:
        broken_by = np.where(booleans("robust"), "robust", BROKEN)
    if "clean" in table:
        broken_by = np.where(booleans("clean"), broken_by, "clean")

    def numbers(name: str) -> NDArray[np.int64] | None:
        try:
            return np.array([int(value) for value in table[name]], dtype=np.int64) if name in table else None
        except ValueError:
            raise InputError(f"{str(path)!r}: a value of {name} is no whole number (allowed: 0, 1, …)") from None

    known = "clean" in table or (broken_by == "clean").any()
    clean = float((broken_by != "clean").mean()) if known else None
    return Theirs("CSV", broken_by, numbers("index"), numbers("label"), clean_accuracy=clean)


def _robustbench(path: Path, data: Mapping[str, Any]) -> Theirs:
    folders = [part.lower() for part in path.resolve().parts[-3:-1]]
    external = data.get("external")
    try:
        robust, clean = float(external or data["autoattack_acc"]) / 100, float(data["clean_acc"]) / 100
        eps = None if data.get("eps") in (None, "null") else parse_number(str(data["eps"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{str(path)!r} is no RobustBench entry: {error}") from None
    return Theirs(
        "RobustBench" + (", by a stronger published attack (external)" if external else ", AutoAttack"),
        None,
        norm=next((_NORMS[name] for name in folders if name in _NORMS), None),
        eps=eps,
        dataset=data.get("dataset"),
        clean_accuracy=clean,
        robust_accuracy=robust,
        note="RobustBench calls this evaluation potentially unreliable"
        if data.get("unreliable") in (True, "true")
        else "",
    )


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Our verdicts beside others' on the same images. Of `table`: (ours, theirs) → number of images."""

    ours: Verdicts
    theirs: Theirs
    table: Mapping[tuple[str, str], int]
    differ: pd.DataFrame
    only_ours: int
    only_theirs: int

    @property
    def n(self) -> int:
        return self.ours.n

    @property
    def agree(self) -> int:
        """On how many images both say robust, or both not."""
        return self.n - self.only_ours - self.only_theirs

    @property
    def difference(self) -> float:
        """Our robust accuracy less theirs, fraction."""
        if self.theirs.robust_accuracy is not None:
            return float(self.ours.robust.mean()) - self.theirs.robust_accuracy
        return (self.only_ours - self.only_theirs) / self.n

    @property
    def p_value(self) -> float:
        """Exact, two-sided: of McNemar's test; of accuracies alone, that ours is a sample of images with theirs."""
        from scipy.stats import binomtest

        if self.theirs.robust_accuracy is not None:
            return float(binomtest(int(self.ours.robust.sum()), self.n, self.theirs.robust_accuracy).pvalue)
        differ = self.only_ours + self.only_theirs
        return float(binomtest(self.only_ours, differ).pvalue) if differ else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """95% of `difference`. McNemar's, exact given how many images differ (the Clopper-Pearson interval of the share
        that is robust by us alone); where none differs, what that says of the share that would (either way). Of
        accuracies alone, that of our Wilson interval."""
        from scipy.stats import binomtest

        if self.theirs.robust_accuracy is not None:
            low, high = wilson(int(self.ours.robust.sum()), self.n)
            return low - self.theirs.robust_accuracy, high - self.theirs.robust_accuracy
        differ = self.only_ours + self.only_theirs
        if not differ:
            most = float(binomtest(0, self.n).proportion_ci(method="exact").high)
            return -most, most
        share = binomtest(self.only_ours, differ).proportion_ci(method="exact")
        return (2 * float(share.low) - 1) * differ / self.n, (2 * float(share.high) - 1) * differ / self.n

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        out = {
            "theirs": self.theirs.what,
            "n": self.n,
            "robust_accuracy": float(self.ours.robust.mean()),
            "difference": self.difference,
            "interval": [low, high],
            "p_value": self.p_value,
            "clean_accuracy": self.ours.clean_accuracy,
            "their_clean_accuracy": self.theirs.clean_accuracy,
            "their_threat_is_known": self.theirs.eps is not None,
            "note": self.theirs.note,
        }
        if self.theirs.broken_by is None:
            return out | {"their_robust_accuracy": self.theirs.robust_accuracy, "per_image": False}
        return out | {
            "their_robust_accuracy": float((self.theirs.broken_by == "robust").mean()),
            "per_image": True,
            "agree": self.agree,
            "agreement": self.agree / self.n,
            "robust_by_us_alone": self.only_ours,
            "robust_by_them_alone": self.only_theirs,
            "who_broke_what": [{"ours": a, "theirs": b, "images": n} for (a, b), n in sorted(self.table.items())],
            "differ": self.differ.to_dict("records"),
        }

    def __str__(self) -> str:
        low, high = (100 * end for end in self.interval)
        theirs = self.theirs
        clean = "" if theirs.clean_accuracy is None else f"; clean {100 * theirs.clean_accuracy:.2f}% by them"
        clean += f", {100 * self.ours.clean_accuracy:.2f}% by us" if clean else ""
        notes = [theirs.note] if theirs.note else []
        if theirs.eps is None or theirs.norm is None:
            notes.append("their threat is not in the file: it is taken to be ours")
        if theirs.broken_by is None:
            number = theirs.robust_accuracy or 0.0
            lines = [
                f"Robust accuracy {100 * self.ours.robust.mean():.2f}% by us on {self.n} images, {100 * number:.2f}% "
                f"by them ({theirs.what}){clean}",
                f"Ours less theirs: {100 * self.difference:+.2f} points [{low:+.2f}, {high:+.2f}] (95% Wilson interval "
                f"of ours; exact binomial test p = {self.p_value:.3g}). They publish no verdicts per image.",
            ]
            return "\n".join(lines + notes)
        robust = float((theirs.broken_by == "robust").mean())
        differ = self.n - self.agree
        lines = [
            f"Robust accuracy {100 * self.ours.robust.mean():.2f}% by us, {100 * robust:.2f}% by them ({theirs.what}), "
            f"on the same {self.n} images{clean}",
            f"The verdicts agree on {self.agree} of {self.n} images ({100 * self.agree / self.n:.2f}%); "
            f"{self.only_ours} are robust by us alone, {self.only_theirs} by them alone",
            f"Ours less theirs: {100 * self.difference:+.2f} points [{low:+.2f}, {high:+.2f}] (95%, McNemar, exact "
            f"given that {differ} differ; p = {self.p_value:.3g})"
            if differ
            else f"No image differs; of images of the kind at most {high:.2f}% would, one way (95%, exact)",
            "",
            *_crosstab(self.table),
        ]
        if len(self.differ):
            lines += ["", "Images that differ" + (f" (the first {_SHOWN})" if len(self.differ) > _SHOWN else "")]
            lines += [
                f"  row {item['index']}: {item['ours']} by us, {item['theirs']} by them; worst margin "
                f"{item['worst_margin']:.4g}"
                for item in self.differ.head(_SHOWN).to_dict("records")
            ]
        return "\n".join(lines + ([""] if notes else []) + notes)


def _crosstab(table: Mapping[tuple[str, str], int]) -> list[str]:
    """Rows: ours; columns: theirs."""
    rows, columns = (sorted({pair[side] for pair in table}, key=_order) for side in (0, 1))
    head = f"{'ours / theirs':<16}" + "".join(f"{name:>12}" for name in columns)
    return [head] + [f"{a:<16}" + "".join(f"{table.get((a, b), 0):>12}" for b in columns) for a in rows]


def _order(name: str) -> tuple[int, str]:
    return ({"clean": 0, "robust": 2}.get(name, 1), name)


def compare(ours: Verdicts, path: str | Path) -> Comparison:
    """Our verdicts beside those in a file. Raises InputError where these are of other images or another threat."""
    theirs = read(path)
    _check_threat(ours.threat, theirs, path)
    dataset = ours.about.get("dataset")
    if theirs.dataset is not None and dataset is not None and theirs.dataset != dataset:
        raise InputError(f"{str(path)!r} is of {theirs.dataset}, and ours of {dataset} (allowed: the same images)")
    if theirs.broken_by is None:
        return Comparison(ours, theirs, {}, pd.DataFrame(), 0, 0)
    order = _same_images(ours, theirs, path)
    by = theirs.broken_by[order]
    mine, robust = ours.robust, by == "robust"
    # Where they do not say which images were wrong unattacked, neither do we.
    names = ours.broken_by
    differ = pd.DataFrame({"index": ours.frame["index"], "ours": names, "theirs": by})
    differ["worst_margin"] = ours.frame["worst_margin"]
    return Comparison(
        ours,
        theirs,
        Counter(zip(names.tolist(), by.tolist(), strict=True)),
        differ[mine != robust].reset_index(drop=True),
        int((mine & ~robust).sum()),
        int((~mine & robust).sum()),
    )


def _check_threat(ours: Threat, theirs: Theirs, path: str | Path) -> None:
    norm = ours.norm if theirs.norm is None else theirs.norm
    eps = ours.eps if theirs.eps is None else theirs.eps
    if norm != ours.norm or abs(eps - ours.eps) > 1e-4 * max(ours.eps, 1e-12):
        raise InputError(
            f"{str(path)!r} is of the threat {norm} {eps:.6g}, and ours of {ours} (allowed: the same threat)"
        )


def _same_images(ours: Verdicts, theirs: Theirs, path: str | Path) -> Sequence[int] | NDArray[np.int64]:
    """The order of their verdicts in which they are of our images. Raises InputError where they are of others."""
    assert theirs.broken_by is not None
    allowed, n = "allowed: verdicts of the same images", len(theirs.broken_by)
    if n != ours.n:
        raise InputError(f"{str(path)!r} has verdicts of {n} images, and ours are of {ours.n} ({allowed})")
    index, order = ours.frame["index"].to_numpy(), np.arange(n)
    if theirs.index is not None:
        place = {row: at for at, row in enumerate(theirs.index.tolist())}
        missing = [row for row in index.tolist() if row not in place]
        if missing:
            raise InputError(
                f"{str(path)!r} has no verdict of row {missing[0]} and {len(missing) - 1} others ({allowed})"
            )
        order = np.array([place[row] for row in index.tolist()])
    if theirs.label is not None:
        label = ours.frame["label"].to_numpy()
        wrong = np.flatnonzero(theirs.label[order] != label)
        if len(wrong):
            row = wrong[0]
            raise InputError(
                f"{str(path)!r} is of other images: row {index[row]} has label {theirs.label[order][row]} there and "
                f"{label[row]} in ours ({allowed})"
            )
    mine = None if "shards" in ours.about else ours.about.get("images")
    if theirs.images is not None and mine is not None and theirs.images != mine:
        raise InputError(
            f"{str(path)!r} is of other images: their fingerprint is {theirs.images}, ours {mine} ({allowed})"
        )
    return order
