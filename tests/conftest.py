"""What several test folders share: small models, recipes of a second or two, tables of known truth."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest

# The suite runs on small models, which more threads only slow down; children (sweep workers) inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a test fits is of this code: nothing comes from, or stays in, the user's cache. The tests of one call of pytest
# share their numbers, which are found by everything that they depend on (`robudget.cache`), and so do its processes.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _numbers = tempfile.TemporaryDirectory(prefix="robudget-numbers-")
    os.environ["ROBUDGET_REMEMBER"] = _numbers.name

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robudget import cli
from robudget.attacks.build import rows_of
from robudget.attacks.ensemble import Member
from robudget.prediction import Predictor
from robudget.recipe import Recipe
from robudget.tables import read_table
from robudget.threat import Norm, Threat

Run = Callable[..., tuple[int, str, str]]

SHARED = Path(__file__).resolve().parents[2] / "shared"

TINY = {
    "model.name": "wrn-10-1",
    "model.base": 2,
    "epochs": 2,
    "epoch_images": 256,
    "batch_size": 64,
    "craft.steps": 1,
    "validation.images": 20,
    "validation.steps": 2,
    "evaluation.images": 12,
}


# The files that take longest, so that no process is left with one of them at the end. Each process takes its first file
# and the one that is as many processes further on: the two that wait for clusters go to one process of three.
LONGEST = (
    "sweep/test_slurm.py", "test_docs.py", "evaluation/test_reference.py",
    "sweep/test_ray.py", "test_torchrun.py", "test_golden.py",
    "planning/test_planner.py", "report/test_page.py", "test_analysis.py", "answers/test_studies.py",
    "attacks/test_closed_form.py", "evaluation/test_confirmation.py", "evaluation/test_quick.py", "sweep/test_local.py",
    "sweep/test_halving.py", "sweep/test_status.py", "test_threads.py", "cli/test_cli.py",
    "prediction/test_predictor.py", "report/test_browser.py", "report/test_figures.py", "test_stop.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes
        places = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay: the collector need not look through them again and again


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Weights that a test draws are the same in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test fits is computed in it, however often it was before."""
    monkeypatch.setenv("ROBUDGET_REMEMBER", "no")


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """Digits, a WideResNet of some thousand parameters, two short epochs, twelve images for the full ensemble."""
    return Recipe.load("digits", TINY)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published runs, CIFAR-10 and the reference model, where there is one beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return SHARED


@pytest.fixture
def robudget_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: its exit code, stdout and stderr."""

    def command(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robudget", *args])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


# -- processes that start at once --------------------------------------------------------------------------------------


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python programs that a test starts (`[sys.executable, "-m" or "-c", …]`) are forks of this process, which has
    imported torch: a new interpreter takes 2 to 4 s of CPU for that.

    Each is a process of its own, with its own environment, streams, signals and end, and what it starts is forked, too.
    What a test patches here is patched there, and torch has the threads that it has here: what has to be shown of a
    fresh interpreter is not shown by one of these.
    """
    monkeypatch.setattr(subprocess, "Popen", Forked)


class Forked(subprocess.Popen[Any]):
    """Never gets as far as to execute the interpreter: `preexec_fn`, the last call before it, is the program."""

    def __init__(self, args: Any, **options: Any) -> None:
        words = [word for word in args if word != "-u"] if isinstance(args, (list, tuple)) else []
        if words[:1] == [sys.executable] and words[1] in ("-m", "-c"):
            options["preexec_fn"] = lambda: become(words[1], words[2], words[3:], options.get("env"))
        super().__init__(args, **options)


def become(how: str, what: str, arguments: Sequence[str], environment: Mapping[str, str] | None) -> NoReturn:
    """Be `python -m` (or `-c`) `what`, in a process that was forked a moment ago."""
    code: object = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (0, 1, 2, null):
                os.dup2(null, int(name), inheritable=False)  # closed, and its number not used again
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit._clear()
        gc.enable()
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115 (open as long as the process)
            for fd, mode in enumerate("rww")
        )
        sys.argv = [what if how == "-m" else how, *arguments]
        sys.path.insert(0, "")
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 1)


# -- small models ----------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Logits Wx + b of the flattened image."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


