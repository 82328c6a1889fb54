"""One task of an array of Slurm jobs: its runs in turn; what happens is written to files beside its jobs (`slurm.py`).

A task that Slurm warns (USR1, before its time is over) lets its run save and goes back into the queue. No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robudget.errors import InputError, RunFailed
from robudget.execution import Site
from robudget.sweep.executor import Event, Job
from robudget.sweep.local import LocalPool

BUSY_SECONDS = 5.0  # before a run that another process has is tried again
BUSY_TRIES = 60
REPORT_SECONDS = 5.0  # at least, between two reports of progress
_COMMAND_SECONDS = 120.0


class _Work:
    """The runs of one task, in turn, in a worker process, so that one that crashes takes no other along."""

    def __init__(self, folder: Path, index: int) -> None:
        self.folder, self.index = folder, index
        line = json.loads((folder / "jobs.jsonl").read_text("utf-8").splitlines()[index])
        self.events = folder / f"events-{index}.jsonl"
        refused: list[tuple[str, Event]] = []
        ended = {entry["run"] for entry in final_events(self.events)}  # before this task was put back into the queue
        self.left: list[tuple[str, Job]] = []
        for name, job in zip(line["runs"], line["jobs"], strict=True):
            try:
                self.left += [(name, Job.from_dict(job))] if name not in ended else []
            except InputError as error:
                refused.append((name, Event(0, "failed", str(error), cause="input")))
        self.signals: list[int] = []
        self.told = 0.0
        if self.events.exists() and not self.events.read_bytes().endswith(b"\n"):
            with self.events.open("a") as file:
                file.write("\n")  # a kill left the last line incomplete
        for name, event in refused:
            self.tell(name, event)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, frame: self.signals.append(number))

    def run(self) -> int:
        """Exit code 0, or 75 where Slurm has asked for the end."""
        if not self.left:
            return 0
        pool = LocalPool(Site(**self.left[0][1].site), 1, len(self.left))
        try:
            for number, (name, job) in enumerate(self.left):
                event = self.attempt(pool, number, name, job)
                if event is None:
                    return self.leave()
                self.tell(name, event)
        finally:
            pool.close()
        return 0

    def attempt(self, pool: LocalPool, number: int, name: str, job: Job) -> Event | None:
        """The run's last event; None where it was stopped because Slurm has asked for the end."""
        event = Event(number, "busy")
        for _ in range(BUSY_TRIES):
            if self.cancelled(name):
                return Event(number, "stopped")
            if self.signals:
                return None
            pool.submit(number, job)
            event = self.follow(pool, number, name)
            if event.kind == "stopped":
                return None if self.signals and not self.cancelled(name) else event
            if event.kind != "busy":
                return event
            time.sleep(BUSY_SECONDS)
        return event

    def follow(self, pool: LocalPool, number: int, name: str) -> Event:
        asked = False
        while True:
            for event in pool.events(0.5):
                if event.kind != "progress":
                    return event
                if time.monotonic() - self.told >= REPORT_SECONDS:
                    self.tell(name, event)
            if self.signals and not asked:
                asked = True
                pool.cancel(number)

    def leave(self) -> int:
        """Back into the queue, where the end of the job's time or a preemption was announced; after a SIGTERM Slurm
        itself knows whether the job runs again."""
        if signal.SIGUSR1 in self.signals:
            own = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
            with contextlib.suppress(InputError, RunFailed):
                command("scontrol", "requeue", own)
        return 75

    def cancelled(self, name: str) -> bool:
        try:
            return name in (self.folder / "cancelled").read_text("utf-8").splitlines()
        except OSError:
            return False

    def tell(self, name: str, event: Event) -> None:
        """Write it down. What cannot be written, of a store that is away, the driver finds out: the run is not done."""
        self.told = time.monotonic()
        entry = {key: value for key, value in asdict(event).items() if key != "number"}
        with contextlib.suppress(OSError), self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": name, **entry}) + "\n")


def final_events(path: Path) -> Iterator[dict[str, Any]]:
    """The last events of a task's runs, as far as they are written."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill leaves the last line incomplete
                if (entry := json.loads(line))["kind"] != "progress":
                    yield entry


def command(*words: str) -> str:
    """What a command of Slurm prints. Raises InputError with its own words where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{words[0]} does not answer ({_COMMAND_SECONDS:.0f} s)") from None
    if done.returncode:
        said = " ".join(re.sub(rf"^{words[0]}: |Try \".*", "", done.stderr, flags=re.MULTILINE).split())
        raise InputError(f"{words[0]} failed: {said or f'exit code {done.returncode}'}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(_Work(Path(sys.argv[1]), int(os.environ["SLURM_ARRAY_TASK_ID"])).run())
