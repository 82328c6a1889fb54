"""An executor on Slurm: arrays of batch jobs, each with several attempts, whose states are files in the store.

    <store>/.slurm/<submission>/
        jobs.jsonl        a line a task of the array: the names of its runs and their jobs
        id                Slurm's number of the array
        cancelled         names of runs that are not wanted any more, a line each
        events-3.jsonl    what happened in task 3, written there; out-3.txt: what it printed

Plain `sbatch` and `squeue`, without submitit: that library asks `sacct` for states, which answers nothing where Slurm
has no accounting, and needs the process that submitted. A task here needs only its folder, so that the driver may end
and come back, and finds again what it had submitted. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from robudget.errors import InputError, RunFailed
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.store import Store, writing
from robudget.sweep.executor import TAIL_LINES, Event, Executor, Job
from robudget.sweep.slurm_task import command, final_events

SLOTS = 10_000  # runs submitted at once where nothing is said: all of most studies, so that no driver need be there
JOB_SECONDS = 1800.0  # forecast of a job of several runs, where runs have a forecast
MOST_RUNS_PER_JOB = 100
WARN_SECONDS = 60  # before the end of a job's time, to save; Slurm may be up to a minute early
_POLL_SECONDS = 5.0  # between two looks at squeue and at what the tasks wrote
_SEND_AT = 1000  # runs: what waits to be submitted takes memory
_KEPT_SECONDS = 86_400.0  # the files of a submission that has ended
_WORKS = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT")
_GPU_OPTIONS = {"gres", "gpus", "gpus-per-task", "gpus-per-node", "G", "tres-per-task"}


def open_executor(address: str, *, site: Site, workers: int, runs: int, options: Mapping[str, str]) -> Executor:
    """`options`: `runs-per-job`, and any of sbatch's (`time`, `partition`, `account`, …; "" where one has no value)."""
    if address:
        raise InputError(
            f"--on slurm:{address}: Slurm has no address here (allowed: slurm, on a node that submits jobs)"
        )
    return SlurmExecutor(workers=workers, options=options)


@dataclass
class _Task:
    """A task of an array: its runs by name, and how far its events were read."""

    array: str
    index: int
    folder: Path
    runs: list[str]
    read: int = 0
    state: str = ""
    missing: int = 0  # questions to squeue in a row that did not know it
    cancelling: bool = False

    @property
    def name(self) -> str:
        return f"{self.array}_{self.index}"


