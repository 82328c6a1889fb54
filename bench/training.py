"""Training against the textbook loop and against the machine: python bench/training.py speed|growth [options]

speed   images/s of PGD-10 and TRADES-10 steps, ours and textbook in turn, with the step's time broken down, and
        crafting's FLOP/s as a share of the bf16 matrix peak measured between the steps.
growth  time per image and resident memory with 1,000 to 1,000,000 generated images in a memory-mapped npz.

On a machine that others use too, `--threads 1 --clock cpu` counts the process's own CPU time instead of the wall's.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.flop_counter import FlopCounterMode

from robudget.data.dataset import Dataset, Split
from robudget.data.stream import prepare
from robudget.execution import Site
from robudget.models import build_for
from robudget.recipe import Recipe
from robudget.training import Trainer

Clock = Callable[[], float]
EPS, STEPS, STEP_SIZE = 8 / 255, 10, 1.5 * 8 / 255 / 10


# -- the textbook loop: eager, float32, contiguous, images augmented one by one by a data loader on the CPU ----------


class OneByOne(TorchDataset[tuple[Tensor, int]]):
    """Crop and flip per image, as a transform pipeline does."""

    def __init__(self, split: Split) -> None:
        self._images, self._labels = split.images.numpy(), split.labels.tolist()
        self._random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        size = self._images.shape[-1]
        padded = np.pad(self._images[row], ((0, 0), (4, 4), (4, 4)))
        top, left = self._random.integers(0, 9, size=2)
        image = padded[:, top : top + size, left : left + size]
        if self._random.random() < 0.5:
            image = image[:, :, ::-1]
        return torch.from_numpy(image.copy()).float() / 255, self._labels[row]


class Textbook:
    def __init__(self, recipe: Recipe, dataset: Dataset, train: Split, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.model = build_for(recipe, dataset).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        workers = 4 if device.type == "cuda" else 0
        loader = DataLoader(
            OneByOne(train), batch_size=recipe.batch_size, shuffle=True, drop_last=True, num_workers=workers
        )
        self.batches: Iterator[list[Tensor]] = itertools.chain.from_iterable(itertools.repeat(loader))

    def step(self, lr: float = 0.01) -> None:
        x, y = (t.to(self.device) for t in next(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.eval()
        x_adv = self.attack(x, y)
        self.model.train()
        self.optimizer.zero_grad()
        if self.recipe.loss == "trades":
            logits, logits_adv = self.model(x), self.model(x_adv)
            divergence = F.kl_div(F.log_softmax(logits_adv, 1), F.softmax(logits, 1), reduction="batchmean")
            loss = F.cross_entropy(logits, y) + self.recipe.beta * divergence
        else:
            loss = F.cross_entropy(self.model(x_adv), y)
        loss.backward()
        self.optimizer.step()

    def attack(self, x: Tensor, y: Tensor) -> Tensor:
        eps, steps = self.recipe.threat.eps, self.recipe.craft.steps
        size = self.recipe.craft.step_size_for(eps)
        clean = F.softmax(self.model(x).detach(), 1) if self.recipe.loss == "trades" else x
        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            x_adv.requires_grad_(True)
            logits = self.model(x_adv)
            if self.recipe.loss == "trades":
                loss = F.kl_div(F.log_softmax(logits, 1), clean, reduction="sum")
            else:
                loss = F.cross_entropy(logits, y)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + size * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
        return x_adv.detach()


def serve(orders: Connection, recipe_yaml: str, batch: int, device: str, threads: int, cpu_clock: bool) -> None:
    """The textbook loop in a process of its own, which knows nothing of our allocator settings: one time per order."""
    torch.set_num_threads(threads)
    recipe, dataset = Recipe.from_yaml(recipe_yaml), random_images(max(2048, 2 * batch))
    textbook = Textbook(recipe, dataset, prepare(recipe, dataset).train, torch.device(device))
    textbook.step()
    orders.send(None)
    while orders.recv():
        orders.send(timed(textbook.step, textbook.device, time.process_time if cpu_clock else time.perf_counter))


# -- speed -----------------------------------------------------------------------------------------------------------


def random_images(n: int, size: int = 32) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(count) % 10)

    return Dataset("noise", split(n), split(100), tuple("0123456789"), "noise")


def forward_flops(model: nn.Module) -> int:
    device = next(model.parameters()).device
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.rand(1, 3, 32, 32, device=device))
    model.train(training)
    return int(counter.get_total_flops())


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device, clock: Clock, size: int = 2048) -> float:
    """bf16 matrix products per second, in FLOP/s, the best of a few."""
    if device.type == "cuda":
        size = 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    best = 0.0
    for _ in range(6):
        synchronise(device)
        begun = clock()
        for _ in range(4):
            a @ b
        synchronise(device)
        best = max(best, 4 * 2 * size**3 / (clock() - begun))
    return best


def timed(step: Callable[[], object], device: torch.device, clock: Clock) -> float:
    synchronise(device)
    begun = clock()
    step()
    synchronise(device)
    return clock() - begun


def speed(models: list[str], losses: list[str], batch: int, rounds: int, device: torch.device, clock: Clock) -> None:
    dataset, context = random_images(max(2048, 2 * batch)), multiprocessing.get_context("spawn")
    for name, loss in itertools.product(models, losses):
        recipe = Recipe().with_(
            {
                "model.name": name,
                "loss": loss,
                "craft.steps": STEPS,
                "batch_size": batch,
                "ema.decay": 0.995,
                "validation.images": 10,
            }
        )
        trainer = Trainer(recipe, dataset, device=device)
        trainer.model.train()
        flops = forward_flops(trainer.model)
        trainer._train_step()
        textbook, other_end = context.Pipe()
        cpu_clock = clock is time.process_time
        order = (other_end, recipe.to_yaml(), batch, str(device), torch.get_num_threads(), cpu_clock)
        process = context.Process(target=serve, args=order, daemon=True)
        process.start()
        textbook.recv()
        trainer._watch.clear()
        ours, theirs, peaks = [], [], []
        for _ in range(rounds):  # in turn, so that a slow minute of the machine hits both
            peaks.append(peak(device, clock))
            trainer._watch.start()
            ours += [timed(trainer._train_step, device, clock) for _ in range(3)]
            peaks.append(peak(device, clock))
            textbook.send(True)
            theirs.append(textbook.recv())
        textbook.send(False)
        process.join()
        parts = trainer._watch.read()
        whole = sum(parts.values())
        craft_passes = 2 * STEPS + (1 if loss == "trades" else 0)
        matrix, threads = statistics.median(peaks), torch.get_num_threads()
        print(f"{name} {loss}-{STEPS}, batch {batch}, {trainer.precision.name}, {device}, {threads} threads")
        mine, other = batch / statistics.median(ours), batch / statistics.median(theirs)
        print(
            f"  images/s: ours {mine:.1f} ({spread(ours, batch)}), textbook {other:.1f} ({spread(theirs, batch)}): "
            f"{mine / other:.2f} times, {min(theirs) / min(ours):.2f} by the best steps of each "
            f"(n = {len(ours)} and {len(theirs)})"
        )
        crafting = craft_passes * flops * batch * len(ours) / (parts["craft"] * sum(ours) / whole)
        training = (craft_passes + 3 * (2 if loss == "trades" else 1)) * flops * batch / statistics.median(ours)
        print(
            f"  bf16 matrix peak {matrix / 1e9:.0f} GFLOP/s ({min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}); "
            f"crafting at {100 * crafting / matrix:.1f}%, the whole step at {100 * training / matrix:.1f}%"
        )
        shares = ", ".join(f"{part} {100 * seconds / whole:.2f}%" for part, seconds in parts.items() if seconds)
        outside = 100 * (whole - parts["craft"] - parts["update"]) / whole
        print(f"  of a step: {shares}; outside craft and update {outside:.2f}%", flush=True)


def spread(seconds: list[float], batch: int) -> str:
    return f"{batch / max(seconds):.1f} to {batch / min(seconds):.1f}"


# -- growth ----------------------------------------------------------------------------------------------------------


def resident() -> tuple[float, float]:
    """(all resident memory, that of it which is not mapped files) of this process in MiB (Linux)."""
    pages = dict(
        line.split(":")
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(("VmRSS", "RssAnon"))
    )
    return tuple(int(pages[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def write_npz(path: Path, n: int) -> None:
    """A million images are 3 GB: written in place, never held."""
    block = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8)
    images = np.lib.format.open_memmap(path.with_suffix(".image.npy"), mode="w+", dtype=np.uint8, shape=(n, 32, 32, 3))
    for first in range(0, n, 1000):
        images[first : first + 1000] = block
    images.flush()
    del images
    np.save(path.with_suffix(".label.npy"), np.arange(n) % 10)
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in ("image", "label"):
            archive.write(path.with_suffix(f".{name}.npy"), f"{name}.npy")
            path.with_suffix(f".{name}.npy").unlink()


def growth(sizes: list[int], steps: int, device: torch.device, clock: Clock) -> None:
    dataset = random_images(2000)
    print(f"wrn-10-1 base 4, PGD-1, 70% of every batch of 256 generated, {steps} steps, {device}")
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "generated.npz"
            write_npz(path, n)
            recipe = Recipe().with_(
                {
                    "model.name": "wrn-10-1",
                    "model.base": 4,
                    "craft.steps": 1,
                    "batch_size": 256,
                    "synthetic.source": "file",
                    "validation.images": 10,
                }
            )
            before = resident()
            begun = clock()
            trainer = Trainer(recipe, dataset, Site(synthetic_root=str(path)), device=device)
            opened = clock() - begun
            trainer.model.train()
            for _ in range(3):
                trainer._train_step()
            times = [timed(trainer._train_step, device, clock) / recipe.batch_size for _ in range(steps)]
            after = resident()
            print(
                f"  {n:9,} images ({path.stat().st_size / 2**20:6.0f} MiB): opened in {opened:.2f} s, "
                f"{1e6 * statistics.median(times):.1f} µs an image (quartiles "
                f"{1e6 * np.quantile(times, 0.25):.1f} to {1e6 * np.quantile(times, 0.75):.1f}); "
                f"memory +{after[1] - before[1]:.0f} MiB, with mapped file pages +{after[0] - before[0]:.0f} MiB",
                flush=True,
            )
            del trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "growth"])
    parser.add_argument("--models", nargs="+", default=["wrn-16-2", "wrn-16-4"])
    parser.add_argument("--losses", nargs="+", default=["at", "trades"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    if arguments.what == "speed":
        speed(arguments.models, arguments.losses, arguments.batch, arguments.rounds, device, clock)
    else:
        growth(arguments.sizes, arguments.steps, device, clock)


if __name__ == "__main__":
    main()
