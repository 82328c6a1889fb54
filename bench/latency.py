"""How long people wait: whole commands of one or more checkouts: python bench/latency.py [options] [CHECKOUT ...]

Each command runs in a process of its own, start included, in an empty folder: first with an empty cache of numbers,
then `--rounds` times with what it has kept, the checkouts in turn. All of it again under each condition asked for:
beside busy processes (`--beside 0 1 2`: alone, beside one, beside two), within a control group of so many CPUs
(`--quota 0.5`; as root, says why where none can be made), and with no byte code to read and none written (`--cold`, as
in a container that forbids it). One table at the end. `--pairs` instead: two runs at once and one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

TABLE = "{table}"
COMMANDS = {
    "help": ["--help"],
    "run, 3 epochs of digits": ["run", "digits", "epochs=3", "evaluation.images=30"],
    "fit": ["fit", TABLE],
    "plan": ["plan", "--from", TABLE, "--target", "60"],
    "predict": ["predict", "paper", "--from", TABLE],
    "report": ["report", TABLE, "--out", "page"],
    "report of 10,000 runs": ["report", "{many}", "--out", "page"],
    "cost of a study, on a device": ["cost", "paper-320", "--device", "h100"],
    "cost of a study, here": ["cost", "paper-320"],
    "runs": ["runs", "{store}"],
}
BUSY = "while True: pass"
MANY = 10_000  # runs of the made-up table
MODELS = {  # parameters, forward FLOPs of one image
    "wrn-16-2": (7e5, 1.0e8), "wrn-28-4": (5.8e6, 1.7e9), "wrn-28-10": (36.5e6, 1.049e10),
    "wrn-34-10": (46.2e6, 1.33e10), "wrn-34-20": (184.5e6, 5.3e10), "wrn-70-16": (266.8e6, 7.76e10),
}  # fmt: skip


def made_up_runs(n: int, seed: int = 0) -> pd.DataFrame:
    """n runs (at most 15,552) as a study of CIFAR-10 could give them: a saturating law, effects of the choices, recipes
    that fall short of it, collapse with one attack step, and noise of 10,000 evaluated images."""
    rng = np.random.default_rng(seed)
    grid = list(product(MODELS, ["silu", "relu"], ["at", "trades", "mart"], [1, 2, 3, 5, 7, 10],
                        [10, 30, 50, 110, 200, 400], [False, True], [False, True], [1, 2, 3]))  # fmt: skip
    rows = []
    for i in rng.permutation(len(grid))[:n]:
        model, activation, loss, steps, epochs, ema, synthetic, one = grid[i]
        parameters, forward = MODELS[model]
        images = epochs * 50_000.0
        flops = forward * images * (2 * steps + (7 if loss == "trades" else 3))
        accuracy = 72 - 16 * (flops / 1e17) ** -0.12 - 4 * (epochs > 100 and not ema) + 4 * (synthetic and epochs > 50)
        accuracy += 2 * (loss == "trades") - 1.5 * (activation == "relu") - abs(rng.normal(0, 2))
        if steps == 1 and rng.random() < 0.7:
            accuracy = abs(rng.normal(0, 1))
        robust = rng.binomial(10_000, min(max(accuracy, 0.0), 100.0) / 100) / 100
        kwh = flops * 5.2e-20 * math.exp(rng.normal(0, 0.1))
        rows.append({
            "run_id": f"run-{i:05d}", "slug": f"cifar10-{model}-{activation}-{loss}{steps}-{epochs}-s{one}",
            "status": "done", "dataset": "cifar10", "norm": "linf", "eps": 8 / 255, "model": model, "base": 16,
            "activation": activation, "variant": "original", "parameters": parameters, "loss": loss,
            "beta": math.nan if loss == "at" else 6.0, "steps": steps, "epochs": epochs, "epoch_images": 50_000,
            "ema": ema, "ema_decay": 0.999 if ema else math.nan, "cutmix": False, "synthetic": synthetic,
            "synthetic_fraction": 0.7 * synthetic, "synthetic_amount": 1e6 * synthetic, "seed": one, "aa_acc": robust,
            "n_eval": 10_000, "clean_acc": 85 + rng.normal(0, 3), "images_seen": images, "train_flops_exact": flops,
            "train_flops_how": "counted", "train_seconds": flops / 6e13, "train_seconds_how": "measured",
            "gpu_hours": flops / 6e13 / 3600, "train_energy_kwh": kwh, "train_energy_how": "measured",
            "cost_usd": 0.19 * kwh, "cost_usd_how": "estimated", "co2_kg": 0.4 * kwh, "co2_kg_how": "estimated",
        })  # fmt: skip
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Condition:
    """What else the machine does, and how much of it the commands may have."""

    name: str
    beside: int = 0
    quota: float | None = None
    cold: bool = False


@dataclass
class Took:
    """Wall and CPU seconds of a command: the first time and later ones; `error` where it failed."""

    first: tuple[float, float] = (math.nan, math.nan)
    later: list[tuple[float, float]] = field(default_factory=list)
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return self.error
        wall, cpu = ([took[i] for took in self.later] for i in (0, 1))
        again = f", then {spread(wall)} (CPU {spread(cpu)})" if self.later else ""
        return f"{self.first[0]:.2f} (CPU {self.first[1]:.2f}){again}"


def environment(checkout: Path, cache: Path, *, cold: bool) -> dict[str, str]:
    """A cache of its own, so that the first run of a command is a first one, and nothing said of threads; `cold`: no
    byte code anywhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}
    own = {"PYTHONPATH": str(checkout / "src"), "ROBUDGET_CACHE": str(cache)}
    if cold:
        own |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(cache / "nothing")}
    return kept | own


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def seconds_of(command: list[str], env: dict[str, str], folder: Path) -> tuple[float, float]:
    """Wall seconds and CPU seconds (children included) of one command. Raises RuntimeError where it fails."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "robudget", *command], env=env, cwd=folder, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def spread(values: Sequence[float]) -> str:
    """Median, and the least to the most of several."""
    most = f" [{min(values):.2f} to {max(values):.2f}]" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{most}"


def command(checkouts: list[Path], argv: list[str], rounds: int, *, cold: bool) -> list[Took]:
    """One command of each checkout, first and later."""
    out = [Took() for _ in checkouts]
    with tempfile.TemporaryDirectory() as caches:
        for n in range(rounds + 1):
            for i in range(len(checkouts)) if n % 2 == 0 else reversed(range(len(checkouts))):
                env = environment(checkouts[i], Path(caches) / str(i), cold=cold)
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        took = seconds_of(argv, env, Path(folder))
                    except RuntimeError as error:
                        out[i].error = str(error)
                        continue
                if n == 0:
                    out[i].first = took
                else:
                    out[i].later.append(took)
    return out


PAIR = ["run", "digits", "model.name=wrn-16-2", "model.base=8", "epochs=2", "craft.steps=5", "evaluation.images=40"]


def pairs(checkouts: list[Path], rounds: int) -> None:
    """Two runs at once ÷ the same two one after the other, in wall seconds and in CPU seconds."""
    for checkout in checkouts:
        walls, works = [], []
        for n in range(rounds):
            took = []
            for together in (True, False) if n % 2 == 0 else (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    env = environment(checkout, Path(folder) / "cache", cold=False)
                    before, start = os.times(), time.perf_counter()
                    running = []
                    for seed in (1, 2):
                        argv = [sys.executable, "-m", "robudget", *PAIR, f"seed={seed}", "--store", f"store{seed}"]
                        running.append(subprocess.Popen(argv, env=env, cwd=folder, stdout=subprocess.DEVNULL,
                                                        stderr=subprocess.DEVNULL))  # fmt: skip
                        if not together:
                            running[-1].wait()
                    codes = [process.wait() for process in running]
                    assert codes == [0, 0], f"exit codes {codes}"
                    wall, after = time.perf_counter() - start, os.times()
                cpu = after.children_user + after.children_system - before.children_user - before.children_system
                took.append((together, wall, cpu))
            (_, wall, cpu), (_, wall_apart, cpu_apart) = sorted(took, key=lambda t: not t[0])
            walls.append(wall / wall_apart)
            works.append(cpu / cpu_apart)
        print(
            f"  two runs at once ÷ one after the other, {checkout.name}: {spread(walls)} of the seconds, "
            f"{spread(works)} of the CPU work (n = {rounds})",
            flush=True,
        )


@contextlib.contextmanager
def limited(cpus: float | None) -> Iterator[None]:
    """This process and its children within a control group of so many CPUs."""
    if cpus is None:
        yield
        return
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        group, file, text = root / "robudget-latency", "cpu.max", f"{round(cpus * 100_000)} 100000"
    else:  # version 1, where `cpu.cfs_period_us` is 100,000 unless somebody changed it
        group, file, text = root / "cpu" / "robudget-latency", "cpu.cfs_quota_us", str(round(cpus * 100_000))
    try:
        group.mkdir(exist_ok=True)
        if not (group / file).exists():
            group.rmdir()
            raise OSError(f"{group} has no {file}")
        (group / file).write_text(text)
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise SystemExit(f"--quota {cpus:g}: no control group can be made here ({error})") from None
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).resolve().parents[1]])
    parser.add_argument("--rounds", type=int, default=3, help="beyond the first")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("--table", type=Path, help="of runs, for fit, plan, predict and report")
    parser.add_argument("--store", type=Path, help="of many runs, for runs")
    parser.add_argument("--beside", type=int, nargs="+", default=[0], metavar="N", help="busy processes meanwhile")
    parser.add_argument("--quota", type=float, metavar="CPUS")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--pairs", action="store_true")
    options = parser.parse_args()
    conditions = [Condition(f"beside {n} busy" if n else "alone", beside=n) for n in options.beside]
    if options.quota is not None:
        conditions.append(Condition(f"{options.quota:g} CPUs", quota=options.quota))
    if options.cold:
        conditions.append(Condition("no byte code", cold=True))
    checkouts = [checkout.resolve() for checkout in options.checkouts]
    places = {
        "table": str(options.table.resolve()) if options.table else "",
        "store": str(options.store.resolve()) if options.store else "",
    }
    with tempfile.TemporaryDirectory() as folder:
        if any("{many}" in COMMANDS[name] for name in options.only) and not options.pairs:
            places["many"] = str(Path(folder) / "many.csv")
            made_up_runs(MANY).to_csv(places["many"], index=False)
        if options.pairs:
            for condition in conditions:
                print(condition.name)
                with busy(condition.beside), limited(condition.quota):
                    pairs(checkouts, options.rounds)
        else:
            table(measured(checkouts, options.only, places, options.rounds, conditions), options.rounds)


def measured(
    checkouts: list[Path], names: list[str], places: dict[str, str], rounds: int, conditions: list[Condition]
) -> dict[tuple[str, str], dict[str, Took]]:
    """By command and checkout, and by condition; each said as soon as it is known."""
    out: dict[tuple[str, str], dict[str, Took]] = {}
    for condition in conditions:
        with busy(condition.beside), limited(condition.quota):
            for name in names:
                if any(places.get(place) == "" and f"{{{place}}}" in COMMANDS[name] for place in places):
                    print(f"{name}: left out (no --table or --store)", flush=True)
                    continue
                argv = [part.format(**places) for part in COMMANDS[name]]
                found = command(checkouts, argv, rounds, cold=condition.cold)
                for checkout, took in zip(checkouts, found, strict=True):
                    print(f"{condition.name}: {name}, {checkout.name}: {took}", flush=True)
                    out.setdefault((name, checkout.name), {})[condition.name] = took
    return out


def table(found: dict[tuple[str, str], dict[str, Took]], rounds: int) -> None:
    """All of it, a row a command and checkout, a column a condition."""
    conditions = list(dict.fromkeys(name for row in found.values() for name in row))
    print(f"\nSeconds of wall (and of CPU): the first time, then with kept numbers (n = {rounds})\n")
    print(f"| command | {' | '.join(conditions)} |\n|{' --- |' * (1 + len(conditions))}")
    for (name, checkout), row in found.items():
        print(f"| {name}, {checkout} | {' | '.join(str(row.get(c, '')) for c in conditions)} |")


if __name__ == "__main__":
    main()
