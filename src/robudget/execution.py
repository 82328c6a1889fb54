"""Where and how a run executes: folders, device, threads. None of it changes what a recipe asks for, so none of it is
part of a recipe; `environment.json` records what it resolved to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from robudget.config import Record
from robudget.errors import InputError, nearest
from robudget.recipe import keys as recipe_keys

# No shell expands the tilde of `data.root=~/cifar10`.
_Path = Annotated[str, AfterValidator(os.path.expanduser)]


def first_process() -> bool:
    """Is this the one process that prints and writes files, of the many that torchrun may have started?"""
    return os.environ.get("RANK", "0") == "0"


class Site(Record):
    """Where and how a run executes. A field's `title` is its key on the command line, beside the recipe's own keys.

    `data_root`, `synthetic_root`: folder or file of the real and of the generated images; `teacher`: weights that label
    the latter; `device`: "auto", "cpu", "cuda" or "cuda:1"; `threads`: CPU threads of torch, 0 = this process's share
    of the cores (`threads.py`). `checkpointing` recomputes activations to save memory, `sync_batchnorm` (under
    torchrun) takes BatchNorm's statistics over the whole batch, `deterministic` asks torch for deterministic algorithms
    alone. `cpu_watts`, `gpu_watts`: what the machine's CPUs and the GPU draw under load, used where nothing better can
    be read. Raises InputError for a value that is not allowed.
    """

    data_root: _Path | None = Field(None, title="data.root", description="a path")
    synthetic_root: _Path | None = Field(None, title="synthetic.root", description="a path")
    teacher: _Path | None = Field(None, title="synthetic.teacher", description="a path")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    threads: int = Field(0, ge=0, description="a whole number, 0 = its share of the cores")
    checkpointing: bool = Field(False, description="true, false")
    sync_batchnorm: bool = Field(True, description="true, false")
    deterministic: bool = Field(False, description="true, false")
    cpu_watts: float | None = Field(None, ge=1, le=10_000, title="meter.cpu_watts", description="1 to 10000 watts")
    gpu_watts: float | None = Field(None, ge=1, le=10_000, title="meter.gpu_watts", description="1 to 10000 watts")

    @classmethod
    def take(cls, overrides: Mapping[str, Any]) -> tuple[Site, dict[str, Any]]:
        """Split dotted overrides into the site's and the rest, which is the recipe's."""
        names = {field.title or name: name for name, field in cls.model_fields.items()}
        for key in overrides:
            if key not in names and key not in recipe_keys() and (near := nearest(key, names, 0.8)):
                raise InputError(f"unknown key {key!r}; did you mean {near!r}?")
        fields = {names[key]: value for key, value in overrides.items() if key in names}
        return cls(**fields), {key: value for key, value in overrides.items() if key not in names}
