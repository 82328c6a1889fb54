"""Where and how a run executes: folders, device, threads. None of it changes what a recipe asks for, so none of it is
part of a recipe; `environment.json` records what it resolved to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from robudget.config import Record
from robudget.errors import InputError, nearest
from robudget.files import sha256
from robudget.recipe import keys as recipe_keys

# No shell expands the tilde of `data.root=~/cifar10`.
_Path = Annotated[str, AfterValidator(os.path.expanduser)]


def first_process() -> bool:
    """Is this the one process that prints and writes files, of the many that torchrun may have started?"""
    return os.environ.get("RANK", "0") == "0"


def adopt_slurm(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torchrun would have set, from what `srun` sets for each task of a step; {} outside of one or alone."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environment or tasks == "1" or "SLURM_PROCID" not in environment:
        return {}
    node = int(environment.get("SLURM_NODEID", "0"))
    counts: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", tasks).split(","):  # "4(x2),3": two nodes of 4, one of 3
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return {
        "WORLD_SIZE": tasks,
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": counts[min(node, len(counts) - 1)],
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or _first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000),
    }


def _first_host(nodes: str) -> str:
    """`gpu[03-05,9],x1` → `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return nodes if match is None else match[1] + (match[2] or "")


class Site(Record):
    """Where and how a run executes. A field's `title` is its key on the command line, beside the recipe's own keys.

    `data_root`, `synthetic_root`: folder or file of the real and of the generated images; `teacher`: weights that label
    the latter; `synthetic_fid`: their Fréchet inception distance, where somebody measured it; `weights`: a run's, which
    a training starts from; `device`: "auto", "cpu", "cuda" or "cuda:1"; `threads`: CPU threads of torch, 0 = this
    process's share of the cores (`threads.py`). `checkpointing` recomputes activations to save memory,
    `physical_batch`: images that a training computes with at once, with the same result,
    `sync_batchnorm` (under torchrun) takes BatchNorm's statistics over the whole batch, `deterministic` asks torch for
    deterministic algorithms alone. `tf32` lets a training's float32 use TensorFloat-32 on CUDA (validation and
    evaluation never do). On CUDA, `cuda_graphs` launches a step of an attack, in a training or an
    evaluation, as one graph, `cudnn_benchmark` lets a training's convolutions be chosen by timing (never with
    `deterministic`), `compile` puts its update through torch.compile.
    `cpu_watts`, `gpu_watts`: what the machine's CPUs and the GPU draw under load, used where nothing better can be
    read; `overhead`: energy at the plug ÷ what the meter counts, where somebody measured fans, switches and the
    supply's loss. Raises InputError for a value that is not allowed.
    """

    data_root: _Path | None = Field(None, title="data.root", description="a path")
    synthetic_root: _Path | None = Field(None, title="synthetic.root", description="a path")
    teacher: _Path | None = Field(None, title="synthetic.teacher", description="a path")
    synthetic_fid: float | None = Field(None, ge=0, title="synthetic.fid", description="a number, 0 or more")
    weights: _Path | None = Field(None, title="model.weights", description="a path")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    threads: int = Field(0, ge=0, description="a whole number, 0 = its share of the cores")
    checkpointing: bool = Field(False, description="true, false")
    physical_batch: int = Field(0, ge=0, description="a whole number, 0 = the whole batch, or what the memory holds")
    sync_batchnorm: bool = Field(True, description="true, false")
    deterministic: bool = Field(False, description="true, false")
    tf32: bool = Field(False, description="true, false")
    cuda_graphs: bool = Field(True, description="true, false")
    cudnn_benchmark: bool = Field(True, description="true, false")
    compile: bool = Field(False, description="true, false")
    cpu_watts: float | None = Field(None, ge=1, le=10_000, title="meter.cpu_watts", description="1 to 10000 watts")
    gpu_watts: float | None = Field(None, ge=1, le=10_000, title="meter.gpu_watts", description="1 to 10000 watts")
    overhead: float = Field(
        1.0, ge=1, le=2, title="meter.overhead", description="1 to 2 (energy at the plug ÷ counted)"
    )

    @property
    def meter(self) -> dict[str, float | None]:
        """What the user states about power, as `meter.machine.open_meter` takes it."""
        return {"cpu_watts": self.cpu_watts, "gpu_watts": self.gpu_watts, "overhead": self.overhead}

    @classmethod
    def take(cls, overrides: Mapping[str, Any]) -> tuple[Site, dict[str, Any]]:
        """Split dotted overrides into the site's and the rest, which is the recipe's.

        Weights to start from are both: where the file is, and in the recipe (`model.init`) what it holds."""
        names = {field.title or name: name for name, field in cls.model_fields.items()}
        for key in overrides:
            if key not in names and key not in recipe_keys() and (near := nearest(key, names, 0.8)):
                raise InputError(f"unknown key {key!r}; did you mean {near!r}?")
        fields = {names[key]: value for key, value in overrides.items() if key in names}
        site, rest = cls(**fields), {key: value for key, value in overrides.items() if key not in names}
        if site.weights is not None:
            try:
                rest.setdefault("model.init", sha256(Path(site.weights)))
            except OSError as error:
                raise InputError(f"cannot read model.weights = {site.weights!r}: {error.strerror}") from None
        return site, rest
