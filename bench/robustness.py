"""Evaluations beyond one threat beside the libraries of their authors, and the memory of ImageNet's size.

    python bench/robustness.py corruptions --images 100    the reference model, by the library's own loop and ours
    python bench/robustness.py memory                      peak memory at 224 pixels and 1,000 classes
    python bench/robustness.py sparse --images 64          MeanSparse around the reference model, with and without BPDA

`corruptions` and `sparse` use the reference model and images in ../shared; `corruptions` the extra of that name.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from robudget.data.corruptions import KINDS, computed
from robudget.data.dataset import Split
from robudget.evaluation.corruptions import SEVERITIES, corruptions
from robudget.evaluation.evaluator import Evaluator, evaluate
from robudget.evaluation.specification import Specification
from robudget.threat import Threat

# Kinds without anything random in them: the same images, so the same answers.
CERTAIN = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


def _evaluation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_evaluation", Path(__file__).with_name("evaluation.py"))
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench
    spec.loader.exec_module(bench)
    return bench


def by_library(args: argparse.Namespace) -> None:
    """Each kind's mean over severities; the library's loop draws from numpy's global generator, seeded once."""
    import imagecorruptions

    bench = _evaluation()
    model, (x, y) = bench.reference_model(), bench.reference_images(0, args.images)
    split = Split((255 * x).round().to(torch.uint8), y)
    found = corruptions(model, split.images, y, computed(split, KINDS).images, KINDS)
    np.random.seed(0)
    means = []
    for kind in KINDS:
        right = []
        for severity in SEVERITIES:
            pictures = [image.permute(1, 2, 0).contiguous().numpy() for image in split.images]
            theirs = [imagecorruptions.corrupt(p, corruption_name=kind, severity=severity) for p in pictures]
            corrupted = torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                right.append((model(corrupted).argmax(1) == y).numpy())
        ours = np.stack([found.frame[f"{kind}-{severity}"].to_numpy(dtype=bool) for severity in SEVERITIES])
        means.append((ours.mean(), np.mean(right)))
        same = (ours == np.stack(right)).mean()
        print(
            f"{kind:18} ours {100 * ours.mean():5.1f}%, library {100 * np.mean(right):5.1f}%, "
            f"same answer {100 * same:5.1f}%" + (" (nothing random)" if kind in CERTAIN else ""),
            flush=True,
        )
    ours_mean, library_mean = np.mean(means, axis=0)
    low, high = found.mean_interval
    print(
        f"mean of 75: ours {100 * ours_mean:.2f}% [{100 * low:.1f}, {100 * high:.1f}], "
        f"library {100 * library_mean:.2f}%"
    )


class MeanSparse(nn.Module):
    """Features within `alpha` standard deviations of their channel's mean become the mean (arXiv 2406.05927); those
    of a batch normalisation have mean β and deviation |γ|. `straight`: gradients pass as if it changed nothing."""

    def __init__(self, norm: nn.BatchNorm2d, alpha: float, *, straight: bool) -> None:
        super().__init__()
        self.norm, self.alpha, self.straight = norm, alpha, straight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        mean, radius = (v.view(1, -1, 1, 1) for v in (self.norm.bias, self.alpha * self.norm.weight.abs()))
        sparse = torch.where((h - mean).abs() <= radius, mean, h)
        return h + (sparse - h).detach() if self.straight else sparse


def sparse(args: argparse.Namespace) -> None:
    """The standard ensemble on the reference model with MeanSparse, with its own gradients and through a surrogate."""
    bench = _evaluation()
    x, y = bench.reference_images(0, args.images)

    def model(alpha: float, *, straight: bool) -> nn.Module:
        whole = bench.reference_model()
        for module in list(whole.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, MeanSparse(child, alpha, straight=straight))
        return whole.eval()

    for alpha in (0.0, 0.1, 0.2):
        given = model(alpha, straight=False)
        own, through = (
            evaluate(given, x, y, Threat("linf", 8 / 255), precision="float32", batch_size=64, backward=backward)
            for backward in ("own", model(alpha, straight=True))
        )
        print(
            f"alpha {alpha}: clean {int(own.clean.sum())} of {len(x)}, own gradients {int(own.robust.sum())} stand, "
            f"through a surrogate {int(through.robust.sum())}; both ways {int((own.robust & through.robust).sum())}; "
            f"findings {[f.name for f in own.findings]}, {[f.name for f in through.findings]}",
            flush=True,
        )


def memory(args: argparse.Namespace) -> None:
    """Each number of images in its own process."""
    for n in (50, 200, 800):
        subprocess.run([sys.executable, __file__, "one", "--images", str(n)], check=True)


def one(args: argparse.Namespace) -> None:
    """The whole path of an evaluation with targets, of few steps: APGD-T to 9 of 1,000 classes."""
    torch.manual_seed(0)
    x = torch.randint(256, (args.images, 3, 224, 224), dtype=torch.uint8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 1000)
    )
    with torch.no_grad():
        y = torch.cat([model(part.float() / 255).argmax(1) for part in x.split(50)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asked = Specification(Threat("linf", 1e-5), attacks=["apgd-t:steps=2"], batch_size=50, checks=False)
    Evaluator(model.eval(), asked).run(x, y)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{args.images:4d} images ({x.numel() / 2**20:.0f} MiB as uint8): peak memory +{grown:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["corruptions", "memory", "one", "sparse"])
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(2)
    {"corruptions": by_library, "memory": memory, "one": one, "sparse": sparse}[args.what](args)


if __name__ == "__main__":
    main()
