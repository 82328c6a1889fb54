"""Is a training going well: accuracy under PGD on images that it does not see, collapse, and a diverging loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from robudget.accuracy import collapsed
from robudget.attacks.victim import Model
from robudget.backend.batch_size import Physical
from robudget.backend.precision import Autocast, Precision
from robudget.data.dataset import to_unit
from robudget.data.keyed import generator_for
from robudget.errors import RunFailed
from robudget.recipe import Recipe
from robudget.recipe.parts import CollapsePart
from robudget.training.craft import Adversary, craft, cross_entropy
from robudget.training.craft_mode import CraftMode
from robudget.training.distributed import World


@dataclass(frozen=True)
class Validation:
    """Fractions over `images` images; an image is robust if it is classified correctly before and after PGD."""

    clean: float
    robust: float
    images: int


@dataclass(frozen=True)
class Validator:
    """PGD on fixed uint8 `images` (N, C, H, W), shared among the processes of `world` by whole batches.

    The noise depends on `seed` and the batch alone, so that epochs are comparable. Passes are added to `calls`, each
    process its own.
    """

    images: Tensor
    labels: Tensor
    seed: int
    batch_size: int
    precision: Precision
    world: World
    calls: Counter[str]
    modes: dict[nn.Module, CraftMode] = field(default_factory=dict)  # of each model, made once
    physical: Physical = field(default_factory=Physical)

    def first(self, n: int) -> Validator:
        return replace(self, images=self.images[:n], labels=self.labels[:n])

    def __call__(self, model: nn.Module, adversary: Adversary) -> Validation:
        """Accuracies of `model`, used in eval mode and left as it was. Wrong images are not attacked."""
        counts = torch.zeros(2, dtype=torch.int64)
        if model not in self.modes:
            self.modes[model] = CraftMode(model, self.precision)
        with self.modes[model](self._arranged(to_unit(self.images[:2]))) as victim:
            for index, first in enumerate(range(0, len(self.labels), self.batch_size)):
                if index % self.world.size == self.world.rank:
                    counts += torch.tensor(self._batch(*victim, adversary, index, first))
        clean, robust = self.world.total(counts.to(self.images.device)).tolist()
        return Validation(clean / len(self.labels), robust / len(self.labels), len(self.labels))

    def _batch(
        self, victim: Model, autocast: Autocast, adversary: Adversary, index: int, first: int
    ) -> tuple[int, int]:
        x = self._arranged(to_unit(self.images[first : first + self.batch_size]))
        y = self.labels[first : first + self.batch_size]
        with torch.no_grad(), autocast():
            right = victim(x).argmax(1) == y
        self.calls["validation_forward"] += len(y)
        x, y = self._arranged(x[right]), y[right]
        if len(y) == 0:
            return 0, 0
        generator = generator_for(x.device, self.seed, "validation", index)
        x_adv = craft(
            victim, x, cross_entropy(y), adversary, generator=generator, autocast=autocast, physical=self.physical
        )
        with torch.no_grad(), autocast():
            robust = int((victim(x_adv).argmax(1) == y).sum())
        self.calls["validation_forward"] += (adversary.steps + 1) * len(y)
        self.calls["validation_backward"] += adversary.steps * len(y)
        return len(y), robust

    def _arranged(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.precision.memory_format)


def validation_adversary(recipe: Recipe) -> Adversary:
    """The recipe's validation attack."""
    threat, part = recipe.threat.threat(), recipe.validation
    return Adversary(threat, part.steps, part.step_size_for(threat.eps))


@dataclass(frozen=True)
class CollapseCheck:
    """Robust accuracies of the raw weights under one large step and under several small ones, as fractions."""

    one_step: float
    multi_step: float
    collapsed: bool


def check_collapse(model: nn.Module, validator: Validator, recipe: Recipe, before: float) -> CollapseCheck:
    """Catastrophic overfitting (Wong et al. 2020): robust to the single step of FGSM, not to PGD, and it was before.

    `before`: the best multi-step accuracy of earlier epochs (0 in the first).
    """
    threat, part = recipe.threat.threat(), recipe.collapse
    few = validator.first(part.images)
    one = few(model, Adversary(threat, 1, threat.eps, start="none"))
    multi = few(model, Adversary(threat, part.steps, 2.5 * threat.eps / part.steps))
    return CollapseCheck(one.robust, multi.robust, is_collapsed(one.robust, multi.robust, multi.clean, before, part))


def is_collapsed(one_step: float, multi_step: float, clean: float, before: float, part: CollapsePart) -> bool:
    """A gap above `part.gap`, a collapsed multi-step accuracy (`robudget.accuracy`), and a fall to less than half of
    what it was, by at least half of `part.gap`.

    A model that has learnt little yet is no better against many steps either; only the fall tells it from a collapsed
    one, and a fall from nearly nothing is noise.
    """
    fallen = multi_step < 0.5 * before and before - multi_step > part.gap / 2
    return one_step - multi_step > part.gap and collapsed(multi_step, clean) and fallen


# -- divergence of the loss ------------------------------------------------------------------------------------------

EXPLODED = 1e4  # a mean loss that large means logits beyond any use
_RECENT = 20  # updates before the bad one that tell how it came
_GROWN = 2.0  # a loss that many times its lowest had been growing


def check_losses(losses: Sequence[float], *, first: int, steps: int, lr: float, epoch: int, precision: str) -> None:
    """Raise RunFailed at the first loss that is not finite or has exploded: the step, the last good checkpoint (that of
    `epoch`, 0 = none), the likely cause and what to try.

    `losses` are those of this epoch so far (0 for updates still to come), `first` the number of its first step.
    """
    for index, loss in enumerate(losses):
        if not abs(loss) < EXPLODED:
            last = f"the last good checkpoint is of epoch {epoch}" if epoch else "there is no checkpoint yet"
            cause = likely_cause(losses[:index], start=first + index == 0, precision=precision)
            raise RunFailed(f"the loss is {loss:g} at step {first + index} of {steps} (lr {lr:.3g}); {last}; {cause}")


def likely_cause(before: Sequence[float], *, start: bool, precision: str) -> str:
    """From the losses before the bad one: growth means steps that are too large; a sudden
    end means one update that was, or an overflow."""
    recent = list(before[-_RECENT:])
    if start:
        return "likely cause: the data or the model, since nothing was learnt yet (look at the images and the labels)"
    if not recent or recent[-1] > _GROWN * min(recent):
        grown = f", the loss grew from {min(recent):.3g} to {recent[-1]:.3g} before" if recent else ""
        return (
            f"likely cause: steps that are too large{grown}; try a smaller optim.lr, optim.warmup_epochs or optim.clip"
        )
    other = ", precision=float32" if precision != "float32" else ""
    return (
        f"likely cause: a single update that was too large, since the loss was {recent[-1]:.3g} just before; try "
        f"optim.clip, a smaller optim.lr{other}"
    )