class SlurmExecutor:
    def __init__(self, *, workers: int = 0, options: Mapping[str, str] | None = None) -> None:
        if shutil.which("sbatch") is None:
            raise InputError("--on slurm: there is no sbatch on this machine (allowed: a node that submits Slurm jobs)")
        self._options = dict(options or {})
        per_job = self._options.pop("runs-per-job", "0")
        if not per_job.isdecimal():
            raise InputError(f"--runs-per-job {per_job} (allowed: a whole number, 0 = by forecast)")
        self._per_job, self._workers = int(per_job), workers
        self._largest = int(_setting("MaxArraySize", "1001"))
        self._poll = float(os.environ.get("ROBUDGET_SLURM_POLL_SECONDS", _POLL_SECONDS))
        self._polled = 0.0
        self._numbers: dict[str, int] = {}  # run → attempt
        self._tasks: dict[str, _Task] = {}  # run → where it is
        self._waiting: list[tuple[str, Job]] = []
        self._cancelled: set[str] = set()
        self._home: Path | None = None

    @property
    def slots(self) -> int:
        return self._workers * max(1, self._per_job) if self._workers else SLOTS

    def submit(self, number: int, job: Job) -> None:
        name = Store(job.store).folder(Recipe.from_dict(job.recipe)).path.name
        if self._home is None:
            self._home = Path(job.store).absolute() / ".slurm"
            self._tasks = _found(self._home, self._queue())
        self._numbers[name] = number
        if name not in self._tasks:
            self._waiting.append((name, job))
            if len(self._waiting) >= _SEND_AT:
                self._send()

    def events(self, timeout: float) -> list[Event]:
        if self._waiting:
            self._send()
        left = self._polled + self._poll - time.monotonic()
        if left > 0:
            time.sleep(min(timeout, left))
            return []
        self._polled = time.monotonic()
        try:
            queue = self._queue()
        except (InputError, RunFailed):  # the controller is away: its jobs go on
            queue = None
        tasks = {task.name: task for name, task in self._tasks.items() if name in self._numbers}
        return [event for task in tasks.values() for event in self._look_at(task, queue)]

    def cancel(self, number: int) -> None:
        name = next((name for name, each in self._numbers.items() if each == number), None)
        if name is None:
            return
        self._cancelled.add(name)
        self._waiting = [(each, job) for each, job in self._waiting if each != name]
        if (task := self._tasks.get(name)) is not None:
            with contextlib.suppress(OSError), (task.folder / "cancelled").open("a") as file:
                file.write(name + "\n")

    def close(self) -> None:
        """Leaves what is in Slurm's queue there: it needs no driver."""

    # -- what goes to Slurm ---------------------------------------------------------------------------------------

    def _send(self) -> None:
        assert self._home is not None
        if Store(self._home.parent).away:
            return
        waiting, self._waiting = self._waiting, []
        groups = _groups(waiting, self._per_job)
        for start in range(0, len(groups), self._largest):
            self._send_array(groups[start : start + self._largest])

    def _send_array(self, groups: Sequence[Sequence[tuple[str, Job]]]) -> None:
        assert self._home is not None
        folder = self._home / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        line = " ".join(shlex.quote(word) for word in (sys.executable, "-m", "robudget.sweep.slurm_task", str(folder)))
        with writing(folder):
            self._home.mkdir(exist_ok=True)
            folder.mkdir()
            with (folder / "jobs.jsonl").open("w", encoding="utf-8") as file:
                for group in groups:
                    jobs = [job.elsewhere().to_dict() for _, job in group]
                    file.write(json.dumps({"runs": [name for name, _ in group], "jobs": jobs}) + "\n")
            (folder / "script.sh").write_text(f"#!/bin/sh\nexec {line}\n", "utf-8")
        throttle = f"%{self._workers}" if self._workers else ""
        array = f"0-{len(groups) - 1}{throttle}"
        all_jobs = [job for group in groups for _, job in group]
        try:
            request = self._request(all_jobs, folder)
            said = command("sbatch", f"--array={array}", *request, str(folder / "script.sh"))
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        identity = said.strip().partition(";")[0]
        (folder / "id").write_text(identity, "utf-8")
        for index, group in enumerate(groups):
            names = [name for name, _ in group]
            task = _Task(identity, index, folder, names)
            self._tasks |= dict.fromkeys(names, task)

    def _request(self, jobs: Sequence[Job], folder: Path) -> list[str]:
        """What sbatch is asked for: what the jobs need, and what the user says, which comes later and so counts."""
        cpus, memory = max(job.cpus for job in jobs), max(job.memory_bytes for job in jobs)
        asked = {
            "parsable": "",
            "requeue": "",
            "open-mode": "append",
            "job-name": "robudget",
            "output": str(folder / "out-%a.txt"),
            "signal": f"B:USR1@{WARN_SECONDS}",
            "cpus-per-task": f"{max(1, round(cpus))}",
        }
        if memory and not any(name.startswith("mem") for name in self._options):
            asked["mem"] = f"{memory / 2**20:.0f}M"
        if any(job.gpus for job in jobs) and not _GPU_OPTIONS & self._options.keys():
            if "gpu" in command("sinfo", "-h", "-o", "%G"):
                asked["gres"] = f"gpu:{max(1, round(max(job.gpus for job in jobs)))}"
            elif any(str(job.site["device"]).startswith("cuda") for job in jobs):
                raise InputError("a run asks for a GPU, and no node of this Slurm has one (allowed: device=cpu)")
        return [_option(name, value) for name, value in (asked | self._options).items()]

    # -- what comes back ------------------------------------------------------------------------------------------

    def _queue(self) -> dict[str, tuple[str, str]]:
        """Task → (state, reason) of what Slurm has of this user."""
        rows = (line.split("|") for line in command("squeue", "-h", "-r", "--me", "-o", "%F_%K|%T|%r").splitlines())
        return {name: (state, reason) for name, state, reason in rows if state in _WORKS}

    def _look_at(self, task: _Task, queue: Mapping[str, tuple[str, str]] | None) -> list[Event]:
        """What a task has written, that it waits, or that it has gone without a word."""
        state, reason = queue.get(task.name, ("", "")) if queue is not None else (task.state, "")
        events = [] if state == task.state == "PENDING" else self._read(task)
        left = [name for name in task.runs if name in self._numbers and self._tasks.get(name) is task]
        task.missing = 0 if state else task.missing + 1
        if left and set(left) <= self._cancelled and state in ("PENDING", "RUNNING") and not task.cancelling:
            task.cancelling = True
            with contextlib.suppress(InputError, RunFailed):
                command("scancel", *(["--batch", "--signal=TERM"] if state == "RUNNING" else []), task.name)
        elif state == "PENDING" and task.state != state:
            events += [Event(self._numbers[n], "progress", f"in Slurm's queue ({reason})", "queued") for n in left]
        elif task.missing > 1:  # what it has written is seen by now, on a network file system too
            tail = _tail(task.folder / f"out-{task.index}.txt")
            for name in left:
                stopped, lost = (
                    Event(0, "stopped"),
                    Event(0, "lost", f"job {task.name} has left Slurm's queue", tail=tail),
                )
                events.append(replace(stopped if name in self._cancelled else lost, number=self._numbers[name]))
                self._end(name)
        task.state = state
        return events

    def _read(self, task: _Task) -> list[Event]:
        """What the task has written since the last look."""
        try:
            with (task.folder / f"events-{task.index}.jsonl").open("rb") as file:
                file.seek(task.read)
                text = file.read()
        except OSError:  # nothing is written yet, or the store is away
            return []
        whole = text[: text.rfind(b"\n") + 1]
        task.read += len(whole)
        events = []
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a kill leaves a line incomplete
                continue
            name = entry.pop("run")
            if name in self._numbers and self._tasks.get(name) is task:
                events.append(Event(self._numbers[name], **entry))
                if entry["kind"] != "progress":
                    self._end(name)
        return events

    def _end(self, name: str) -> None:
        del self._numbers[name], self._tasks[name]
        self._cancelled.discard(name)


