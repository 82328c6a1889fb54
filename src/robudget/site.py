"""Where a run happens: folders, device, threads. Nothing here is part of a recipe, since nothing here is a choice
that changes what is asked for. What it resolves to is recorded in `environment.json` all the same."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robudget.errors import InputError
from robudget.recipe import keys as recipe_keys

# The command line writes `data.root=…` beside the recipe's own keys; these are the ones that are for the site.
KEYS = {"data.root": "data_root", "synthetic.root": "synthetic_root", "device": "device", "threads": "threads"}


@dataclass(frozen=True)
class Site:
    """`data_root`, `synthetic_root`: folder or file of the real and of the generated images; `device`: "auto", "cpu",
    "cuda" or "cuda:1"; `threads`: CPU threads of torch, 0 = as many as there are cores."""

    data_root: str | None = None
    synthetic_root: str | None = None
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 0:
            raise InputError(f"threads = {self.threads!r} (allowed: a whole number, 0 = all cores)")
        for name in ("data_root", "synthetic_root"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name} = {value!r} (allowed: a path)")

    @classmethod
    def take(cls, overrides: Mapping[str, Any]) -> tuple[Site, dict[str, Any]]:
        """Split dotted overrides into the site's and the rest, which is the recipe's."""
        for key in overrides.keys() - KEYS.keys() - set(recipe_keys()):
            if near := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8):
                raise InputError(f"unknown key {key!r}; did you mean {near[0]!r}?")
        mine = {KEYS[key]: value for key, value in overrides.items() if key in KEYS}
        return cls(**mine), {key: value for key, value in overrides.items() if key not in KEYS}
