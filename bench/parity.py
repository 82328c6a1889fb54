"""Does our loop train as well as the textbook's: robust accuracy after a few epochs of CIFAR-10, seed by seed.

python bench/parity.py --root=<CIFAR-10> [--method at] [--seeds 5] [--most 1]: both loops get the same recipe, split,
learning rates and budget; what differs is ours (bfloat16 where it is faster, the folded crafting model, batches made on
the device) against eager float32, written out here from the authors' code. Each training is a line of `--results`; run
it again to go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robudget import data
from robudget.data.dataset import Dataset, Split
from robudget.data.stream import prepare
from robudget.recipe import Recipe
from robudget.training import Trainer
from robudget.training.optimisation import lr_at
from training import EPS, Textbook

METHODS: dict[str, dict[str, Any]] = {
    "at": {"craft.steps": 2},
    "grad-align": {"craft.steps": 1, "craft.start": "none", "craft.step_size": EPS, "craft.grad_align": 0.2},
    "ikl": {"loss": "ikl", "beta": 20, "craft.steps": 2, "craft.start": "gaussian"},
    "grad-norm": {"loss": "grad-norm", "beta": 1, "model.activation": "silu"},
}


class Plain(Textbook):
    """The textbook loop with the update of another method."""

    def __init__(self, method: str, recipe: Recipe, dataset: Dataset, train: Split, device: torch.device) -> None:
        super().__init__(recipe, dataset, train, device)
        self.method, self.steps_done = method, 0
        self.per_epoch = (recipe.epoch_images or len(train)) // recipe.batch_size
        self.weights = torch.full((10, 10), 0.1, device=device)
        self.sums = torch.zeros(10, 10, device=device)

    def step(self, lr: float = 0.01) -> None:
        if self.method == "at":
            super().step(lr)
            return
        x, y = (t.to(self.device) for t in next(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = {"grad-align": self.aligned, "ikl": self.ikl, "grad-norm": self.gradient_norm}[self.method](x, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps_done += 1
        if self.method == "ikl" and self.steps_done % self.per_epoch == 0:
            self.weights = self.sums / self.sums.sum(1, keepdim=True)
            self.sums = torch.zeros_like(self.sums)

    def slope(self, x: Tensor, y: Tensor, *, again: bool = True) -> Tensor:
        leaf = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(self.model(leaf), y), leaf, create_graph=again)
        return gradient

    def aligned(self, x: Tensor, y: Tensor) -> Tensor:
        """FGSM from the image itself, and 1 − cos of the gradients there and at a random point of the ball, all in
        training mode, where every forward pass moves BatchNorm's running statistics (the authors' train.py)."""
        self.model.train()
        first = self.slope(x, y)
        second = self.slope(x + torch.empty_like(x).uniform_(-EPS, EPS), y)
        x_adv = (x + EPS * first.detach().sign()).clamp(0, 1)
        cosine = F.cosine_similarity(first.flatten(1), second.flatten(1)).mean()
        return F.cross_entropy(self.model(x_adv), y) + 0.2 * (1 - cosine)

    def ikl(self, x: Tensor, y: Tensor) -> Tensor:
        """The authors' dkl_loss pair by pair of classes, alpha = 4, beta = 20, T = 4."""
        self.model.eval()
        clean, size = self.model(x).detach(), self.recipe.craft.step_size_for(EPS)
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(self.recipe.craft.steps):
            x_adv.requires_grad_(True)
            soft = -(clean.softmax(1) * self.model(x_adv).log_softmax(1)).sum(1).mean()
            (gradient,) = torch.autograd.grad(soft, x_adv)
            x_adv = (x_adv.detach() + size * gradient.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
        self.model.train()
        attacked, logits = self.model(x_adv), self.model(x)
        one_hot = F.one_hot(y, 10).float()
        self.sums += one_hot.T @ (logits.detach() / 4).softmax(1)
        sample = one_hot @ self.weights
        pairs = sample[:, :, None] @ sample[:, None]
        gap = (logits[:, :, None] - logits[:, None]) - (attacked[:, :, None] - attacked[:, None])
        squares = 0.25 * (gap.square() * pairs).sum() / pairs.sum()
        soft = -(logits.softmax(1).detach() * attacked.log_softmax(1)).sum(1).mean()
        return F.cross_entropy(logits, y) + 20 * squares + 4 * soft

    def gradient_norm(self, x: Tensor, y: Tensor) -> Tensor:
        """Double backpropagation: CE + ε·‖∇ₓ CE‖₁ of each image, the mean over the batch."""
        self.model.train()
        leaf = x.clone().requires_grad_(True)
        each = F.cross_entropy(self.model(leaf), y, reduction="none")
        (gradient,) = torch.autograd.grad(each.sum(), leaf, create_graph=True)
        return each.mean() + EPS * gradient.flatten(1).abs().sum(1).mean()


def parity(arguments: argparse.Namespace, device: torch.device) -> None:
    """Both loops on the same recipe, seed by seed; a line of results each, and what is there is not done again."""
    model, base, images, epochs = arguments.model, arguments.base, arguments.images, arguments.epochs
    results, most, seeds, method = arguments.results, arguments.most, arguments.seeds, arguments.method
    dataset = data.load("cifar10", root=arguments.root)
    test = dataset.test.first(1000)
    for seed, name in itertools.product(range(seeds), ("ours", "textbook")):
        recipe = Recipe().with_(
            {
                "seed": seed,
                "model.name": model,
                "model.base": base,
                "epochs": epochs,
                "epoch_images": images,
                "batch_size": 128,
                "optim.lr": 0.1,
                "optim.lr_batch": None,
                "optim.decay_norm": True,
                "optim.warmup_epochs": 0.5,
                "validation.images": 10,
                "validation.every": epochs,
                "validation.steps": 1,
                "collapse.action": "off",
                **METHODS[method],
            }
        )
        about = {"id": recipe.id, "method": method, "seed": seed, "loop": name, "n": len(test)}
        about["threads"] = torch.get_num_threads()
        if most == 0 or _found(results, about):
            continue
        most -= 1
        begun, spent = time.perf_counter(), time.process_time()
        if name == "ours":
            trainer = Trainer(recipe, dataset, device=device)
            for _ in trainer:
                pass
            trained, precision = trainer.model, trainer.precision.name
        else:
            torch.manual_seed(seed)
            textbook = Plain(method, recipe, dataset, prepare(recipe, dataset).train, device)
            per_epoch = images // recipe.batch_size
            steps = epochs * per_epoch
            for step in range(steps):
                textbook.step(lr=lr_at(recipe.optim, recipe.optim.lr, step, steps=steps, steps_per_epoch=per_epoch))
            trained, precision = textbook.model, "float32"
        seconds, cpu = time.perf_counter() - begun, time.process_time() - spent
        clean, robust = judged(trained, test, device)
        line = about | {"clean": clean, "robust": robust, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
        line["precision"] = precision
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)
    lines = [line for line in _lines(results) if line.get("method", "at") == method]
    recipes = {line["id"]: line["seed"] for line in lines}
    print(
        f"{model} base {base}, {method}, {epochs} epochs of {images} images; PGD-40 on {len(test)} test images, float32"
    )
    for column in ("clean", "robust", "seconds", "cpu_seconds"):
        scale = 1 if column.endswith("seconds") else 100
        by = {
            loop: {line["seed"]: scale * line[column] for line in lines if line["loop"] == loop and column in line}
            for loop in ("ours", "textbook")
        }
        both = sorted(by["ours"].keys() & by["textbook"].keys())
        if len(both) < 2:
            continue
        ours, theirs = (np.array([by[loop][seed] for seed in both]) for loop in ("ours", "textbook"))
        gap = ours - theirs
        print(
            f"  {column}: ours {ours.mean():.2f} ± {ours.std(ddof=1):.2f}, textbook {theirs.mean():.2f} ± "
            f"{theirs.std(ddof=1):.2f} (n = {len(both)} seeds of {len(recipes)}); difference {gap.mean():+.2f} ± "
            f"{gap.std(ddof=1) / len(gap) ** 0.5:.2f} (standard error)"
        )


def _lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _found(results: Path, about: dict[str, Any]) -> bool:
    return any(all(line.get(key) == value for key, value in about.items()) for line in _lines(results))


def judged(model: nn.Module, test: Split, device: torch.device) -> tuple[float, float]:
    """Clean accuracy and accuracy under a plain float32 PGD-40, the same for both."""
    model = model.to(memory_format=torch.contiguous_format).eval()
    clean = robust = 0
    generator = torch.Generator().manual_seed(0)
    for first in range(0, len(test), 250):
        part = test[first : first + 250]
        x, y = part.unit().to(device), part.labels.to(device)
        noise = torch.rand(x.shape, generator=generator).to(device)
        x_adv = (x + EPS * (2 * noise - 1)).clamp(0, 1)
        for _ in range(40):
            x_adv.requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
            x_adv = (x_adv.detach() + EPS / 16 * gradient.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
        with torch.no_grad():
            right = model(x).argmax(1) == y
            clean += int(right.sum())
            robust += int((right & (model(x_adv).argmax(1) == y)).sum())
    return clean / len(test), robust / len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="CIFAR-10")
    parser.add_argument("--method", choices=METHODS, default="at")
    parser.add_argument("--model", default="wrn-10-1")
    parser.add_argument("--base", type=int, default=16)
    parser.add_argument("--images", type=int, default=10_240, help="an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("parity.jsonl"), help="kept, and gone on from")
    parser.add_argument("--most", type=int, default=-1, help="trainings in this call, -1 = all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    parity(arguments, torch.device(arguments.device))


if __name__ == "__main__":
    main()
