"""Version quick on models of our own and on masked ones: accuracy, interval, passes and time beside `standard`.

    python bench/quick.py train FOLDER          ten small models on CIFAR-10 at 16×16 pixels; resumable
    python bench/quick.py evaluate FOLDER       both versions on the first 500 test images of each; resumable
    python bench/quick.py masked FOLDER         six that hide gradients, or were said to; `standard` on 100 images
    python bench/quick.py coverage FOLDER       200 resampled image sets and audits a model, from the verdicts; seconds

CIFAR-10 is read from ../shared. Seconds are CPU seconds of one thread, of both versions in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from robudget import data
from robudget.evaluation.audit import Audit, audit_more
from robudget.evaluation.confirmation import Part
from robudget.evaluation.evaluator import evaluate
from robudget.evaluation.verdicts import Verdicts
from robudget.execution import Site
from robudget.recipe import Recipe
from robudget.runner import run
from robudget.store import RunFolder
from robudget.threat import Threat
from robudget.training.checkpoint import best_model

CIFAR = Path(__file__).resolve().parents[1] / "../shared/data/cifar10-jpeg"
IMAGES, SIZE = 500, 16
BASE = Recipe.load("cifar10-smoke").with_(
    {"data.image_size": SIZE, "epochs": 12, "validation.every": 12, "evaluation.images": 2, "model.base": 8}
)
RECIPES = {
    "at": {},
    "at-wide": {"model.base": 16},
    "at-narrow": {"model.base": 4},
    "at-deep": {"model.name": "wrn-16-1"},
    "at-4/255": {"threat.eps": "4/255"},
    "at-12/255": {"threat.eps": "12/255"},
    "trades": {"loss": "trades"},
    "mart": {"loss": "mart"},
    "l2": {"threat.norm": "l2", "threat.eps": 0.25},
    "standard": {"loss": "standard"},
}
MASKS = ("quantised", "jpeg", "votes", "probabilities", "random", "squeezed")


def site() -> Site:
    return Site(data_root=str(CIFAR), device="cpu", threads=1)


def threat_of(name: str, recipe: Recipe) -> Threat:
    """Standard training leaves nothing at 8/255, which is no test: 1/255 there."""
    return Threat("linf", 1 / 255) if name == "standard" else recipe.evaluation_threat


def test_images() -> tuple[data.Dataset, Tensor, Tensor]:
    cifar = data.load("cifar10", root=str(CIFAR), image_size=SIZE)
    first = cifar.test.first(IMAGES)
    return cifar, first.unit(), first.labels


def model_of(folder: Path, cifar: data.Dataset, name: str) -> tuple[nn.Module, Recipe]:
    (run_folder,) = (RunFolder(p.parent) for p in (folder / name.replace("/", "-")).glob("*/run.json"))
    return best_model(run_folder.recipe, cifar, run_folder.best).eval(), run_folder.recipe


def train(folder: Path) -> None:
    for name, changes in RECIPES.items():
        print(name, run(BASE.with_(changes), store=folder / name.replace("/", "-"), site=site()).summary, flush=True)


def judged(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, version: str, where: Path, **more: object
) -> Verdicts:
    """The verdicts, from the disk where they are there; CPU seconds go beside them."""
    if not (where / "result.json").exists():
        before = time.process_time()
        verdicts = evaluate(model, x, y, threat, version=version, batch_size=100, state=where / "state", **more)  # type: ignore[arg-type]
        (where / "cpu.json").write_text(json.dumps(time.process_time() - before))
        verdicts.save(where)
    return Verdicts.load(where)


def evaluate_all(folder: Path) -> None:
    cifar, x, y = test_images()
    print("model        clean  standard   quick  audit interval     audited  fell  findings       passes ÷  CPU s ÷")
    for name in RECIPES:
        model, recipe = model_of(folder, cifar, name)
        threat = threat_of(name, recipe)
        where = folder / name.replace("/", "-")
        quick, full = (judged(model, x, y, threat, v, where / v, checks=v == "quick") for v in ("quick", "standard"))
        passes = [v.total.forward + v.total.backward for v in (full, quick)]
        cpu = [json.loads((where / v / "cpu.json").read_text()) for v in ("standard", "quick")]
        low, high = quick.audit_interval or (float("nan"),) * 2
        assert quick.audit is not None
        findings = ",".join(f.name for f in quick.findings if f.name != "few-classes") or "-"
        print(
            f"{name:12} {100 * full.clean_accuracy:5.1f} {100 * full.robust_accuracy:9.2f} "
            f"{100 * quick.robust_accuracy:7.2f}  [{100 * low:5.2f}, {100 * high:5.2f}] {quick.audit.attacked:10d} "
            f"{quick.audit.fell:5d}  {findings:14} {passes[0] / passes[1]:8.1f} {cpu[0] / cpu[1]:8.1f}",
            flush=True,
        )


# -- masked models -----------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A model whose gradients say nothing, or too little, as published defences did."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "quantised":  # inputs in 16 steps
            x = (15 * x).round() / 15
        if self.kind == "jpeg":
            x = rounded_frequencies(x)
        if self.kind == "random":
            x = x + 0.05 * torch.randn_like(x)
        if self.kind == "votes":  # one each of the image, its mirror image and one moved by a pixel
            views = (x, x.flip(3), x.roll(1, 3))
            return sum(nn.functional.one_hot(self.model(v).argmax(1), 10).float() for v in views) + 0 * x.sum()  # type: ignore[return-value]
        z: Tensor = self.model(x)
        if self.kind == "probabilities":  # a softmax that saturates in place of logits
            return (20 * z).softmax(1)
        return z


def rounded_frequencies(x: Tensor, step: float = 0.15) -> Tensor:
    """The cosine transform of every 8×8 block in steps, as JPEG does with one table for all frequencies."""
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)
    basis = torch.where(k == 0, 8**-0.5, 0.5 * (torch.pi * (2 * n + 1) * k / 16).cos())
    blocks = x.unfold(2, 8, 8).unfold(3, 8, 8)
    blocks = basis.T @ (((basis @ blocks @ basis.T) / step).round() * step) @ basis
    return blocks.transpose(3, 4).reshape(x.shape)


def squeezed(folder: Path, cifar: data.Dataset) -> nn.Module:
    """Noise and small logits in place of an adversary (Kannan 2018, Shafahi 2019; broken by Engstrom 2018)."""
    model, _ = model_of(folder, cifar, "standard")
    path = folder / "squeezed.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    x, y = cifar.train.first(12_800).unit(), cifar.train.first(12_800).labels
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
    model.train()
    for _ in range(6):
        for part in torch.randperm(len(x), generator=g).split(128):  # type: ignore[no-untyped-call]
            z = model(x[part] + 0.1 * torch.randn(x[part].shape, generator=g))
            optimizer.zero_grad()
            (nn.functional.cross_entropy(z, y[part]) + 0.5 * z.square().mean()).backward()
            optimizer.step()
    torch.save(model.state_dict(), path)
    return model.eval()


def masked(folder: Path) -> None:
    cifar, x, y = test_images()
    plain, _ = model_of(folder, cifar, "standard")
    threat = Threat("linf", 4 / 255)
    print("mask            short attacks  quick (estimate)  audited  fell  findings; standard on the first 100 images")
    for kind in MASKS:
        model = squeezed(folder, cifar) if kind == "squeezed" else Masked(plain, kind).eval()
        quick = judged(model, x, y, threat, "quick", folder / "masked" / kind / "quick")
        full = judged(model, x[:100], y[:100], threat, "standard", folder / "masked" / kind / "standard", checks=False)
        assert quick.audit is not None
        short = quick.audit.survivors / len(x)
        print(
            f"{kind:15} {100 * short:13.1f} {100 * quick.robust_accuracy:17.1f} {quick.audit.attacked:8d} "
            f"{quick.audit.fell:5d}  {','.join(f.name for f in quick.findings)}; {100 * full.robust_accuracy:.0f}",
            flush=True,
        )


# -- coverage ----------------------------------------------------------------------------------------------------------


def coverage(folder: Path, sets: int = 200, size: int = 300) -> None:
    """Sets of 300 of the 500 images, each with a sample of its own, audited by the verdicts of `standard`."""
    rng = np.random.default_rng(0)
    print(f"{sets} sets of {size} images a model, and all together")
    totals = []
    for name in RECIPES:
        where = folder / name.replace("/", "-")
        quick, full = (Verdicts.load(where / version) for version in ("quick", "standard"))
        # Only what the short attacks left was audited.
        short = quick.robust | quick.frame["audited"].to_numpy()
        covered, off, audited = [], [], []
        for _ in range(sets):
            rows = rng.choice(len(short), size, replace=False)
            left = rng.permutation(rows[short[rows]])
            falls = ~full.robust[left]
            blocks: list[int] = []
            fell: list[int] = []
            while more := audit_more(len(left), size, blocks, fell, None):
                first = sum(blocks)
                if first == len(left):
                    break
                blocks.append(min(more, len(left) - first))
                fell.append(int(falls[first : first + blocks[-1]].sum()))
            audit = Audit((Part(len(left), sum(blocks), sum(fell), max(len(blocks) - 1, 0)),))
            low, high = audit.robust()
            truth = int((~falls).sum())
            covered.append(low <= truth <= high)
            off.append(100 * abs(audit.estimate - truth) / size)
            audited.append(sum(blocks))
        totals.append((np.mean(covered), np.mean(np.array(off) <= 0.5)))
        print(
            f"{name:12} missed by the short attacks {int((short & ~full.robust).sum()):3d} of {int(short.sum())}, "
            f"covered {100 * np.mean(covered):5.1f}%, within 0.5 points {100 * np.mean(np.array(off) <= 0.5):5.1f}%, "
            f"largest difference {max(off):.2f} points, audited {np.mean(audited):.1f}"
        )
    print("all: covered {:.1f}%, within 0.5 points {:.1f}%".format(*(100 * np.mean(totals, axis=0))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "evaluate", "masked", "coverage"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"train": train, "evaluate": evaluate_all, "masked": masked, "coverage": coverage}[args.what](args.folder)


if __name__ == "__main__":
    main()
