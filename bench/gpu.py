"""Everything that only a GPU can show, in ten minutes on one, each line with its bar: python bench/gpu.py [options]

    python bench/gpu.py                                  all lines that are not done yet; again to go on
    python bench/gpu.py --device cpu --size tiny         the same code on a CPU, small: proves the script, not a GPU

Every line is written to `--out` when it is done, and not measured again on the same device, size and commit. At the end
stands a block for bench/RESULTS.md. A line whose library or file is not there says so and is asked again next time;
PYTHONPATH may name a folder with pyautoattack. Lines that failed before come last. After an error of the GPU itself a
process gets no more answers, so a new one measures the lines that are left.
Images and reference verdicts are read from `shared`, in this checkout or beside it.
"""

# ruff: noqa: E402, I001 (the source tree is put on the path first)

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

import evaluation as authors_side
import training as textbook_side

from robudget.attacks.victim import out_of_memory
from robudget.backend.batch_size import free_bytes, training_bytes
from robudget.backend.device import answering
from robudget.backend.precision import float32_as
from robudget.environment import algorithms
from robudget.evaluation.evaluator import evaluate
from robudget.execution import Site
from robudget.forecast.forecast import forecast
from robudget.meter import gpu
from robudget.meter.flops import of_recipe
from robudget.recipe import Recipe
from robudget.training import Trainer


class Skipped(Exception):
    """A line that can't be measured here, and why."""


@dataclass(frozen=True)
class Scale:
    """How large the measurements are."""

    model: str
    base: int
    batch: int
    steps: int  # timed, of a training
    images: int  # evaluated
    raced: int  # evaluated by the authors' code too
    seconds: float  # of metering
    epoch: int  # steps, of the training that is forecast


SCALES = {
    "full": Scale("wrn-28-10", 16, 512, 6, 512, 64, 60.0, 20),
    "tiny": Scale("wrn-10-1", 2, 16, 2, 4, 2, 1.0, 2),
}


@dataclass(frozen=True)
class Result:
    """A line: what was measured, the bar, and whether it is met (None: there is no bar here, or it was skipped)."""

    value: str
    bar: str
    met: bool | None
    seconds: float = 0.0


@dataclass(frozen=True)
class Bench:
    """Where and how large; the device's name decides which bars apply."""

    device: torch.device
    scale: Scale

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def recipe(self, loss: str = "at", **changes: Any) -> Recipe:
        small = {"model.name": self.scale.model, "model.base": self.scale.base, "validation.images": 10}
        base = {"loss": loss, "craft.steps": 10, "batch_size": self.scale.batch, "ema.decay": 0.995}
        return Recipe().with_(small | base | changes)

    def trainer(self, recipe: Recipe, site: Site = Site(), **options: Any) -> Trainer:  # noqa: B008 (frozen)
        images = textbook_side.random_images(max(256, 3 * recipe.batch_size))
        trainer = Trainer(recipe, images, site, device=self.device, notify=print, **options)
        trainer.model.train()
        return trainer

    def step_seconds(self, recipe: Recipe, site: Site = Site()) -> list[float]:  # noqa: B008 (frozen)
        """Of training steps, after those that choose kernels and capture graphs."""
        trainer = self.trainer(recipe, site)
        with trainer._fast.tuned():
            for _ in range(2):
                trainer._train_step()
            return [self.timed(trainer._train_step) for _ in range(self.scale.steps)]

    def timed(self, call: Callable[[], object]) -> float:
        return textbook_side.timed(call, self.device, time.perf_counter)

    def verdict(self, value: str, bar: str, met: bool) -> Result:
        return Result(value, bar, met if self.on_gpu else None)


# -- the same results --------------------------------------------------------------------------------------------------


