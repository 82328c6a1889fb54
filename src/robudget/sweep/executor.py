"""What an executor is: it takes attempts at runs and gives events; which runs, and how often, is for `drive` to say.

An attempt is a `Job`, plain data that another process or node can read; `attempt` does it there, the same way for every
executor, and ends with exactly one event. Imports no torch.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from robudget import __version__, stop
from robudget.errors import InputError, OutOfMemory, RobudgetError, RunFailed, unknown
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Busy

if TYPE_CHECKING:
    from robudget.runner import Progress

Kind = Literal["progress", "done", "failed", "busy", "lost", "stopped", "paused"]
TAIL_LINES = 12  # of a traceback, kept for the user
# Each module has `open_executor(address, *, site, workers, runs, options) -> Executor`.
EXECUTORS = {"local": "robudget.sweep.local", "ray": "robudget.sweep.ray", "slurm": "robudget.sweep.slurm"}


@dataclass(frozen=True)
class Job:
    """One attempt at a run. `recipe` and `site` as their `to_dict` and `model_dump` give them, `store` a path that the
    worker sees too.

    `gpus`, `cpus` and `memory_bytes` are what it needs (0 bytes: nothing is known); `memory_forecast`, in bytes, and
    `seconds` are forecast from runs like it (0: unknown).
    `over` is the number of a stale lease of the run that the driver has watched (`lease.Observer`), 0 for none;
    `stop_token` is what the store's file of requests said when the driver began (`stop.on_file`). `pause_epoch` and
    `pause_collapse`: where the training pauses (`runner.Until`).
    `version` is the driver's: a worker of another one refuses.
    """

    recipe: dict[str, Any]
    store: str
    site: dict[str, Any]
    gpus: float = 0.0
    cpus: float = 1.0
    memory_bytes: int = 0
    memory_forecast: int = 0
    seconds: float = 0.0
    over: int = 0
    stop_token: str = ""
    pause_epoch: int = 0
    pause_collapse: bool = False
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        """Raises InputError for a job of another version, whose fields may be others."""
        if (version := data.get("version")) != __version__:
            raise InputError(f"the sweep is of robudget {version}, this worker of {__version__}: install one of them")
        return cls(**data)

    def elsewhere(self) -> Job:
        """This job for a scheduler that gives it a node and a GPU: paths from the root, the GPU that it then sees."""
        paths = {name: self.site.get(name) for name in ("data_root", "synthetic_root", "teacher", "weights")}
        site = self.site | {name: str(Path(path).absolute()) for name, path in paths.items() if path}
        if str(site["device"]).startswith("cuda"):
            site |= {"device": "cuda"}
        return replace(self, store=str(Path(self.store).absolute()), site=site)


@dataclass(frozen=True)
class Event:
    """What happened to attempt `number` (the run's index in the driver's recipes).

    `progress` (with `phase`, `fraction` and `note` as `runner.Progress` has them) may come any number of times, then
    one of: `done` (`note` is the summary), `failed` (`note` is the error), `busy` (another process has the run), `lost`
    (its process or node ended without a word), `stopped` (saved and ended on request), `paused` (where it was to, saved
    too). `cause` of a failure: "input"
    and "failed", which another attempt would meet again, "memory", or "crash". `tail`: the last lines it printed.
    """

    number: int
    kind: Kind
    note: str = ""
    phase: str = ""
    fraction: float = 0.0
    cause: str = ""
    tail: str = ""


class Executor(Protocol):
    """Where attempts are made. Not more than `slots` of them are submitted at a time."""

    @property
    def slots(self) -> int:
        """Attempts that may be in flight at once: enough to keep every worker busy."""
        ...

    def submit(self, number: int, job: Job) -> None:
        """Start an attempt, or queue it; raises InputError where it can never run there."""
        ...

    def events(self, timeout: float) -> list[Event]:
        """What happened since the last call; waits for at most `timeout` seconds where nothing did."""
        ...

    def cancel(self, number: int) -> None:
        """Ask an attempt to save and stop; its last event comes through `events`."""
        ...

    def close(self) -> None:
        """End everything at once. Every run keeps what it had saved."""
        ...


def open_executor(
    on: str, *, site: Site, workers: int = 0, runs: int = 1, options: Mapping[str, str] | None = None
) -> Executor:
    """The executor called `on`: `local`, `ray`, `ray:ADDRESS` or `slurm`, for so many `runs`. `workers` (0: as many as
    it sees fit) work side by side; `options` are its own. Raises InputError where there is none such."""
    name, address = split_address(on)
    executor: Executor = importlib.import_module(EXECUTORS[name]).open_executor(
        address, site=site, workers=workers, runs=runs, options=options or {}
    )
    return executor


def split_address(on: str) -> tuple[str, str]:
    """`ray:head:6379` → the executor's name and its address. Raises InputError where there is none such."""
    name, _, address = on.partition(":")
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    return name, address


def split_options(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command line that are no options of `robudget sweep`: overrides of recipes (KEY=VALUE), and the
    options of an executor by name. A word after `--name` is its value unless it has an equals sign or is an option."""
    overrides: list[str] = []
    options: dict[str, str] = {}
    waiting = ""  # the option that the next word may be the value of
    for word in words:
        if word.startswith("-") and word.strip("-"):
            name, _, value = word.lstrip("-").partition("=")
            options[name] = value
            waiting = "" if "=" in word else name
        elif waiting and "=" not in word:
            options[waiting], waiting = word, ""
        else:
            overrides.append(word)
            waiting = ""
    return overrides, options


def run_job(data: Mapping[str, Any], progress: Callable[[Progress], None] = lambda progress: None) -> str:
    """Do a job (as `Job.to_dict` gave it) and return its summary; raises what `runner.run` raises."""
    from robudget.runner import Until, run

    job = Job.from_dict(data)
    if not Path(job.store).is_dir():  # the driver has made it: it is not to be begun anew where it is away
        raise FileNotFoundError(f"the store {job.store!r} is not there")
    recipe, site = Recipe.from_dict(job.recipe), Site(**job.site)
    until = Until(job.pause_epoch, job.pause_collapse)
    return run(
        recipe, store=job.store, site=site, progress=progress, over=job.over, stop_token=job.stop_token, until=until
    ).summary


def attempt(number: int, job: Mapping[str, Any], tell: Callable[[Event], None] = lambda event: None) -> Event:
    """Do a job in the process or on the node of a worker: `tell` gets its progress, the result is its last event."""

    def report(now: Progress) -> None:
        tell(Event(number, "progress", now.note, now.phase, now.fraction))

    try:
        return Event(number, "done", run_job(job, report))
    except Busy as error:
        return Event(number, "busy", str(error))
    except stop.Stopped as error:
        return Event(number, "stopped", str(error))
    except stop.Paused as error:
        return Event(number, "paused", str(error))
    except RobudgetError as error:
        kinds = {InputError: "input", OutOfMemory: "memory", RunFailed: "failed"}
        cause = next((cause for kind, cause in kinds.items() if isinstance(error, kind)), "crash")
        return Event(number, "failed", str(error), cause=cause)
    except Exception as error:  # a defect of ours or of a library: the other runs go on, and it is reported as such
        short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        tail = "\n".join(traceback.format_exc().splitlines()[-TAIL_LINES:])
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        return Event(number, "failed", note, cause="memory" if short else "crash", tail=tail)
