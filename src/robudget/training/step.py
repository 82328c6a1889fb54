"""One training step: craft, then update. Every loss of the recipe, and weight perturbation around any of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robudget import losses
from robudget.attacks.geometry import GEOMETRY
from robudget.backend.precision import Precision
from robudget.data.keyed import generator_for, key
from robudget.errors import InputError
from robudget.recipe import Recipe
from robudget.training.craft import CraftMode, adversary_of, craft, cross_entropy, divergence, victim_of
from robudget.training.distributed import World
from robudget.training.model_average import Ema
from robudget.training.optimisation import Optimizer
from robudget.training.stopwatch import Stopwatch

CLEAN = ("standard", "trades", "mart")  # losses whose update sees the clean images


@dataclass(frozen=True)
class Outcome:
    """What a step found, still on the device: the mean loss, and how many images were classified correctly."""

    loss: Tensor
    clean: Tensor | None
    crafted: Tensor | None


class Step:
    """`step(x, labels, target, number)` trains on one batch and counts its image-passes in `calls`.

    x float32 (N, C, H, W) in [0, 1]; labels int64 (N,), which the adversary attacks; `target` what the loss compares
    with.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: Optimizer,
        ema: Ema | None,
        *,
        precision: Precision,
        craft_precision: Precision,
        world: World,
        watch: Stopwatch,
        calls: Counter[str],
        steps_per_epoch: int,
    ) -> None:
        if recipe.metric == "squared" and recipe.loss == "mart":
            raise InputError(
                "metric = 'squared' with loss = 'mart' (allowed: standard, at, trades and the one-step losses)"
            )
        self._recipe, self._model, self._optimizer, self._ema = recipe, model, optimizer, ema
        self._autocast = precision.autocast
        self._world, self._watch, self._calls = world, watch, calls
        self._adversary = adversary_of(recipe)
        self._crafting = CraftMode(model, recipe.craft.batchnorm)
        self._victim = victim_of(model, craft_precision, recipe.craft.batchnorm)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._random = any(_drops(module) for module in model.modules())
        self._awp_from = recipe.awp.after_epochs * steps_per_epoch
        self.delta: Tensor | None = None  # Free-AT's perturbation, which outlives its batch

    def __call__(self, x: Tensor, labels: Tensor, target: Tensor, number: int) -> Outcome:
        with self._dropout(x.device, number):
            if self._recipe.loss == "free-at":
                return self._free(x, labels, target)
            x_adv = self._craft(x, labels, number) if self._recipe.adversarial else None
            self._watch.lap("craft")
            return self._update(x, x_adv, labels, target, number)

    # -- craft -----------------------------------------------------------------------------------------------------

    def _craft(self, x: Tensor, labels: Tensor, number: int) -> Tensor:
        with self._crafting():
            victim, autocast = self._victim()
            if self._recipe.loss == "trades":
                with torch.no_grad(), autocast():
                    objective = divergence(victim(x).float())
                self._calls["craft_forward"] += len(x)
            else:
                objective = cross_entropy(labels)
            x_adv = craft(
                victim,
                x,
                objective,
                self._adversary,
                generator=generator_for(x.device, self._recipe.seed, "craft", number),
                autocast=autocast,
                world=self._world,
            )
        self._calls["craft_forward"] += self._adversary.steps * len(x)
        self._calls["craft_backward"] += self._adversary.steps * len(x)
        return x_adv

    # -- update ----------------------------------------------------------------------------------------------------

    def _update(self, x: Tensor, x_adv: Tensor | None, labels: Tensor, target: Tensor, number: int) -> Outcome:
        def forward() -> tuple[Tensor, Tensor | None, Tensor | None]:
            with self._autocast():
                clean = self._model(x) if self._recipe.loss in CLEAN else None
                crafted = self._model(x_adv) if x_adv is not None else None
            clean = clean.float() if clean is not None else None
            crafted = crafted.float() if crafted is not None else None
            self._calls["update_forward"] += len(x) * ((clean is not None) + (crafted is not None))
            self._calls["update_backward"] += len(x) * ((clean is not None) + (crafted is not None))
            return self._loss(clean, crafted, target), clean, crafted

        perturbs = self._recipe.awp.gamma is not None and number >= self._awp_from
        shift = self._against(forward) if perturbs else None
        self._optimizer.zero_grad()
        loss, clean, crafted = forward()
        torch.autograd.backward(loss)
        if shift is not None:
            torch._foreach_sub_([p.detach() for p in self._layers()], shift)
        self._apply()
        return Outcome(loss.detach(), _right(clean, labels), _right(crafted, labels))

    def _loss(self, clean: Tensor | None, crafted: Tensor | None, target: Tensor) -> Tensor:
        recipe = self._recipe
        squared = recipe.metric == "squared"
        if clean is not None and crafted is not None:
            pair = losses.mart if recipe.loss == "mart" else losses.score if squared else losses.trades
            return pair(clean, crafted, target, recipe.beta)
        seen = clean if clean is not None else crafted
        assert seen is not None
        return losses.squared(seen, target) if squared else losses.standard(seen, target)

    def _apply(self) -> None:
        """Average the gradients over the processes, clip, step, average the weights."""
        self._world.average_gradients(self._parameters)
        if self._recipe.optim.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._recipe.optim.clip, foreach=True)
        self._optimizer.step()
        self._watch.lap("update")
        if self._ema is not None:
            self._ema.update()
            self._watch.lap("ema")

    # -- adversarial weight perturbation ---------------------------------------------------------------------------

    def _layers(self) -> list[nn.Parameter]:
        """What is perturbed: weights of convolutions and linear layers."""
        return [p for p in self._parameters if p.ndim > 1]

    def _against(self, forward: Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]) -> list[Tensor]:
        """Move every layer by γ·‖w‖ along the loss's gradient there, and return the moves (Wu et al. 2020, equation 10
        with one step, for which their proxy model is the model itself)."""
        gamma = self._recipe.awp.gamma
        assert gamma is not None
        layers = self._layers()
        with _untracked(self._norms):
            loss, _, _ = forward()
        for parameter, gradient in zip(layers, torch.autograd.grad(loss, layers), strict=True):
            parameter.grad = gradient
        self._world.average_gradients(layers)
        shift = []
        for parameter in layers:
            assert parameter.grad is not None
            weight, gradient = parameter.detach(), parameter.grad
            shift.append(gradient * (gamma * weight.norm() / (gradient.norm() + 1e-20)))
        torch._foreach_add_([p.detach() for p in layers], shift)
        return shift

    # -- Free adversarial training ---------------------------------------------------------------------------------

    def _free(self, x: Tensor, labels: Tensor, target: Tensor) -> Outcome:
        """`craft.steps` replays of one batch; each backward pass updates the weights and the perturbation together
        (Shafahi et al. 2019, algorithm 1). The perturbation goes on into the next batch."""
        recipe, threat = self._recipe, self._recipe.threat.threat()
        geometry, step_size = GEOMETRY[threat.norm], recipe.craft.step_size or threat.eps
        if self.delta is None:
            self.delta = torch.zeros_like(x)
        total = x.new_zeros(())
        right = torch.zeros((), dtype=torch.int64, device=x.device)
        for _ in range(recipe.craft.steps):
            x_adv = geometry.project(x + self.delta, x, threat.eps).requires_grad_(True)
            self._optimizer.zero_grad()
            with self._autocast():
                logits = self._model(x_adv)
            loss = self._loss(None, logits.float(), target)
            torch.autograd.backward(loss)
            gradient = x_adv.grad
            assert gradient is not None
            self._apply()
            moved = x_adv.detach() + step_size * geometry.steepest(gradient)
            self.delta = geometry.project(moved, x, threat.eps) - x
            self._calls["update_forward"] += len(x)
            self._calls["update_backward"] += len(x)
            total += loss.detach() / recipe.craft.steps
            right = (logits.detach().argmax(1) == labels).sum()
        self._watch.lap("update")
        return Outcome(total, None, right)

    @contextmanager
    def _dropout(self, device: torch.device, number: int) -> Iterator[None]:
        """Dropout and stochastic depth draw from torch's global generator: seeded by the step, and put back after."""
        if not self._random:
            yield
            return
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(key(self._recipe.seed, "dropout", number, self._world.rank))
            yield


def _right(logits: Tensor | None, labels: Tensor) -> Tensor | None:
    return None if logits is None else (logits.detach().argmax(1) == labels).sum()


def _drops(module: nn.Module) -> bool:
    rate = (
        getattr(module, "p", 0)
        if isinstance(module, nn.modules.dropout._DropoutNd)
        else getattr(module, "drop_prob", 0)
    )
    return bool(rate)


@contextmanager
def _untracked(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """BatchNorm by batch statistics without a trace in the running ones."""
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, track in zip(norms, tracked, strict=True):
            norm.track_running_stats = track