def training_agrees(bench: Bench) -> Result:
    """The same three updates on the CPU and on the device, without noise, which is drawn on the device."""
    recipe = Recipe().with_(
        {
            "model.name": "wrn-10-1",
            "model.base": 4,
            "craft.steps": 2,
            "craft.start": "none",
            "data.crop": 0,
            "data.flip": False,
            "batch_size": 32,
            "precision": "float32",
            "validation.images": 10,
        }
    )
    weights = []
    for device in (torch.device("cpu"), bench.device):
        trainer = Bench(device, bench.scale).trainer(recipe)
        with float32_as(tf32=False):  # as the trainer's own loop has it
            for _ in range(3):
                trainer._train_step()
        weights.append(torch.cat([p.detach().cpu().flatten() for p in trainer.model.parameters()]))
    gap = float((weights[0] - weights[1]).norm() / weights[0].norm())
    return bench.verdict(f"weights differ by {gap:.1e} of their norm after 3 updates", "≤ 1e-3", gap <= 1e-3)


def reference(images: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor, list[str]]:
    places = [place for place in (ROOT / "shared", ROOT.parent / "shared") if (place / "reference/wrn.py").exists()]
    if not places:
        raise Skipped("no folder `shared` with the reference model, in this checkout or beside it")
    authors_side.SHARED = places[0]
    x, y = authors_side.reference_images(0, images)
    told = json.loads((places[0] / "reference/verdicts-linf.json").read_text())["verdicts"][:images]
    return authors_side.reference_model(), x, y, told


def verdicts_agree(bench: Bench) -> Result:
    """`standard` on the device beside the authors' verdicts on a CPU."""
    model, x, y, told = reference(bench.scale.images)
    seen = evaluate(model, x, y, authors_side.THREATS["linf"], device=bench.device)
    same = statistics.mean(bool(ours) == (theirs == "robust") for ours, theirs in zip(seen.robust, told, strict=True))
    silent = "silent" if not seen.findings else ", ".join(finding.name for finding in seen.findings)
    value = f"{100 * same:.1f}% of {len(x)} images in {seen.seconds:.0f} s; checks {silent}"
    return bench.verdict(value, "≥ 99.5%, checks silent", same >= 0.995 and not seen.findings)


