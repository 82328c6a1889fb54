"""The model as given, which decides every verdict, the copies of it that attacks compute with, and the images."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robudget.attacks.ensemble import Passes
from robudget.attacks.victim import Model, Victim, to_float
from robudget.backend.batch_size import call_size, least_size, physical_sizes, tile
from robudget.backend.folding import crafting_copy
from robudget.backend.precision import gains_in_attacks, resolve
from robudget.evaluation.checks import carries_gradient, check_logits, check_surrogate
from robudget.evaluation.specification import Specification
from robudget.evaluation.state import fingerprint, weights_of


@dataclass(frozen=True)
class Images:
    """Images (float32 in [0, 1], or uint8) and labels in the caller's memory, their rows in the full split, and the
    device that computes. Indexing gives float32 on that device."""

    x: Tensor
    y: Tensor
    index: Tensor
    device: torch.device

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        return to_float(self.x[rows].to(self.device)), self.y[rows].to(self.device)

    def batches(self, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            yield part, *self[part]


Backward = Model | Literal["own"] | None
"""Whose gradients attacks take (`Victim.surrogate`): those of a surrogate; those of the model's own `surrogate()`,
where it has that method, else the model's ("own"); the model's (None)."""


def surrogate_of(model: Model, backward: Backward) -> Model | None:
    """The surrogate that `backward` asks for; None: gradients are the model's."""
    if backward != "own":
        return backward
    method = getattr(model, "surrogate", None)
    # A part of a network may bear that name; it is not meant.
    return method() if inspect.ismethod(method) or inspect.isfunction(method) else None


def on_device(device: torch.device, model: Model) -> Model:
    """The model, or a copy of it on the device."""
    if isinstance(model, nn.Module):
        places = [parameter.device for parameter in model.parameters()]
        places = places or [buffer.device for buffer in model.buffers()]
        elsewhere = device.index is not None and places and places[0].index != device.index  # another GPU
        if elsewhere or any(place.type != device.type for place in places):
            return deepcopy(model).to(device)
    return model


class Victims:
    """The model as given, which decides every verdict, and the copies of it that attacks compute with.

    With a surrogate all logits are those of the model as given, and the gradients those of a copy of the surrogate.
    """

    def __init__(
        self,
        model: Model,
        images: Images,
        specification: Specification,
        classes: int | None,
        surrogate: Model | None = None,
    ) -> None:
        self.model, self.images, self.batch_size = model, images, specification.batch_size
        self.surrogate, self.graded = surrogate, model if surrogate is None else surrogate
        size = tile(images.device, self.batch_size)
        self.given = Victim(model, least=size, most=size)
        probe, _ = images[:2]
        logits = check_logits(model, probe, images.y, classes)
        self.classes = logits.shape[1]
        if surrogate is not None:
            check_surrogate(surrogate, probe, logits)
        self.differentiable = carries_gradient(self.graded, probe[:1])
        gains = functools.partial(gains_in_attacks, self.graded, probe)
        # Survivors of a low precision are attacked again; of a randomised model nobody knows yet which those are.
        asked = "float32" if specification.passes > 1 else specification.precision
        resolved = resolve(asked, images.device, gains)
        self.precision = resolved.name if self.differentiable else "float32"
        self.all = [self.given]
        self._copies: dict[bool, Victim] = {}

    def identity(self) -> dict[str, Any]:
        """What has to be equal for a resume, whatever is measured: the model, the images and how they are computed."""
        images, surrogate = self.images, self.surrogate
        backward = None
        if surrogate is not None:
            backward = weights_of(surrogate, lambda: Victim(surrogate).logits(images[:64][0]))
        return {
            "weights": weights_of(self.model, lambda: self.given.logits(images[:64][0])),
            "backward": backward,
            "images": fingerprint(images.x),
            "labels": fingerprint(images.y),
            "index": fingerprint(images.index),
            "batch_size": self.batch_size,
            "precision": self.precision,
            "device": images.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    @property
    def passes(self) -> Passes:
        """By all of them, so far."""
        return sum((victim.passes for victim in self.all), Passes())

    def copy(self, *, precise: bool) -> Victim:
        """A folded copy, in float32 (`precise`) or in the precision of this evaluation."""
        if precise not in self._copies:
            precision = "float32" if precise else self.precision
            x, y = self.images[: min(len(self.images), 64)]
            copy = crafting_copy(self.graded, x, precision) if self.differentiable else self.model
            victim = Victim(copy) if self.surrogate is None else Victim(self.model, surrogate=copy)
            victim.most = call_size(self.graded, x, self.batch_size, 2 if precision == "bfloat16" else 4)
            truth = y if self.differentiable else None
            if x.device.type == "cpu":  # where the padding costs as much as images
                victim.least = least_size(victim, x, truth, victim.most)
            else:
                victim.sizes = physical_sizes(victim, x, truth, victim.most)
            victim.passes = Passes()
            self._copies[precise] = victim
            self.all.append(victim)
        return self._copies[precise]

    def unpadded(self) -> Victim:
        """The model as given, in calls of as many images as it is asked about."""
        self.all.append(Victim(self.model, most=self.batch_size, surrogate=self.surrogate))
        return self.all[-1]

    def misclassified(self, x: Tensor, y: Tensor) -> Tensor:
        """(N,) bool, by the model as given."""
        return misclassified(self.given.logits(x), y)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool; an answer that is not finite is no answer."""
    return (logits.argmax(1) != y) | ~logits.isfinite().all(1)