def _groups(waiting: Sequence[tuple[str, Job]], per_job: int) -> list[list[tuple[str, Job]]]:
    """The runs of each job: `per_job`, or, where that is 0, as many as are forecast to take `JOB_SECONDS`; a run whose
    forecast is unknown has a job to itself."""
    groups: list[list[tuple[str, Job]]] = []
    seconds = float("inf")
    for name, job in waiting:
        if per_job:
            new = not groups or len(groups[-1]) >= per_job
        else:
            seconds += job.seconds or JOB_SECONDS
            new = seconds > JOB_SECONDS or len(groups[-1]) >= MOST_RUNS_PER_JOB
        if new:
            groups.append([])
            seconds = job.seconds or JOB_SECONDS
        groups[-1].append((name, job))
    return groups


def _found(home: Path, queue: Mapping[str, object]) -> dict[str, _Task]:
    """Runs that earlier drivers have submitted to this store and that Slurm still has; old files are removed."""
    tasks: dict[str, _Task] = {}
    for folder in sorted(home.iterdir()) if home.is_dir() else []:
        try:
            array = (folder / "id").read_text("utf-8").strip()
            lines = (folder / "jobs.jsonl").read_text("utf-8").splitlines()
            age = time.time() - folder.stat().st_mtime
        except OSError:
            continue
        alive = [index for index in range(len(lines)) if f"{array}_{index}" in queue]
        for index in alive:
            ended = {entry["run"] for entry in final_events(folder / f"events-{index}.jsonl")}
            names = json.loads(lines[index])["runs"]
            task = _Task(array, index, folder, names)
            tasks |= {name: task for name in names if name not in ended}
        if not alive and age > _KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    return tasks


def _option(name: str, value: str) -> str:
    if len(name) == 1:
        return f"-{name}{value}"
    return f"--{name}={value}" if value else f"--{name}"


def _setting(name: str, default: str) -> str:
    found = re.search(rf"^{name}\s*=\s*(\S+)", command("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found else default


def _tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text("utf-8", errors="replace").splitlines()[-TAIL_LINES:])
    except OSError:
        return ""
