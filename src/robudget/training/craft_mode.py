"""A model while it is attacked in training: frozen weights, BatchNorm as asked, a folded copy where that is faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from robudget.attacks.victim import Model
from robudget.backend.folding import Folded
from robudget.backend.kernels import Arithmetic
from robudget.backend.precision import Autocast, Precision
from robudget.models.preact import PreActNet
from robudget.training.batchnorm import norms_of, untracked


class CraftMode:
    """A model while it is attacked: `with mode(x) as (victim, autocast)`, x being images (N, C, H, W) of the attack.

    Inside, no gradient reaches the weights, and BatchNorm is as asked. `eval`: the whole model is in eval mode; in
    bfloat16 a PreActNet is then attacked through a folded copy, which has fewer operations. `batch`: the same, but
    BatchNorm normalises by the batch at hand, and its running statistics are not touched (TRADES in the paper). On
    leaving, every module's mode and every `requires_grad` are what they were, also after an exception. The lists are
    made once: a model of 100 modules is switched in microseconds.
    """

    def __init__(self, model: nn.Module, precision: Precision, batchnorm: str = "eval") -> None:
        self._model, self._precision, self._batch = model, precision, batchnorm == "batch"
        self._modules = list(model.modules())
        self._norms = norms_of(model) if self._batch else []
        self._parameters = list(model.parameters())
        own = isinstance(model, PreActNet) and not model.checkpointing
        self._folds = own and precision.name == "bfloat16" and not self._batch
        self._copy: Folded | None = None

    @contextmanager
    def __call__(self, x: Tensor) -> Iterator[tuple[Model, Autocast]]:
        modes = [m.training for m in self._modules]
        trainable = [p for p in self._parameters if p.requires_grad]
        try:
            for module in self._modules:
                module.training = False
            for norm in self._norms:
                norm.training = True
            for parameter in trainable:
                parameter.requires_grad_(False)
            with untracked(self._norms):
                yield (self._folded(x), nullcontext) if self._folds else (self._model, self._precision.autocast)
        finally:
            for module, mode in zip(self._modules, modes, strict=True):
                module.training = mode
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _folded(self, x: Tensor) -> Folded:
        if self._copy is None:
            self._copy = Folded(self._model, x[:2], Arithmetic(torch.bfloat16, channels_last=True, live=True))
        else:
            self._copy.refresh()
        return self._copy
