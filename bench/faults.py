"""Sweeps under faults: killed, paused, cut off, and still the table of an undisturbed sweep: python bench/faults.py

A study of a few tiny recipes is swept once undisturbed. Then, in each round, one fault in turn strikes at random times
(by a seed) while one or two drivers run; whatever ended is started again, until the study is done. What must hold: the
same table, bit for bit; the weights too; no run trained to its end twice; nothing hangs; all energy that any attempt
logged is in run.json, and FLOPs of killed attempts are there where the logs have passes that were made in vain.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from safetensors.torch import load_file

from robudget.recipe import Recipe
from robudget.store import RunFolder, Store
from robudget.sweep.study import Study
from robudget.tables.read import load_runs

EXACT = ["slug", "aa_acc", "clean_acc", "val_acc", "train_flops_exact", "train_flops_paper", "eval_flops_exact"]
TINY = {
    "model.name": "wrn-10-1", "model.base": 2, "epochs": 4, "epoch_images": 512, "batch_size": 64, "craft.steps": 1,
    "validation.images": 20, "validation.steps": 2, "evaluation.images": 24,
}  # fmt: skip
STALE_SECONDS = 6.0
ROUND_SECONDS = 600.0
# Imported by every interpreter at its start: what a fault needs in a process. ROBUDGET_… reaches workers on Ray too.
INSIDE = """
import builtins, os, random, signal, sys, time
fault, original, real = os.environ.get("ROBUDGET_FAULT"), builtins.__import__, time.time
if fault == "clock":
    time.time = lambda: real() + random.choice((-3600, 0, 60, 86400))
if fault == "segfault":
    def load(name, *rest, **more):
        module = original(name, *rest, **more)
        runner = sys.modules.get("robudget.runner")
        if runner is not None and hasattr(runner, "run") and not hasattr(runner, "patched"):
            run, runner.patched = runner.run, True
            def broken(recipe, **options):
                if recipe.seed == int(os.environ["ROBUDGET_FAULT_SEED"]):
                    os.kill(os.getpid(), signal.SIGSEGV)
                return run(recipe, **options)
            runner.run = broken
        return module
    builtins.__import__ = load
