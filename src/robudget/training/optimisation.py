"""What an update does with a gradient: learning rate by step, optimizers, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robudget.errors import InputError, unknown
from robudget.recipe.parts import EmaPart, OptimPart

# Of torch, or our own; every other name goes to timm.
_OWN = ("sgd", "adam", "adamw")


class Optimizer(Protocol):
    """What the training loop needs of an optimizer; torch's have it."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None: ...
    def step(self) -> object: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


def peak_lr(part: OptimPart, batch_size: int) -> float:
    """The recipe's lr at this batch size: linear in it (Goyal et al. 2017), or as given without `lr_batch`."""
    return part.lr if part.lr_batch is None else part.lr * batch_size / part.lr_batch


def lr_at(part: OptimPart, peak: float, step: int, *, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of update `step` (from 0) out of `steps`.

    First a linear warm-up of `warmup_epochs`; at the end `cooldown_epochs` at the schedule's last value; both count
    among `steps`. Between them, by `schedule`: cosine: half a cosine from the peak to `final` × peak; piecewise: ×0.1
    at 50% and again at 75% (Rice et al. 2020); onecycle: up linearly for 40% of the steps and down to 0 (Wong et al.
    2020); constant; trapezoid: the peak, and linearly down to `final` × peak in the last `decay_epochs`
    (a constant trunk with a cool-down, Hägele et al. 2024).
    """
    end = max(1, steps - round(part.cooldown_epochs * steps_per_epoch))
    warmup = min(round(part.warmup_epochs * steps_per_epoch), end - 1)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    # The lowest lr is reached after the last step of the schedule, or held through the cool-down.
    done = min((step - warmup) / (end - warmup), 1.0)
    match part.schedule:
        case "cosine":
            return peak * (part.final + (1 - part.final) * 0.5 * (1 + math.cos(math.pi * done)))
        case "piecewise":
            return peak * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
        case "onecycle":
            return peak * ((done + 1 / (end - warmup)) / 0.4 if done < 0.4 else (1 - done) / 0.6)
        case "constant":
            return peak
        case "trapezoid":
            assert part.decay_epochs is not None
            left = (end - step) / max(1, round(part.decay_epochs * steps_per_epoch))
            return peak * (part.final + (1 - part.final) * min(max(left, 0.0), 1.0))


def parameter_groups(model: nn.Module, part: OptimPart) -> list[dict[str, Any]]:
    """Weight decay on everything, or not on BatchNorm's and biases (tensors of one dimension) unless `decay_norm`."""
    decayed = [p for p in model.parameters() if part.decay_norm or p.ndim > 1]
    spared = [p for p in model.parameters() if not part.decay_norm and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": part.weight_decay}]
    return [*groups, {"params": spared, "weight_decay": 0.0}] if spared else groups


def build_optimizer(model: nn.Module, part: OptimPart, lr: float) -> Optimizer:
    """`sgd` is our own, `adam` and `adamw` torch's (fused); any other name is timm's. Raises InputError."""
    groups, name = parameter_groups(model, part), part.name.lower()
    if name == "sgd":
        return Sgd(groups, lr=lr, momentum=part.momentum, nesterov=part.nesterov)
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(groups, lr=lr, fused=True)
    from timm.optim._optim_factory import create_optimizer_v2, list_optimizers

    known = [str(other) for other in list_optimizers()]
    if name not in known:
        raise unknown("optimizer", part.name, [*_OWN, *known])
    try:
        optimizer = create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, momentum=part.momentum)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise InputError(f"optim.name = {part.name!r} can't be used here: {error}") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optim.name = {part.name!r} is not a plain optimizer")
    return optimizer


class Sgd:
    """b ← m·b + (g + d·w); w ← w − lr·b, or with Nesterov w ← w − lr·(g + d·w + m·b) (Sutskever et al. 2013).

    The same recurrence as torch.optim.SGD without dampening, to the last bit, from the same `param_groups` (`params`,
    `lr`, `weight_decay`), with as much of its interface as a training loop needs. Not torch's, because making one
    imports torch's compiler: 2.7 s of CPU time at the start of every worker. Parameters without a gradient stay.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": lr, **group} for group in groups]
        self._momentum, self._nesterov = momentum, nesterov
        self._buffers: dict[int, Tensor] = {}

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            moves = [p.grad for p in weights]
            if not weights:
                continue
            if group["weight_decay"]:
                moves = list(torch._foreach_add(moves, weights, alpha=group["weight_decay"]))
            if self._momentum:
                moves = self._with_momentum(weights, moves)
            torch._foreach_add_(weights, moves, alpha=-group["lr"])

    def _with_momentum(self, weights: list[Tensor], moves: list[Tensor]) -> list[Tensor]:
        fresh = [w for w in weights if id(w) not in self._buffers]
        for weight in fresh:
            self._buffers[id(weight)] = torch.zeros_like(weight)
        buffers = [self._buffers[id(w)] for w in weights]
        torch._foreach_mul_(buffers, self._momentum)
        torch._foreach_add_(buffers, moves)
        return list(torch._foreach_add(moves, buffers, alpha=self._momentum)) if self._nesterov else buffers

    def state_dict(self) -> dict[str, Any]:
        """The buffers in the order of the parameters (None before the first step)."""
        return {"momentum": [self._buffers.get(id(p)) for group in self.param_groups for p in group["params"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._buffers = {
            id(p): torch.empty_like(p).copy_(b)
            for p, b in zip(parameters, state["momentum"], strict=True)
            if b is not None
        }


class Ema:
    """`model` is an averaged copy: w̄ ← d·w̄ + (1 − d)·w after every update, with d = `decay`.

    Floating-point buffers (BatchNorm's running mean and variance) are averaged in the same way; integer buffers are
    copied. With `warmup` the decay of update t is min(decay, (1 + t)/(10 + t)), t from 0, so that the random start is
    forgotten quickly (Rebuffi et al. 2021 and TensorFlow's ExponentialMovingAverage do the same). Not torch's
    AveragedModel: it takes the first update whole, averages integers too, has no warm-up, and took 4 to 10 times as
    long.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        live = [*model.parameters(), *model.buffers()]
        mine = [*self.model.parameters(), *self.model.buffers()]
        averaged = [t.is_floating_point() for t in live]
        self._live = [t.detach() for t, a in zip(live, averaged, strict=True) if a]
        self._mine = [t.detach() for t, a in zip(mine, averaged, strict=True) if a]
        self._copied = [(m, t) for m, t, a in zip(mine, live, averaged, strict=True) if not a]

    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        self._move(decay)

    def _move(self, decay: float) -> None:
        torch._foreach_lerp_(self._mine, self._live, 1 - decay)
        for mine, live in self._copied:
            mine.copy_(live)

    def state(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **{f"model.{k}": v for k, v in self.model.state_dict().items()}}

    def load(self, state: dict[str, Tensor | int]) -> None:
        weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        self.model.load_state_dict(weights)
        self.updates = int(state["updates"])


class Swa(Ema):
    """The plain mean of the weights at the ends of all epochs after `after`, BatchNorm's running statistics included;
    until then the weights of the last epoch (Izmailov et al. 2018, who compute the statistics anew from the images)."""

    def __init__(self, model: nn.Module, after: float, *, steps_per_epoch: int) -> None:
        super().__init__(model, 0.0, warmup=False)
        self._after, self._steps_per_epoch = math.floor(after), steps_per_epoch

    def update(self) -> None:
        self.updates += 1
        epochs, rest = divmod(self.updates, self._steps_per_epoch)
        if rest == 0:
            before = max(0, epochs - 1 - self._after)
            self._move(before / (before + 1))


def average_of(model: nn.Module, part: EmaPart, *, steps_per_epoch: int) -> Ema | None:
    """The recipe's average of the weights; None where it asks for none."""
    if part.equal_after is not None:
        return Swa(model, part.equal_after, steps_per_epoch=steps_per_epoch)
    return Ema(model, part.decay, warmup=part.warmup) if part.decay is not None else None
