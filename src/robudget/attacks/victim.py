"""The model as an attack sees it: rows in, logits or gradients of an objective (CE, DLR, margin) out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robudget.attacks.ensemble import Passes
from robudget.errors import unknown

Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) in [0, 1] → logits (N, classes). Usually an `nn.Module`; any function will do."""


def to_float(images: Tensor) -> Tensor:
    """Images in [0, 1] as they are; uint8 ones, which need a quarter of the memory, as float32 n/255."""
    return images if images.is_floating_point() else images.to(torch.float32).div_(255)


# -- what an attack raises --------------------------------------------------------------------------------------------

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (N, classes), label (N,), target (N,)) → (N,). Untargeted objectives ignore the target."""


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """(N,) z_y − max over the other classes; ≤ 0 where misclassified (or tied)."""
    true = logits.gather(1, label.unsqueeze(1))
    return (true - logits.scatter(1, label.unsqueeze(1), -torch.inf).amax(1, keepdim=True)).squeeze(1)


def ce(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, label, reduction="none")


def ce_targeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return -cross_entropy(logits, target, reduction="none")


def cw(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """−margin (Carlini & Wagner 2017, without the confidence clamp)."""
    return -margin(logits, label)


def dlr(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6); needs 3 classes. Invariant to scale and shift."""
    top = logits.topk(3, dim=1).values
    # Where the label is the largest logit its rival is the second; `margin` finds it either way.
    return -margin(logits, label) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, eq. 7); needs 4 classes."""
    top = logits.topk(4, dim=1).values
    return difference(logits, label, target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def difference(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """z_t − z_y, whose zero is the decision boundary that FAB-T projects onto."""
    pair = logits.gather(1, torch.stack((target, label), dim=1))
    return pair[:, 0] - pair[:, 1]


OBJECTIVES: dict[str, Objective] = {
    "ce": ce,
    "ce-targeted": ce_targeted,
    "cw": cw,
    "dlr": dlr,
    "dlr-targeted": dlr_targeted,
}


def objective(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise unknown("loss", name, OBJECTIVES)
    return OBJECTIVES[name]


# -- calling the model -------------------------------------------------------------------------------------------------


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode restored after, also when the body raises.

    In evaluation mode BatchNorm reads its statistics and never writes them; gradients are taken with respect to images
    by `torch.autograd.grad`, so no parameter's `grad` or `requires_grad` is touched.
    """
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _BackwardOf(torch.autograd.Function):
    """The values of one tensor with the gradient of another one."""

    @staticmethod
    def forward(ctx: Any, of: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@dataclass
class Victim:
    """Calls a model in batches of `least` to `most` images and counts the passes.

    With `sizes` (ascending) a call has one of these, the next larger one. A smaller call is padded with zeros (the
    padding counts as passes, since it is computed), a larger one is cut (`most` 0: never). Out of memory, `most` is
    halved and the call is made again; `halved` lists the new sizes.

    With a `surrogate` (images → logits, as the model) gradients are those of BPDA (Athalye et al. 2018): an objective L
    has its value, and its gradient with respect to the logits, at the model's logits z(x); from there the gradient goes
    back through the surrogate s at the same x, ∇L = J_s(x)ᵀ · ∂L/∂z at z(x). Logits are always the model's.
    """

    model: Model
    least: int = 1
    most: int = 0
    surrogate: Model | None = None
    passes: Passes = field(default_factory=Passes)
    halved: list[int] = field(default_factory=list)
    sizes: tuple[int, ...] = ()

    def logits(self, x: Tensor) -> Tensor:
        """(N, classes) float32 logits, without a graph."""

        def call(part: Tensor, n: int, _: int) -> tuple[Tensor, ...]:
            with torch.no_grad():
                z = self.model(part)
            self.passes += Passes(len(part))
            return (z[:n].float(),)

        return self._in_parts(x, call)[0]

    def gradient(self, x: Tensor, objective: Objective, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (N, classes), objective (N,), its gradient (N, C, H, W)), all detached, in float32."""

        def call(part: Tensor, n: int, first: int) -> tuple[Tensor, ...]:
            rows = slice(first, first + n)
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                z = self._graph(leaf)[:n].float()
                value = objective(z, y[rows], target[rows])
                (grad,) = torch.autograd.grad(value.sum(), leaf)
            self._count(len(part), 1)
            return z.detach(), value.detach(), grad[:n]

        z, value, grad = self._in_parts(x, call)
        return z, value, grad

    def jacobian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (N, classes), their gradients (N, classes, C, H, W)): one backward pass a class."""

        def call(part: Tensor, n: int, _: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                z = self._graph(leaf).float()
                classes = z.shape[1]
                grads = [
                    torch.autograd.grad(z[:, c].sum(), leaf, retain_graph=c + 1 < classes)[0][:n]
                    for c in range(classes)
                ]
            self._count(len(part), classes)
            return z[:n].detach(), torch.stack(grads, dim=1)

        z, grads = self._in_parts(x, call)
        return z, grads

    def _graph(self, leaf: Tensor) -> Tensor:
        """The model's logits of a leaf, in a graph that goes back to it: the model's own, or the surrogate's."""
        if self.surrogate is None:
            return self.model(leaf)
        with torch.no_grad():
            values = self.model(leaf.detach())
        z: Tensor = _BackwardOf.apply(self.surrogate(leaf).float(), values.float())
        return z

    def _count(self, images: int, gradients: int) -> None:
        """So many images were evaluated, and so many gradients taken of each."""
        back = gradients * images
        self.passes += Passes(images, back) if self.surrogate is None else Passes(images, 0, images, back)

    def _in_parts(self, x: Tensor, call: Callable[[Tensor, int, int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        parts: list[tuple[Tensor, ...]] = []
        first = 0
        while first < len(x) or not parts:
            limit = self.most or max(len(x), 1)
            piece = x[first : first + limit]
            try:
                parts.append(call(self._padded(piece), len(piece), first))
            except RuntimeError as error:
                if not out_of_memory(error) or limit <= 1:
                    raise
            else:
                first += len(piece)
                continue
            # Only here has the error, whose traceback holds the activations of the call that failed, gone.
            self._halve(limit)
        return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _padded(self, x: Tensor) -> Tensor:
        least = next((size for size in self.sizes if size >= len(x)), self.least)
        short = min(least, self.most or least) - len(x)
        return x if short <= 0 else torch.cat((x, x.new_zeros(short, *x.shape[1:])))

    def _halve(self, limit: int) -> None:
        half = limit // 2
        self.most = half
        self.halved.append(half)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory at batch {limit}: going on with {half}", stacklevel=2)


_NO_MEMORY = (  # of the CPU's allocator, of CUDA, cuDNN and cuBLAS, which raise plain RuntimeErrors
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, on whatever device and in whatever library?"""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)
