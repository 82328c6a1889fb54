"""How good the generator of `synthetic.source: mixture` is: a classifier's accuracy on its images, a Fréchet distance.

    python bench/synthetic.py JUDGE [--amounts 1600 6400] [--components 12 24 48 96]

JUDGE is best.safetensors of a run on CIFAR-10 (a standard training), whose last features (before its linear layer)
are the distance's: |μ − μ'|² + tr(Σ + Σ' − 2 (ΣΣ')^½) to the test images (Heusel et al. 2017, in other features: the
numbers compare generators with each other and with real images, not with a published FID). `real` is the same of as
many training images, most of which the judge was trained on. CIFAR-10 is read from ../shared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm

from robudget import data
from robudget.data import synthetic
from robudget.data.dataset import Split
from robudget.evaluation.load import load_classifier
from robudget.tables.usable import Floats

CIFAR = Path(__file__).resolve().parents[1] / "../shared/data/cifar10-jpeg"
IMAGES = 2000  # of each side of a distance


def judged(model: torch.nn.Module, images: Split) -> tuple[Floats, float]:
    """Features (n, d) and the model's accuracy in percent."""
    seen: list[torch.Tensor] = []
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    right = 0
    with torch.no_grad():
        for first in range(0, len(images), 500):
            part = images[first : first + 500]
            right += int((model(part.unit()).argmax(1) == part.labels).sum())
    hook.remove()
    return torch.cat(seen).numpy(), 100 * right / len(images)


def frechet(a: Floats, b: Floats) -> float:
    """Between Gaussians fitted to features (n, d)."""
    one, two = np.cov(a.T), np.cov(b.T)
    cross = np.trace(sqrtm(one @ two).real)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one) + np.trace(two) - 2 * cross)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judge", type=Path)
    parser.add_argument("--data", type=Path, default=CIFAR)
    parser.add_argument("--amounts", type=int, nargs="+", default=[1600, 6400])
    parser.add_argument("--components", type=int, nargs="+", default=[12, 24, 48, 96])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load("cifar10", root=asked.data)
    model = load_classifier(str(asked.judge), dataset)
    test, accuracy = judged(model, dataset.test.first(IMAGES))
    print(f"test: accuracy {accuracy:.1f}%")
    real, accuracy = judged(model, dataset.train[-IMAGES:])
    print(f"real: accuracy {accuracy:.1f}%, distance {frechet(real, test):.2f}", flush=True)
    for amount in asked.amounts:
        for components in asked.components:
            synthetic._COMPONENTS, start = components, time.process_time()
            images = synthetic.mixture(dataset.train.first(amount), dataset.classes, IMAGES)
            seconds = time.process_time() - start
            features, accuracy = judged(model, images)
            print(
                f"{amount} images, {components} components: accuracy {accuracy:.1f}%, "
                f"distance {frechet(features, test):.2f}; {seconds:.0f} CPU s",
                flush=True,
            )


if __name__ == "__main__":
    main()