def batch_sizes_agree(bench: Bench) -> Result:
    """The same verdicts, image by image, whatever the batch size."""
    model, x, y, _ = reference(max(bench.scale.images // 4, 2))
    names = []
    for size in (500, 96, 7):
        seen = evaluate(
            model, x, y, authors_side.THREATS["linf"], device=bench.device, version="quick", batch_size=size
        )
        names.append(list(seen.broken_by))
    same = names[0] == names[1] == names[2]
    return bench.verdict(f"{'equal' if same else 'NOT equal'} with 500, 96 and 7 ({len(x)} images)", "equal", same)


def resume_agrees(bench: Bench) -> Result:
    """Two epochs at once, and one after the other, with deterministic algorithms alone."""
    steps = 2
    changes = {"epochs": 2, "epoch_images": steps * bench.scale.batch, "collapse.action": "off", "validation.steps": 1}
    recipe, site = bench.recipe(**changes), Site(deterministic=True)
    with algorithms(deterministic=True), tempfile.TemporaryDirectory() as folder:
        whole = bench.trainer(recipe, site)
        list(whole)
        first = bench.trainer(recipe, site, folder=Path(folder))
        next(iter(first))
        first.leave()
        resumed = bench.trainer(recipe, site, folder=Path(folder))
        list(resumed)
    same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    return bench.verdict(f"weights {'equal' if same else 'NOT equal'} to the last bit", "equal", same)


def graphs_agree(bench: Bench) -> Result:
    """Three updates with attack steps as CUDA graphs, and without: the same kernels on the same numbers."""
    weights, record = [], ""
    for on in (True, False):
        trainer = bench.trainer(bench.recipe("trades"), Site(cuda_graphs=on, cudnn_benchmark=False))
        for _ in range(3):
            trainer._train_step()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        record = record or trainer.fast_paths["CUDA graphs"]
    gap = float((weights[0] - weights[1]).norm() / weights[0].norm())
    met = record == "on" and gap <= 1e-3
    return bench.verdict(f"graphs {record}; weights differ by {gap:.1e} of their norm", "on, ≤ 1e-3", met)


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(loss: str) -> Callable[[Bench], Result]:
    def line(bench: Bench) -> Result:
        recipe = bench.recipe(loss)
        ours = statistics.median(bench.step_seconds(recipe))
        dataset = textbook_side.random_images(5 * recipe.batch_size)  # workers start with an epoch: not timed
        book = textbook_side.Textbook(recipe, dataset, dataset.train, bench.device)
        book.step()
        theirs = statistics.median(bench.timed(book.step) for _ in range(2))
        matrix = textbook_side.peak(bench.device, time.perf_counter, size=2048 if bench.on_gpu else 256)
        passes = 2 * recipe.craft.steps + (7 if loss == "trades" else 3)
        rate = passes * textbook_side.forward_flops(book.model) * recipe.batch_size / ours
        images, times = recipe.batch_size / ours, theirs / ours
        value = (
            f"{images:.0f} images/s, {100 * rate / matrix:.0f}% of the measured bf16 matrix peak "
            f"({matrix / 1e12:.3g} TFLOP/s), {times:.1f}× the textbook's {recipe.batch_size / theirs:.0f}"
        )
        return bench.verdict(value, "≥ 50% of peak, ≥ 5×", rate / matrix >= 0.5 and times >= 5)

    return line


def host_share(bench: Bench) -> Result:
    """How long the host needs to queue a step, of the step's time; with and without graphs."""
    parts = []
    for on in (True, False):
        trainer = bench.trainer(bench.recipe(), Site(cuda_graphs=on))
        shares, times = [], []
        with trainer._fast.tuned():
            for number in range(2 + bench.scale.steps):
                textbook_side.synchronise(bench.device)
                begun = time.perf_counter()
                trainer._train_step()
                queued = time.perf_counter() - begun
                textbook_side.synchronise(bench.device)
                if number >= 2:  # the first ones choose kernels and capture graphs
                    times.append(time.perf_counter() - begun)
                    shares.append(queued / times[-1])
        parts.append((statistics.median(shares), bench.scale.batch / statistics.median(times)))
    (with_graphs, fast), (without, slow) = parts
    value = f"{100 * with_graphs:.0f}% with graphs ({fast:.0f} images/s), {100 * without:.0f}% without ({slow:.0f})"
    return bench.verdict(value, "below 50% with graphs", with_graphs < 0.5)


def evaluation_graphs(bench: Bench) -> Result:
    """`quick` with its attack steps as CUDA graphs, and without: time, and the same verdicts."""
    model, x, y, _ = reference(max(bench.scale.images // 2, 2))
    seconds, names, record = [], [], ""
    for on in (True, False):
        begun = time.perf_counter()
        seen = evaluate(model, x, y, authors_side.THREATS["linf"], device=bench.device, version="quick", cuda_graphs=on)
        seconds.append(time.perf_counter() - begun)
        names.append(list(seen.broken_by))
        record = record or seen.about["fast_paths"]["CUDA graphs"]
    same = names[0] == names[1]
    value = (
        f"graphs {record}; {len(x)} images in {seconds[0]:.1f} s, without {seconds[1]:.1f} s; "
        f"verdicts {'equal' if same else 'NOT equal'}"
    )
    return bench.verdict(value, "on, equal, not slower", record == "on" and same and seconds[0] <= seconds[1])


def compiled_update(bench: Bench) -> Result:
    """What torch.compile is worth: `compile=true` becomes the default where this says so."""
    if not bench.on_gpu:
        raise Skipped("only compiled on a GPU")
    plain, compiled = (statistics.median(bench.step_seconds(bench.recipe(), Site(compile=on))) for on in (False, True))
    return Result(f"a step takes {compiled / plain:.3f} of the time without", "none", None)


def evaluation_race(bench: Bench) -> Result:
    """`standard` beside the authors' code on the same images and device."""
    if importlib.util.find_spec("pyautoattack") is None:
        raise Skipped("pyautoattack is not installed")
    import pyautoattack

    model, x, y, _ = reference(bench.scale.raced)
    peer = pyautoattack.AutoAttack(
        model.to(bench.device), norm="Linf", eps=8 / 255, seed=0, version="standard", device=str(bench.device)
    )
    peer.verbose = False
    x, y = x.to(bench.device), y.to(bench.device)
    theirs = bench.timed(lambda: peer.run_standard_evaluation(x.clone(), y.clone(), batch_size=128))
    ours, quick = (
        bench.timed(
            lambda v=version: evaluate(model, x, y, authors_side.THREATS["linf"], device=bench.device, version=v)
        )
        for version in ("standard", "quick")
    )
    value = f"{len(x)} images: authors {theirs:.1f} s, standard {theirs / ours:.1f}×, quick {theirs / quick:.1f}×"
    return bench.verdict(value, "≥ 10× (standard)", theirs / ours >= 10)


# -- the meter and the forecast ----------------------------------------------------------------------------------------


def metering(bench: Bench) -> Result:
    """NVML's energy counter beside its power, integrated by us, while steps are trained."""
    if not bench.on_gpu:
        raise Skipped("NVML is asked about GPUs")
    handle, why = gpu._nvml_gpu("cuda:0" if bench.device.index is None else str(bench.device))
    if handle is None or handle.joules() is None or handle.watts() is None:
        raise Skipped(why or "NVML tells no energy or no power of this GPU")
    samples, done = [], threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            samples.append((time.perf_counter(), handle.watts() or 0.0))

    trainer = bench.trainer(bench.recipe())
    trainer._train_step()
    thread = threading.Thread(target=sample)
    before = handle.joules() or 0.0
    begun = time.perf_counter()
    thread.start()
    while time.perf_counter() - begun < bench.scale.seconds:
        trainer._train_step()
        textbook_side.synchronise(bench.device)
    counted = (handle.joules() or 0.0) - before
    done.set()
    thread.join()
    pairs = itertools.pairwise(samples)
    integrated = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs)
    gap = integrated / counted - 1
    value = f"counter {counted:.0f} J, integrated {integrated:.0f} J over {bench.scale.seconds:.0f} s: {gap:+.1%}"
    return bench.verdict(value, "within 5%", abs(gap) <= 0.05)


def forecasting(bench: Bench) -> Result:
    """A calibrated forecast of a training beside the training: two epochs of 20 steps, on noise of CIFAR-10's shape."""
    images = bench.scale.epoch * bench.scale.batch
    recipe = bench.recipe(**{"data.name": "cifar10", "epochs": 2, "epoch_images": images})
    plan = forecast(recipe, site_device=str(bench.device), seconds=20.0 if bench.on_gpu else 2.0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = bench.trainer(recipe, folder=Path(folder))
        seconds = bench.timed(lambda: list(trainer))
    gap = plan.train_seconds.likely / seconds - 1
    return bench.verdict(
        f"forecast {plan.train_seconds.likely:.1f} s, took {seconds:.1f} s: {gap:+.0%}", "within 25%", abs(gap) <= 0.25
    )


def memory(bench: Bench) -> Result:
    """The largest batch, in doublings, whose step fits, and the forecast of its memory."""
    if not bench.on_gpu:
        raise Skipped("the memory of a GPU is asked about")
    largest, peak, batch = 0, 0, bench.scale.batch
    flops = of_recipe(bench.recipe(), 10, (3, 32, 32))
    while batch <= 16_384:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        try:
            trainer = bench.trainer(bench.recipe(batch_size=batch), Site(physical_batch=batch))
            trainer._step(*trainer._batches(0), 0)
            largest, peak = batch, torch.cuda.max_memory_allocated(bench.device)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            break
        trainer = None
        batch *= 2
    told = training_bytes(flops.parameters, 4, largest, flops.activation_bytes)
    free = free_bytes(bench.device) or 0
    value = f"batch {largest} with {peak / 1e9:.1f} GB (forecast in float32 {told / 1e9:.1f}); {free / 1e9:.1f} GB free"
    return bench.verdict(value, "at least the batch of the speed lines", largest >= bench.scale.batch)


LINES: dict[str, Callable[[Bench], Result]] = {
    "training on CPU and device": training_agrees,
    "graphs and plain calls": graphs_agree,
    "bits after a resume": resume_agrees,
    "bits over batch sizes": batch_sizes_agree,
    "PGD-10 steps": speed("at"),
    "TRADES-10 steps": speed("trades"),
    "host's share of a step": host_share,
    "evaluation with and without graphs": evaluation_graphs,
    "verdicts beside the authors'": verdicts_agree,
    "energy counter and integral": metering,
    "forecast of a training": forecasting,
    "memory at the largest batch": memory,
    "compiled update": compiled_update,
    "evaluation beside the authors'": evaluation_race,
}


# -- running and writing -----------------------------------------------------------------------------------------------


def commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "no git"


def measure(name: str, bench: Bench) -> Result:
    begun = time.perf_counter()
    try:
        with answering():
            result = LINES[name](bench)
    except Skipped as why:
        return Result(f"not measured: {why}", "", None)
    except ImportError as error:
        return Result(f"not measured: {error}", "", None)
    except Exception as error:  # the other lines are still worth their time
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return Result(f"failed: {type(error).__name__}: {line}", "", False)
    finally:
        gc.collect()  # the memory of a line's trainers and graphs is the next line's
        if bench.on_gpu and torch.cuda.is_initialized():
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
    return Result(result.value, result.bar, result.met, time.perf_counter() - begun)


LOST = "the GPU stopped answering"  # of `answering`: this process gets no answer any more


def finished(result: Result) -> bool:
    """Is it measured? What was skipped or failed is asked again."""
    return not result.value.startswith(("not measured", "failed"))


def block(results: dict[str, Result], about: dict[str, str]) -> str:
    """A dated block for bench/RESULTS.md."""
    mark = {True: "met", False: "**not met**", None: "—"}
    rows = [f"| {name} | {r.value} | {r.bar or '—'} | {mark[r.met]} | {r.seconds:.0f} |" for name, r in results.items()]
    head = f"## {datetime.now(UTC):%Y-%m-%d} · the GPU's lines (`bench/gpu.py`), {about['device']}"
    sizes = f"torch {about['torch']}, size {about['size']}, commit {about['commit']}; n = 1 a line."
    return "\n".join(
        [head, "", sizes, "", "| line | measured | bar | | seconds |", "| --- | --- | --- | --- | --- |", *rows, ""]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=sorted(SCALES), default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-gpu.json")
    parser.add_argument("--only", nargs="+", choices=sorted(LINES), metavar="LINE", help="lines by name")
    parser.add_argument("--minutes", type=float, default=10.0, help="no line is begun after so many")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench/gpu.py needs a GPU that torch sees (or --device cpu --size tiny)", file=sys.stderr)
        return 2
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
    about = {"device": name, "torch": torch.__version__, "size": given.size, "commit": commit()}
    kept = json.loads(given.out.read_text()) if given.out.exists() else {}
    old = kept.get("results", {}) if kept.get("about") == about else {}
    results = {name: Result(**result) for name, result in old.items()}
    begun = time.monotonic()
    left = [line for line in given.only or LINES if line not in results or not finished(results[line])]
    left.sort(key=lambda line: line in results and results[line].met is False)  # what failed before comes last
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for number, line in enumerate(left, 1):
            if time.monotonic() - begun > 60 * given.minutes:
                print(f"{given.minutes:g} minutes are spent: run again for the other lines")
                break
            results[line] = measure(line, Bench(device, SCALES[given.size]))
            print(f"{line}: {results[line].value}  [{results[line].bar}]", flush=True)
            stored = {"about": about, "results": {name: asdict(result) for name, result in results.items()}}
            given.out.write_text(json.dumps(stored, indent=1))
            if LOST in results[line].value and left[number:]:
                spent = (time.monotonic() - begun) / 60
                same = ["--device", given.device, "--size", given.size, "--out", str(given.out)]
                rest = ["--minutes", str(given.minutes - spent), "--only", *left[number:]]
                return subprocess.call([sys.executable, __file__, *same, *rest]) or 1
    text = block({name: results[name] for name in LINES if name in results}, about)
    given.out.with_suffix(".md").write_text(text)
    print(text)
    return int(any(result.met is False for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