class Small(nn.Module):
    """Two convolutions with BatchNorm and a head: 4 classes of 1×8×8 images."""

    def __init__(self, classes: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 16, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def blobs(n: int, classes: int, seed: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Images of noisy class prototypes: learnable, not trivial."""
    g = torch.Generator().manual_seed(seed)
    prototypes = torch.rand(classes, channels, 8, 8, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=g)
    noise = torch.randn(n, channels, 8, 8, generator=g)
    return (0.5 + 0.35 * (prototypes[y] - 0.5) + 0.12 * noise).clamp(0, 1), y


def train(model: nn.Module, classes: int, channels: int = 1) -> nn.Module:
    x, y = blobs(512, classes, 1, channels)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks on a shared machine: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A trained `Small` with 6 classes and one channel."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return train(Small(6), 6)


@pytest.fixture(scope="session")
def images() -> tuple[Tensor, Tensor]:
    return blobs(60, 6, 7)


@pytest.fixture(scope="session")
def many() -> tuple[Tensor, Tensor]:
    """200 images, for statements about shares of images."""
    return blobs(200, 6, 8)


@pytest.fixture(scope="session")
def crowd() -> tuple[Tensor, Tensor]:
    """300 images, for statements about a few percent of them."""
    return blobs(300, 6, 9)


@pytest.fixture
def short_attack(small: nn.Module, images: tuple[Tensor, Tensor]) -> Callable[[str, Norm], tuple[Any, ...]]:
    """(name, norm) → (x, y, threat, rows, member): an attack of few iterations on what `small` classifies correctly, of
    which it breaks some."""

    def setting(name: str, norm: Norm) -> tuple[Any, ...]:
        x, y = images
        reach = 3 if name == "square" else 1
        threat = Threat(norm, reach * {"linf": 0.05, "l2": 0.3, "l1": 1.5}[norm])
        with torch.no_grad():
            logits = small(x)
        correct = (logits.argmax(1) == y).nonzero().squeeze(1)
        large = norm == "l1" and name.startswith("apgd")
        member = Member(name, steps=150 if name == "square" else 13, targets=2, large_eps=large)
        return x, y, threat, rows_of(member, correct, logits), member

    return setting


# -- tables of known truth -------------------------------------------------------------------------------------------

SIZES = {"wrn-10-1": 2e4, "wrn-16-2": 2e5, "wrn-16-4": 7e5}
EFFECT = {"synthetic": 4.0, "loss": 2.0, "ema": 1.0}  # points that each choice is worth in `grid_table`


@pytest.fixture(scope="session")
def paper(shared: Path) -> pd.DataFrame:
    """The paper's 319 runs as our table."""
    return read_table(shared / "data" / "paper_runs.csv")


@pytest.fixture(scope="session")
def paper_predictor(paper: pd.DataFrame) -> Predictor:
    return Predictor.fit(paper)


@pytest.fixture(scope="session")
def bench() -> ModuleType:
    """bench/laws.py, which knows how to make tables of known truth."""
    path = Path(__file__).resolve().parents[1] / "bench" / "laws.py"
    spec = importlib.util.spec_from_file_location("bench_laws", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grid_table(noise: float = 0.2, seed: int = 0) -> pd.DataFrame:
    """A full factorial study with additive effects: 3 sizes × 2 losses × 3 step counts × synthetic × EMA = 72 runs.

    One attack step collapses the two larger models. FLOPs are exact; energy is in proportion, with scatter.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for (model, size), loss, steps, synthetic, ema in product(
        SIZES.items(), ["at", "trades"], [1, 2, 5], [False, True], [False, True]
    ):
        images = 50_000 * 20.0
        flops = 100 * size * images * (2 * steps + (7 if loss == "trades" else 3))
        collapsed = steps == 1 and model != "wrn-10-1"
        accuracy = 30 + 2 * np.log10(size) + 3 * np.log2(steps) + EFFECT["synthetic"] * synthetic
        accuracy += EFFECT["loss"] * (loss == "trades") + EFFECT["ema"] * ema + rng.normal(0, noise)
        rows.append({
            "run_id": f"run-{len(rows):03d}", "status": "done", "dataset": "digits", "norm": "linf", "eps": 0.1,
            "model": model, "base": 16, "activation": "relu", "variant": "original", "parameters": size,
            "loss": loss, "beta": 6.0 if loss == "trades" else np.nan, "steps": steps, "epochs": 20,
            "epoch_images": 50_000, "ema": ema, "ema_decay": 0.99 if ema else np.nan, "synthetic": synthetic,
            "synthetic_fraction": 0.7 * synthetic, "aa_acc": abs(rng.normal(0, 1)) if collapsed else accuracy,
            "clean_acc": 90.0, "collapsed": collapsed, "images_seen": images, "train_flops_exact": flops,
            "train_energy_kwh": flops * 1e-13 * np.exp(rng.normal(0, 0.1)),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["cost_usd"] = frame.train_energy_kwh * 0.19
    return frame


@pytest.fixture
def grid() -> pd.DataFrame:
    return grid_table()


@pytest.fixture(scope="session")
def grid_predictor() -> Predictor:
    return Predictor.fit(grid_table())


def simple(x: np.ndarray, y: np.ndarray, **columns: object) -> pd.DataFrame:
    """A table of adversarially trained runs with nothing but compute and accuracy."""
    return pd.DataFrame({"train_flops_exact": x, "aa_acc": y, "clean_acc": 95.0, "loss": "at"} | columns)


@pytest.fixture(name="simple", scope="session")
def simple_fixture() -> object:
    return simple


class Waits(TorchDispatchMode):
    """Operations that make the host wait for the device: values read, sizes that depend on values, blocking copies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        self.operations += 1
        reads = any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal."))
        masks = name.startswith(("aten.index.", "aten.index_put")) and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        where = kwargs.get("device")
        moves = "_to_copy" in name and where is not None and torch.device(where).type != args[0].device.type
        copies = name.startswith("aten.copy_") and args[0].device.type != args[1].device.type
        if reads or masks or ((moves or copies) and not kwargs.get("non_blocking", False)):
            self.seen.append(name)
        return func(*args, **kwargs)


@pytest.fixture
def waits() -> type[Waits]:
    return Waits
