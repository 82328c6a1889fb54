"""The house in numbers: files, lines, levels, circles, hops, start-up, speed: python bench/house.py [CHECKOUT ...]

Files and lines are of src/robudget/**/*.py. A level is one step of the longest chain of imports between files, a circle
a set of files that import each other (imports for types alone count too). Hops of a recipe, an image and a table are
the functions of robudget that stand on the call stack where the work is done: the gradient of a training step, the
gradient of an attack, the fit of a law. Start-up is the least of five runs of a process. --speed runs the same recipes
from two checkouts in turn and gives the ratio of their seconds, by their own meters.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
SMALL = 70  # lines below which a file counts as small
STARTS = {
    "python -c pass": ["-c", "pass"],
    "robudget --help": ["-m", "robudget", "--help"],
    "import robudget": ["-c", "import robudget"],
    "import the fit of a law": ["-c", "import robudget; robudget.fit_power_law"],
    "import training and evaluation": ["-c", "import robudget; robudget.run"],
}


def sources(checkout: Path) -> dict[str, Path]:
    """Module name → file."""
    root = checkout / "src"
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / "robudget").rglob("*.py"))
    }


def imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of robudget that a file names in an import, wherever in its code; the package itself left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in full}
    return names & modules.keys() - {"robudget"}


def components(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components in an order in which what is imported comes first (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    done: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            done.append(component)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return done


def structure(checkout: Path) -> None:
    modules = sources(checkout)
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules.items()}
    graph = {name: imports(path, modules) - {name} for name, path in modules.items()}
    level: dict[str, int] = {}
    circles = []
    for component in components(graph):
        if len(component) > 1:
            circles.append(sorted(component))
        below = {level[other] for name in component for other in graph[name] if other in level}
        for name in component:
            level[name] = 1 + max(below, default=0)
    small = sum(n < SMALL for n in lines.values())
    print(f"  files {len(lines)}, of them under {SMALL} lines {small}, over 400 {sum(n > 400 for n in lines.values())}")
    print(f"  lines {sum(lines.values())}, levels {max(level.values())}, circles {len(circles)} {circles or ''}")


# Runs in the checkout's own interpreter: the deepest stack of robudget's functions at the first call of `leaf`.
PROBE = """
import sys, tempfile
from pathlib import Path
import torch

def stack():
    frame, calls = sys._getframe(2), []
    while frame:
        file = frame.f_code.co_filename
        if "/robudget/" in file and "site-packages" not in file:
            calls.append((file.split("/robudget/", 1)[1], frame.f_code.co_qualname))
        frame = frame.f_back
    return calls[::-1]

deepest = {}
def watch(owner, leaf, what):
    real = getattr(owner, leaf)
    def spy(*args, **kwargs):
        calls = stack()
        name = what(calls)
        if name and len(calls) > len(deepest.get(name, ())):
            deepest[name] = calls
        return real(*args, **kwargs)
    setattr(owner, leaf, spy)

def stage(calls):
    files = {file.split("/")[0] for file, _ in calls}
    if "training" in files:
        return "a recipe, from run() to the gradient of a training step"
    if "evaluation" in files and "attacks" in files:
        return "an image, from run() to the gradient of an attack"

watch(torch.autograd, "grad", stage)
import numpy as np, pandas as pd
import robudget
recipe = robudget.Recipe.load("digits", {
    "model.base": 2, "epochs": 1, "epoch_images": 64, "batch_size": 64, "craft.steps": 1, "validation.images": 20,
    "validation.steps": 1, "evaluation.images": 8,
})
with tempfile.TemporaryDirectory() as folder:
    robudget.run(recipe, store=folder, site=robudget.Site(device="cpu", threads=1))
watch(np.linalg, "solve", lambda calls: "a table, from analyse() to the equations of a fit")
x = np.geomspace(1e12, 1e15, 40)
table = pd.DataFrame({
    "train_flops_exact": x, "aa_acc": 20 * x**0.02 + np.random.default_rng(0).normal(0, 0.3, 40), "clean_acc": 95.0,
    "loss": "at",
})
robudget.analyse(table)
for name, calls in deepest.items():
    print(f"  {name}: {len(calls)} functions in {len({file for file, _ in calls})} files")
    print("    " + " > ".join(f"{file.removesuffix('.py')}:{function}" for file, function in calls))
"""


def hops(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment(checkout), capture_output=True, text=True, check=False
    )
    print(done.stdout.rstrip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1])


def starts(checkout: Path) -> None:
    for name, command in STARTS.items():
        seconds = []
        for _ in range(RUNS):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *command], env=environment(checkout), stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - begun)
        print(f"  {name:32} {min(seconds):.2f} s (median {sorted(seconds)[RUNS // 2]:.2f})")


# What trains and is attacked in float32, and in bfloat16.
SPEED = {
    "digits, wrn-10-1 base 12": ["model.base=12", "epochs=6", "evaluation.images=40"],
    "digits, wrn-16-4 base 16": ["model.name=wrn-16-4", "model.base=16", "epochs=2", "evaluation.images=16"],
}


def speed(old: Path, new: Path, rounds: int) -> None:
    for name, choices in SPEED.items():
        seconds: dict[Path, list[tuple[float, float]]] = {old: [], new: []}
        for n in range(rounds):
            for checkout in (old, new) if n % 2 == 0 else (new, old):
                with tempfile.TemporaryDirectory() as store:
                    command = ["-m", "robudget", "run", "digits", *choices, "--store", store, "--json"]
                    subprocess.run(
                        [sys.executable, *command], env=environment(checkout), capture_output=True, check=True
                    )
                    (path,) = Path(store).glob("*/run.json")
                    record = json.loads(path.read_text("utf-8"))
                seconds[checkout].append((record["training"]["seconds"], record["evaluation"]["seconds"]))
        for stage, what in enumerate(("training", "evaluation")):
            before, after = ([pair[stage] for pair in seconds[checkout]] for checkout in (old, new))
            ratios = [b / a for a, b in zip(before, after, strict=True)]
            print(
                f"  {name}, {what}: {statistics.median(before):.2f} s, then {statistics.median(after):.2f} s; ratio "
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, n = {rounds})"
            )


def environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout / "src")}


def main() -> None:
    here = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[here], help="default: this one")
    parser.add_argument("--no-starts", action="store_true", help="leave the start-up times out")
    parser.add_argument(
        "--speed", type=int, default=0, metavar="N", help="only this: N rounds of two checkouts in turn"
    )
    options = parser.parse_args()
    if options.speed:
        old, new = (checkout.resolve() for checkout in options.checkouts)
        return speed(old, new, options.speed)
    for checkout in options.checkouts:
        print(checkout.resolve().name)
        structure(checkout)
        hops(checkout.resolve())
        if not options.no_starts:
            starts(checkout.resolve())


if __name__ == "__main__":
    main()
