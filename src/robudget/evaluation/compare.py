"""Two evaluations of the same images side by side: how far they agree, and where they do not."""

from __future__ import annotations

import pandas as pd

from robudget.errors import InputError
from robudget.evaluation.verdicts import Verdicts


def differences(a: Verdicts, b: Verdicts) -> pd.DataFrame:
    """The images whose robust-or-not differs: `index`, `label`, and of both what broke them and their margins.

    Columns end in `_a` and `_b`. Raises InputError unless both are of the same images.
    """
    both = a.frame.merge(b.frame, on=["index", "label"], suffixes=("_a", "_b"), validate="one_to_one")
    if not len(a) == len(b) == len(both):
        raise InputError(
            f"the evaluations share {len(both)} images of {len(a)} and {len(b)} (allowed: the same images)"
        )
    differ = (both["broken_by_a"] == "robust") != (both["broken_by_b"] == "robust")
    columns = ["index", "label"]
    columns += [f"{name}_{side}" for name in ("broken_by", "clean_margin", "worst_margin") for side in "ab"]
    return both.loc[differ, columns].reset_index(drop=True)


def agreement(a: Verdicts, b: Verdicts) -> float:
    """The fraction of images that are robust in both or in neither."""
    return 1 - len(differences(a, b)) / len(a)