"""


@dataclass
class Disturbed:
    """A sweep that is disturbed: drivers are started, and `count` says what happened. `inside` has `INSIDE`."""

    fault: str
    store: Path
    study: Path
    inside: Path
    where = ("--workers", "1")  # on this machine
    settings: ClassVar[dict[str, str]] = {}
    count: dict[str, float] = field(default_factory=lambda: {"starts": 0, "kills": 0})
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        command = [sys.executable, "-m", "robudget", "sweep", str(self.study), "device=cpu", "threads=1", *self.where]
        settings = self.settings | {
            "PYTHONPATH": f"{self.inside}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "ROBUDGET_STALE_SECONDS": str(STALE_SECONDS),
            "ROBUDGET_NOTE_SECONDS": "0.2",  # a run takes seconds
            "ROBUDGET_FAULT": self.fault,
            "ROBUDGET_FAULT_SEED": "0",
        }
        with (self.inside / f"{self.store.name}.log").open("ab") as log:
            driver = subprocess.Popen(
                [*command, "--store", str(self.store)], env=os.environ | settings, stdout=log, stderr=log
            )
        self.drivers.append(driver)
        self.count["starts"] += 1

    def workers(self) -> list[psutil.Process]:
        found = []
        for driver in self.drivers:
            with contextlib.suppress(psutil.Error):
                found += [p for p in psutil.Process(driver.pid).children() if "robudget.sweep.local" in p.cmdline()]
        return found

    def end(self) -> None:
        """Kill what is left of the round."""
        for process in (*self.workers(), *self.drivers):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def kill(self, process: psutil.Process | subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(psutil.Error):
            process.kill()
            self.count["kills"] += 1

    def ended(self) -> bool:
        """Has every driver ended?"""
        return all(driver.poll() is not None for driver in self.drivers)

    def lines(self) -> int:
        with contextlib.suppress(OSError):
            return sum(len(path.read_bytes().splitlines()) for path in self.store.glob("*/log.jsonl"))
        return 0

    def wait(self, condition: Callable[[], bool], seconds: float = ROUND_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.fault}: nothing happened for {seconds:.0f} s")
            time.sleep(0.05)

    def some_work(self, chance: random.Random) -> None:
        """Until a few more lines are in the logs, or all drivers have ended."""
        wanted = self.lines() + chance.randint(1, 8)
        self.wait(lambda: self.lines() >= wanted or self.ended())
        time.sleep(chance.uniform(0, 0.3))

    def complete(self) -> None:
        """Start a driver where none lives, until one ends well."""
        for _ in range(5):
            if self.ended():
                self.start()
            self.wait(self.ended)
            if any(driver.returncode == 0 for driver in self.drivers):
                return
        raise RuntimeError(f"{self.fault}: no driver ends well")


def worker_killed(now: Disturbed, chance: random.Random) -> None:
    now.start()
    for _ in range(2):
        now.some_work(chance)
        for worker in now.workers():
            now.kill(worker)


def driver_killed(now: Disturbed, chance: random.Random) -> None:
    for _ in range(2):
        now.start()
        now.some_work(chance)
        now.kill(now.drivers[-1])
        now.drivers[-1].wait()


def two_drivers(now: Disturbed, chance: random.Random) -> None:
    now.start()
    now.start()
    now.some_work(chance)
    now.kill(now.drivers[chance.randrange(2)])


def paused_owner(now: Disturbed, chance: random.Random) -> None:
    """Another driver follows the silent owner, which comes back when the run is done, or nearly."""
    now.start()
    now.some_work(chance)
    paused = [*now.workers(), psutil.Process(now.drivers[0].pid)]
    for process in paused:
        process.suspend()
    held = newest_leases(now.store)
    now.start()
    now.wait(lambda: newest_leases(now.store) != held or now.drivers[-1].poll() is not None)
    now.some_work(chance)
    for process in paused:
        with contextlib.suppress(psutil.Error):
            process.resume()
    now.count["paused"] = len(paused) - 1


def newest_leases(store: Path) -> set[str]:
    return {str(path) for path in store.glob("*/.lease-*")}


def store_away(now: Disturbed, chance: random.Random) -> None:
    now.start()
    now.some_work(chance)
    away = now.store.with_name("away")
    now.store.rename(away)
    time.sleep(chance.uniform(2, 2 * STALE_SECONDS))
    if now.store.exists():
        raise RuntimeError("the store was begun anew while it was away")
    away.rename(now.store)


def disk_full(now: Disturbed, chance: random.Random) -> None:
    """In a small file system of its own, where this user may mount one."""
    now.store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(now.store)], check=True, capture_output=True)
    now.start()
    now.some_work(chance)
    with contextlib.suppress(OSError), (now.store / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    now.wait(lambda: now.drivers[0].poll() is not None)
    now.count["ended"] = now.drivers[0].returncode
    (now.store / "ballast").unlink()


def segfault(now: Disturbed, chance: random.Random) -> None:
    """One recipe ends its process each time: it is set aside, the others are done, and without the fault it is too."""
    now.start()
    now.wait(lambda: now.drivers[0].poll() is not None)
    done = sum(folder.done for folder in Store(now.store).folders())
    now.count |= {"set aside": len(Study.load(now.study).recipes) - done, "ended": now.drivers[0].returncode}
    now.fault = ""


def clock_jumps(now: Disturbed, chance: random.Random) -> None:
    now.start()
    now.some_work(chance)
    now.kill(now.drivers[0])


def liveness(now: Disturbed, chance: random.Random) -> None:
    """Two drivers at all times, of which one is killed every 10 to 20 s, until the study is done."""
    total = len(Study.load(now.study).recipes)

    def done() -> bool:
        return now.store.is_dir() and sum(folder.done for folder in Store(now.store).folders()) == total

    began = time.monotonic()
    while not done() and time.monotonic() - began < ROUND_SECONDS:
        while sum(driver.poll() is None for driver in now.drivers) < 2:
            now.start()
        with contextlib.suppress(TimeoutError):
            now.wait(done, chance.uniform(10, 20))
            break
        alive = [driver for driver in now.drivers if driver.poll() is None]
        if alive:
            now.kill(chance.choice(alive))
    now.count["seconds until all were done"] = round(time.monotonic() - began)


FAULTS = {
    "worker killed": worker_killed, "driver killed": driver_killed, "two drivers": two_drivers,
    "paused owner": paused_owner, "store away": store_away, "disk full": disk_full, "segfault": segfault,
    "clock": clock_jumps, "liveness": liveness,
}  # fmt: skip


def differences(store: Path, reference: Path, recipes: list[Recipe]) -> list[str]:
    """What is not as in the undisturbed store; empty where all is."""
    found = []
    mine, theirs = (load_runs(each).set_index("run_id").sort_index()[EXACT] for each in (store, reference))
    if not mine.equals(theirs):
        found.append(f"the tables differ: {mine.compare(theirs)}")
    for recipe in recipes:
        folder, other = Store(store).folder(recipe), Store(reference).folder(recipe)
        weights, others = load_file(folder.best), load_file(other.best)
        if any(not torch.equal(weights[key], others[key]) for key in weights.keys() | others.keys()):
            found.append(f"{recipe.slug}: other weights")
        if (ends := sum(event["epoch"] == recipe.epochs for event in folder.events("epoch"))) > 1:
            found.append(f"{recipe.slug}: trained to its end {ends} times")
        found += unbilled(folder, other)
    return found


def unbilled(folder: RunFolder, reference: RunFolder) -> list[str]:
    """What attempts took by the log and run.json does not have. `reference`: the same run, undisturbed."""
    found = []
    for window in ("training", "evaluation"):
        record = folder.record()[window]
        logged = sum(event["kwh"] for event in windows(folder, window))
        if abs(logged - record["energy"]["kwh"]) > 1e-12:
            found.append(f"{folder.path.name}: {window} logged {logged} kWh, billed {record['energy']['kwh']}")
        in_vain = passes(folder, window) - passes(reference, window)
        if record["flops_lost_how"] != "counted" or (record["flops_lost"] > 0) != bool(in_vain):
            said = f"{record['flops_lost']} FLOP lost, {record['flops_lost_how']}"
            found.append(f"{folder.path.name}: {window} made {dict(in_vain)} in vain, and says {said}")
    return found


def windows(folder: RunFolder, window: str) -> list[dict[str, Any]]:
    return [event for event in folder.events("energy") if event["window"] == window]


def passes(folder: RunFolder, window: str) -> Counter[str]:
    """Image passes of all attempts, by phase, as far as they were logged."""
    return sum((Counter(event.get("calls")) for event in windows(folder, window)), Counter())


def lost_percent(store: Path) -> float:
    """FLOPs of killed attempts, in percent of those that the runs stand on."""
    stages = [folder.record()[stage] for folder in Store(store).folders() for stage in ("training", "evaluation")]
    return 100 * sum(stage["flops_lost"] for stage in stages) / sum(stage["flops_exact"] for stage in stages)


def repeated_epochs(store: Path) -> int:
    epochs = [[event["epoch"] for event in folder.events("epoch")] for folder in Store(store).folders()]
    return sum(len(each) - len(set(each)) for each in epochs)


def tiny_study(home: Path, seeds: int) -> Path:
    """A study of so many tiny recipes."""
    alternatives = {f"s{seed}": {"seed": seed} for seed in range(seeds)}
    path = home / "study.yaml"
    path.write_text(json.dumps({"base": Recipe.load("digits", TINY).to_dict(), "axes": {"seed": alternatives}}))
    return path


def play(
    faults: Mapping[str, Callable[[Disturbed, random.Random], None]],
    asked: argparse.Namespace,
    home: Path,
    begin: Callable[[str, str], Disturbed],
) -> int:
    """The undisturbed sweep, then `asked.rounds` rounds, each `begin(fault, name of the store)`; exit code 1 where one
    did not end as undisturbed."""
    plain = begin("", "undisturbed")
    recipes = list(Study.load(plain.study).recipes)
    began = time.monotonic()
    plain.complete()
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    failed = 0
    for number in range(asked.rounds):
        fault, chance = asked.faults[number % len(asked.faults)], random.Random(asked.seed + number)
        now = begin(fault, f"round-{number}")
        began, wrong = time.monotonic(), []
        try:
            faults[fault](now, chance)
            now.complete()
            wrong = differences(now.store, plain.store, recipes)
            now.count["repeated epochs"] = repeated_epochs(now.store)
            now.count["% of FLOP lost"] = round(lost_percent(now.store), 1)
        except subprocess.CalledProcessError as error:
            print(f"{number:>3} {fault:<14} not possible here: {error.stderr.decode().strip()}", flush=True)
            continue
        except (TimeoutError, RuntimeError, OSError) as error:
            wrong = [str(error)]
        finally:
            now.end()
        failed += bool(wrong)
        what = ", ".join(f"{value} {name}" for name, value in now.count.items())
        seconds = time.monotonic() - began
        print(f"{number:>3} {fault:<14} {seconds:>4.0f} s  {what}  {wrong or 'as undisturbed'}", flush=True)
        if wrong:
            print((now.inside / f"{now.store.name}.log").read_text(errors="replace")[-3000:], flush=True)
        elif fault == "disk full":
            subprocess.run(["umount", "--lazy", str(now.store)], check=False)
        else:
            shutil.rmtree(now.store)
    print(f"{asked.rounds} rounds, {failed} not as undisturbed")
    return int(failed > 0)


def parser(doc: str, faults: Sequence[str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc)
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--recipes", type=int, default=3)
    made.add_argument("--faults", nargs="*", default=[name for name in faults if name != "liveness"], choices=faults)
    return made


def folder_inside(home: Path) -> Path:
    """A folder whose code every interpreter imports at its start that has it in PYTHONPATH."""
    inside = home / "inside"
    inside.mkdir()
    (inside / "sitecustomize.py").write_text(INSIDE)
    return inside


def main() -> int:
    asked = parser(__doc__, list(FAULTS)).parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        study, inside = tiny_study(home, asked.recipes), folder_inside(home)
        return play(FAULTS, asked, home, lambda fault, store: Disturbed(fault, home / store, study, inside))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
