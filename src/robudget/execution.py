"""Where a run happens: folders, device, threads. Nothing here is part of a recipe, since nothing here is a choice
that changes what is asked for. What it resolves to is recorded in `environment.json` all the same."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robudget.errors import InputError
from robudget.recipe import keys as recipe_keys

# The command line writes `data.root=…` beside the recipe's own keys; these are the ones that are for the site.
KEYS = {
    "data.root": "data_root",
    "synthetic.root": "synthetic_root",
    "synthetic.teacher": "teacher",
    "device": "device",
    "threads": "threads",
    "checkpointing": "checkpointing",
    "sync_batchnorm": "sync_batchnorm",
    "deterministic": "deterministic",
    "meter.cpu_watts": "cpu_watts",
    "meter.gpu_watts": "gpu_watts",
}
_WATTS = (1.0, 10_000.0)


def first_process() -> bool:
    """Is this the process that speaks, of the many that torchrun may have started?"""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Site:
    """`data_root`, `synthetic_root`: folder or file of the real and of the generated images; `teacher`: weights that
    label the latter; `device`: "auto", "cpu", "cuda" or "cuda:1"; `threads`: CPU threads of torch, 0 = as many as there
    are cores. `checkpointing` recomputes activations to save memory, `sync_batchnorm` (under torchrun) lets BatchNorm
    see the whole batch, `deterministic` asks torch for deterministic algorithms alone. `cpu_watts`, `gpu_watts`: what
    the machine's CPUs and the GPU draw under load, used where nothing better can be read."""

    data_root: str | None = None
    synthetic_root: str | None = None
    teacher: str | None = None
    device: str = "auto"
    threads: int = 0
    checkpointing: bool = False
    sync_batchnorm: bool = True
    deterministic: bool = False
    cpu_watts: float | None = None
    gpu_watts: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 0:
            raise InputError(f"threads = {self.threads!r} (allowed: a whole number, 0 = all cores)")
        for name in ("data_root", "synthetic_root", "teacher"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name} = {value!r} (allowed: a path)")
        for name in ("checkpointing", "sync_batchnorm", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} = {getattr(self, name)!r} (allowed: true, false)")
        for name in ("cpu_watts", "gpu_watts"):
            value = getattr(self, name)
            low, high = _WATTS
            if value is not None and (isinstance(value, (bool, str)) or not low <= value <= high):
                raise InputError(f"meter.{name} = {value!r} (allowed: {low:g} to {high:g} watts)")

    @classmethod
    def take(cls, overrides: Mapping[str, Any]) -> tuple[Site, dict[str, Any]]:
        """Split dotted overrides into the site's and the rest, which is the recipe's."""
        for key in overrides.keys() - KEYS.keys() - set(recipe_keys()):
            if near := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8):
                raise InputError(f"unknown key {key!r}; did you mean {near[0]!r}?")
        mine = {KEYS[key]: value for key, value in overrides.items() if key in KEYS}
        return cls(**mine), {key: value for key, value in overrides.items() if key not in KEYS}
