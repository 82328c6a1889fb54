"""The columns of a table of runs."""

from __future__ import annotations

from typing import Literal

Kind = Literal["log", "number", "flag", "category"]

# In order of precedence: where two columns say the same in a table (EMA came with CutMix and 400 epochs in the
# paper's), the first stands for both. Missing values of `EMPTY` mean "none", those of other columns mean unknown.
KINDS: dict[str, Kind] = {
    "parameters": "log", "synthetic": "flag", "activation": "category", "loss": "category", "steps": "log",
    "ema": "flag", "epochs": "log", "cutmix": "flag", "synthetic_fraction": "number", "synthetic_amount": "log",
    "beta": "number", "variant": "category", "batch_size": "log", "epoch_images": "log",
    "base": "log", "model": "category", "ema_decay": "number", "precision": "category",
}  # fmt: skip
EMPTY = ("beta", "ema_decay", "synthetic_amount", "synthetic_fraction")
