"""One training step: craft adversarial examples, then update the weights on them.

The update knows every loss of the recipe, and weight perturbation around any of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robudget.attacks.geometry import GEOMETRY
from robudget.backend.batch_size import EVERY, Physical
from robudget.backend.graph import Graphs
from robudget.backend.host_memory import kept_on_host
from robudget.backend.precision import Precision
from robudget.data.keyed import generator_for, key
from robudget.errors import InputError
from robudget.losses import LOSSES
from robudget.recipe import Recipe
from robudget.training import losses, prior
from robudget.training.batchnorm import SyncBatchNorm2d, norms_of, running_statistics, untracked
from robudget.training.class_means import ClassMeans
from robudget.training.clock import Stopwatch
from robudget.training.craft import adversary_of, craft, cross_entropy, divergence, warming_up
from robudget.training.craft_mode import CraftMode
from robudget.training.distributed import World
from robudget.training.optimisation import Ema, Optimizer
from robudget.training.penalties import Slope, misalignment, rise, slope
from robudget.training.prior import Memory

Forward = Callable[[slice], tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Outcome:
    """A step's result, still on the device: the mean loss, and how many images were classified correctly."""

    loss: Tensor
    clean: Tensor | None
    crafted: Tensor | None


class Step:
    """`step(x, labels, target, number)` trains on one batch and counts its image-passes in `calls`. `applied`: whether
    the last call, if it failed, had begun to change the weights.

    x float32 (N, C, H, W) in [0, 1]; labels int64 (N,), which the adversary attacks; `target` what the loss compares
    with. `graphs`: of the attack's steps; `update`: the model as the update calls it, where that is another function.
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
        physical: Physical | None = None,
        graphs: Graphs | None = None,
        update: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.physical, self.graphs, self.applied = physical or Physical(), graphs, False
        both = LOSSES[recipe.loss].clean and LOSSES[recipe.loss].adversarial
        if both and (recipe.loss, recipe.metric) not in losses.PAIRED:
            raise InputError(
                f"metric = {recipe.metric!r} with loss = {recipe.loss!r} "
                "(allowed: standard, at, trades and the one-step losses)"
            )
        self._network = update or model
        self._recipe, self._model, self._optimizer, self._ema = recipe, model, optimizer, ema
        self._kind = LOSSES[recipe.loss]
        self._autocast = precision.autocast
        self._world, self._watch, self._calls = world, watch, calls
        self._adversary = adversary_of(recipe)
        self._warmup_steps = round(recipe.threat.warmup_epochs * steps_per_epoch)
        self._crafting = CraftMode(model, craft_precision, recipe.craft.batchnorm)
        if recipe.differentiates_twice:  # in every process, also before its first step
            calls["penalty"] += 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._layers = [p for p in self._parameters if p.ndim > 1]  # weights of convolutions and linear layers
        # A loss with a gradient of the images in it would leave one of its own in them.
        self._twice = self._parameters if recipe.differentiates_twice else None
        self._norms = norms_of(model)
        synchronised = all(isinstance(norm, SyncBatchNorm2d) for norm in self._norms)
        self._statistics = [] if synchronised else running_statistics(model)  # to be averaged over the processes
        self._random = any(_drops(module) for module in model.modules())
        self._awp_from = recipe.awp.after_epochs * steps_per_epoch
        self._steps_per_epoch = steps_per_epoch
        self.delta: Tensor | None = None  # Free-AT's perturbation, which outlives its batch
        self.rows_of: Callable[[int], Tensor] | None = None  # of a step: which training images are its batch
        self.images = 0  # that are trained on
        self.memory: Memory | None = None  # FGSM-PGI's perturbation of each of them
        self.class_means: ClassMeans | None = None  # of IKL

    def __call__(self, x: Tensor, labels: Tensor, target: Tensor, number: int) -> Outcome:
        self.applied = False
        with self._dropout(x.device, number):
            if self._kind.replays:
                return self._free(x, labels, target)
            if self._kind.remembers:
                return self._prior_guided(x, labels, target, number)
            if self.class_means is not None and number % self._steps_per_epoch == 0:
                self.class_means.turn()
            x_adv = self._craft(x, labels, number) if self._recipe.adversarial else None
            self._watch.lap("craft")
            return self._update(x, x_adv, labels, target, number)

    # -- craft -----------------------------------------------------------------------------------------------------

    def _craft(self, x: Tensor, labels: Tensor, number: int) -> Tensor:
        # By the statistics of the batch, its images are not independent of each other and stay together.
        physical = Physical() if self._recipe.craft.batchnorm == "batch" and self._norms else self.physical
        kept = self._kept_on_host(len(x)) if physical is not self.physical else nullcontext()
        adversary, graphs = warming_up(self._adversary, number, self._warmup_steps), self.graphs
        if physical is not self.physical and self.physical.splits(len(x)):
            graphs = None
        if adversary is not self._adversary:  # a graph holds one radius
            graphs = None
        with self._crafting(x) as (victim, autocast), kept:
            if self._recipe.raises == "kl":
                with torch.no_grad(), autocast():
                    objective = divergence(torch.cat([victim(x[rows]).float() for rows in physical.parts(len(x))]))
                self._calls["craft_forward"] += len(x)
            else:
                objective = cross_entropy(labels)
            x_adv = craft(
                victim,
                x,
                objective,
                adversary,
                generator=generator_for(x.device, self._recipe.seed, "craft", number),
                autocast=autocast,
                world=self._world,
                physical=physical,
                graphs=graphs,
            )
        self._calls["craft_forward"] += self._adversary.steps * len(x)
        self._calls["craft_backward"] += self._adversary.steps * len(x)
        return x_adv

    # -- update ----------------------------------------------------------------------------------------------------

    def _update(self, x: Tensor, x_adv: Tensor | None, labels: Tensor, target: Tensor, number: int) -> Outcome:
        around = self._around(x, number) if self._recipe.craft.grad_align else None

        def forward(rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
            """The mean loss over these rows, and their logits."""
            if self._kind.penalises:
                return self._penalised(x[rows], target[rows])
            with self._autocast(), self._kept_on_host(len(x)):
                clean = self._network(x[rows]) if self._kind.clean else None
                crafted = self._network(x_adv[rows]) if x_adv is not None else None
            clean = clean.float() if clean is not None else None
            crafted = crafted.float() if crafted is not None else None
            images = len(target[rows]) * ((clean is not None) + (crafted is not None))
            self._calls["update_forward"] += images
            self._calls["update_backward"] += images
            loss = self._loss(clean, crafted, labels[rows], target[rows])
            if around is not None:
                loss = loss + self._recipe.craft.grad_align * self._misaligned(x[rows], around[rows], target[rows])
            return loss, clean, crafted

        # With BatchNorm every image depends on all others through the statistics of every layer: the batch stays whole.
        parts = [EVERY] if self._norms else self.physical.parts(len(x))
        perturbs = self._recipe.awp.gamma is not None and number >= self._awp_from
        shift = self._against(forward, parts, len(x)) if perturbs else None
        try:
            self._optimizer.zero_grad()
            mean, outcomes = _mean_over(forward, parts, len(x), self._twice)
        finally:
            if shift is not None:
                torch._foreach_sub_([p.detach() for p in self._layers], shift)
        self._apply()
        if self.class_means is not None:
            self.class_means.add(torch.cat([z for z, _ in outcomes if z is not None]), labels, self._world)
        clean, crafted = (
            None if logits[0] is None else _right(torch.cat([z for z in logits if z is not None]), labels)
            for logits in zip(*outcomes, strict=True)
        )
        return Outcome(mean, clean, crafted)

    def _kept_on_host(self, n: int) -> AbstractContextManager[object]:
        """Where a batch of n is more than fits at once and can't be split, what its backward pass needs waits in the
        CPU's memory, which changes no bit."""
        whole = bool(self._norms) or self._kind.replays or self._kind.remembers
        if not (whole and self.physical.splits(n)):
            return nullcontext()
        return kept_on_host(n)

    def _loss(self, clean: Tensor | None, crafted: Tensor | None, labels: Tensor, target: Tensor) -> Tensor:
        recipe = self._recipe
        if clean is not None and crafted is not None:
            if self._kind.class_means and self.class_means is None:
                self.class_means = ClassMeans.begin(clean.shape[1], clean.device)
            weights = (self.class_means.weights[labels],) if self.class_means is not None else ()
            return losses.PAIRED[recipe.loss, recipe.metric](clean, crafted, target, recipe.beta, *weights)
        logits = crafted if clean is None else clean
        assert logits is not None
        return losses.SINGLE[recipe.metric](logits, target)

    def _apply(self) -> None:
        """Average the gradients over the processes, clip, step, average the weights.

        BatchNorm's running statistics are averaged over the processes too where each has its own: every process then
        has the same model, which is what is validated, saved and resumed."""
        self._world.average_gradients(self._parameters)
        self.applied = True
        if self._recipe.optim.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._recipe.optim.clip, foreach=True)
        self._optimizer.step()
        self._world.average(self._statistics)
        self._watch.lap("update")
        if self._ema is not None:
            self._ema.update()
            self._watch.lap("ema")

    # -- penalties on gradients, and what classes are weighed by ----------------------------------------------------

    def _penalised(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, None]:
        """Cross-entropy of clean images, and β times what its linear part rises by within the ball."""
        recipe, found = self._recipe, self._slope(x, target)
        loss = losses.cross_entropy(found.logits, target)
        loss = loss + recipe.beta * rise(found.gradient, recipe.threat.norm, recipe.threat.eps)
        return loss, found.logits, None

    def _around(self, x: Tensor, number: int) -> Tensor:
        """x with uniform noise of the ball, not moved into [0, 1]: where GradAlign takes its second gradient."""
        generator = generator_for(x.device, self._recipe.seed, "align", number)
        shape = (len(x) * self._world.size, *x.shape[1:])
        noise = torch.rand(shape, generator=generator, device=x.device)[self._world.mine]
        eps = warming_up(self._adversary, number, self._warmup_steps).threat.eps
        return x + eps * (2 * noise - 1)

    def _misaligned(self, x: Tensor, around: Tensor, target: Tensor) -> Tensor:
        """By the statistics of these batches, without a trace in the running ones, which are of what is minimised."""
        with untracked(self._norms):
            return misalignment(*(self._slope(images, target).gradient for images in (x, around)))

    def _slope(self, x: Tensor, target: Tensor) -> Slope:
        self._calls["penalty"] += len(x)
        return slope(self._model, x, target, self._autocast)

    # -- adversarial weight perturbation ---------------------------------------------------------------------------

    def _against(self, forward: Forward, parts: list[slice], n: int) -> list[Tensor]:
        """Move every layer by γ·‖w‖ along the loss's gradient there, and return the moves (Wu et al. 2020, equation 10
        with one step, for which their proxy model is the model itself)."""
        gamma = self._recipe.awp.gamma
        assert gamma is not None
        layers = self._layers
        self._optimizer.zero_grad()
        with untracked(self._norms):
            _mean_over(forward, parts, n)
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
            with self._autocast(), self._kept_on_host(len(x)):
                logits = self._model(x_adv)
            loss = self._loss(None, logits.float(), labels, target)
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

    # -- FGSM with a prior -----------------------------------------------------------------------------------------

    def _prior_guided(self, x: Tensor, labels: Tensor, target: Tensor, number: int) -> Outcome:
        """Cross-entropy of one step's adversarial images, and their logits' squared distance to those at the start of
        the step (Jia et al. 2022). The start's forward pass serves the attack and this distance, so that an image takes
        two forward passes, one backward pass to itself and two to the weights. The model stays in training mode."""
        assert self.rows_of is not None
        epoch, start = divmod(number, self._steps_per_epoch)
        if self.memory is None or (start == 0 and epoch % prior.RESET_EPOCHS == 0):
            self.memory = Memory.begin(self._recipe, self.images, x, epoch)
        rows, eps = self.rows_of(number).to(x.device), self._recipe.threat.eps
        at_start = (x + self.memory.delta[rows]).requires_grad_(True)
        self._optimizer.zero_grad()
        with self._autocast(), self._kept_on_host(len(x)):
            before = self._model(at_start)
        (gradient,) = torch.autograd.grad(losses.cross_entropy(before.float(), target), at_start, retain_graph=True)
        x_adv, after = self.memory.advanced(rows, x, gradient, eps, self._recipe.craft.step_size or eps)
        self._watch.lap("craft")
        with self._autocast(), self._kept_on_host(len(x)):
            logits = self._model(x_adv)
        loss = losses.cross_entropy(logits.float(), target)
        loss = loss + prior.WEIGHT * (logits.float() - before.float()).square().mean()
        torch.autograd.backward(loss)
        self._apply()
        self.memory.store(rows, after)
        self._calls["craft_backward"] += len(x)
        self._calls["update_forward"] += 2 * len(x)
        self._calls["update_backward"] += 2 * len(x)
        return Outcome(loss.detach(), None, (logits.detach().argmax(1) == labels).sum())

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


def _mean_over(
    forward: Forward, parts: list[slice], n: int, inputs: list[nn.Parameter] | None = None
) -> tuple[Tensor, list[tuple[Tensor | None, ...]]]:
    """The loss over a batch of n and its gradients in every `grad` (of `inputs` alone, if given), part after part; each
    part's detached logits."""
    total: Tensor | None = None
    outcomes: list[tuple[Tensor | None, ...]] = []
    for rows in parts:
        loss, *logits = forward(rows)
        if rows is not EVERY:
            loss = loss * (len(range(*rows.indices(n))) / n)
        torch.autograd.backward(loss, inputs=inputs)
        total = loss.detach() if total is None else total + loss.detach()
        outcomes.append(tuple(None if z is None else z.detach() for z in logits))
    assert total is not None
    return total, outcomes


def _right(logits: Tensor | None, labels: Tensor) -> Tensor | None:
    return None if logits is None else (logits.detach().argmax(1) == labels).sum()


def _drops(module: nn.Module) -> bool:
    rate = (
        getattr(module, "p", 0)
        if isinstance(module, nn.modules.dropout._DropoutNd)
        else getattr(module, "drop_prob", 0)
    )
    return bool(rate)
