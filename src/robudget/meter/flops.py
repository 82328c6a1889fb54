"""FLOPs of a model, counted by dispatch on fake tensors, and what run.json records of a stage from them.

The model's own modules run on the stand-ins, so nothing is computed or allocated.

The formulas are torch's own (`torch.utils.flop_counter`): convolutions, matrix products and attention, 2 per
multiply-add. What has no formula (BatchNorm, activations, pooling, …) is listed with its estimated share. One
formula is corrected: torch charges the weight gradient of a grouped convolution `groups` times over.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from robudget.cache import remembered
from robudget.meter.conventions import paper_flops_of
from robudget.meter.energy import Energy
from robudget.models.build import build
from robudget.recipe import Recipe
from robudget.recipe.parts import ModelPart

# BatchNorm cannot normalise one value per channel, so two images are counted and the sum is halved.
_BATCH = 2
# Moving an average towards the weights: a subtraction, a product and an addition per parameter.
_EMA_FLOPS = 3
# Questions about a tensor, not work on it: NotImplemented lets torch ask the next handler.
_QUERIES = frozenset([
    "size", "sym_size", "numel", "sym_numel", "dim", "stride", "sym_stride", "storage_offset", "sym_storage_offset",
    "layout", "device", "is_contiguous", "sym_is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense",
])  # fmt: skip
_SMALLEST_SHARE = 1e-5  # smaller ones are listed together as `other`


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one image through one model, by pass, with what else a forecast needs to know of the model.

    `input_backward` is the backward of an attack step (gradient of the input alone); `update_backward` that of a
    training step (gradients of the parameters; the first layer's input gradient is not taken); `full_backward` has
    both. `penalty`: a gradient of the image that is in the loss: forward, that gradient, and the backward of both to
    the parameters; None where it was not asked for. `activation_bytes`: what one image keeps for an update's backward.
    `uncounted`: op → its share of all work of a training step, estimated as one FLOP per element that it writes.
    `method` says on what it was counted.
    """

    forward: int
    input_backward: int
    update_backward: int
    full_backward: int
    parameters: int
    activation_bytes: int
    image_shape: tuple[int, ...]
    uncounted: Mapping[str, float]
    method: str
    penalty: int | None = None

    @property
    def uncounted_share(self) -> float:
        return sum(self.uncounted.values())

    @property
    def ema(self) -> int:
        """FLOPs of one update of the moving average of the weights (per optimizer step, not per image)."""
        return _EMA_FLOPS * self.parameters

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self) | {"image_shape": list(self.image_shape)}
        return data if self.penalty is not None else {k: v for k, v in data.items() if k != "penalty"}


_by_model: weakref.WeakKeyDictionary[nn.Module, dict[tuple[tuple[int, ...], bool], PassFlops]] = (
    weakref.WeakKeyDictionary()
)


def count(model: nn.Module, image_shape: tuple[int, ...], *, twice: bool = False) -> PassFlops:
    """FLOPs per image of `model` on images of `image_shape` (C, H, W); the model is left as it was. `twice`: with
    `penalty`.

    Counted once per model and shape. The model may live on the meta device. One that needs more than shapes (control
    flow that depends on the data, say) is counted on two black images instead, and `method` says so.
    """
    key = tuple(image_shape), twice
    by_shape = _by_model.setdefault(model, {})
    if key not in by_shape:
        by_shape[key] = _count(model, *key)
    return by_shape[key]


def of_recipe(recipe: Recipe, classes: int, image_shape: tuple[int, int, int]) -> PassFlops:
    """FLOPs per image of the recipe's model, built on the meta device; equal models share one count, which is kept."""
    return _of_part(recipe.model, classes, tuple(image_shape), recipe.differentiates_twice)


def forward_of(recipe: Recipe, classes: int, image_shape: tuple[int, int, int]) -> int:
    """`of_recipe(…).forward` some ten times sooner, for a search over sizes: a forward pass alone, on meta tensors. The
    same number for WideResNets, ConvNeXt and ViT; 0.14% more for XCiT, whose attention is counted otherwise there."""
    return _forward_of(recipe.model, classes, tuple(image_shape))


@lru_cache(maxsize=256)
def _forward_of(part: ModelPart, classes: int, image_shape: tuple[int, int, int]) -> int:
    def counted() -> dict[str, Any]:
        model = _on_meta(part, classes, image_shape).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *image_shape, device="meta"))
        return {"forward": counter.get_total_flops()}

    asked = (part.model_dump_json(exclude={"init"}), classes, image_shape)
    return int(remembered("forward", asked, ("meter/flops.py", "models"), counted)["forward"])


def _on_meta(part: ModelPart, classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    channels, side, _ = image_shape
    settings = part.model_dump(exclude={"name", "init"})
    with torch.device("meta"):
        return build(part.name, classes=classes, image_size=side, channels=channels, **settings)


@lru_cache(maxsize=256)
def _of_part(part: ModelPart, classes: int, image_shape: tuple[int, int, int], twice: bool) -> PassFlops:
    def counted() -> dict[str, Any]:
        return count(_on_meta(part, classes, image_shape), image_shape, twice=twice).to_dict()

    # Fake tensors import torch's compiler: 2 s, for the same numbers as the last time.
    asked = (part.model_dump_json(exclude={"init"}), classes, image_shape, *(["twice"] if twice else []))
    kept = remembered("flops", asked, ("meter/flops.py", "models"), counted)
    return PassFlops(**kept | {"image_shape": tuple(kept["image_shape"])})


def totals(flops: PassFlops, calls: Mapping[str, float]) -> dict[str, float]:
    """FLOPs by phase: `calls` counts image passes under names `<phase>_<pass>`, under `ema` optimizer steps, and under
    `penalty` gradients of an image that are in the loss.

    Phases are `craft`, `update`, `validation` or an attack's name; passes are `forward`, `backward` (of an update: the
    parameters; elsewhere: the input) and `full_backward` (both). The sum of the values is the exact total.
    """
    return {name: number * _per_call(flops, name) for name, number in calls.items()}


def _per_call(flops: PassFlops, name: str) -> int:
    phase, _, kind = name.rpartition("_")
    if name == "ema":
        return flops.ema
    if name == "penalty":
        assert flops.penalty is not None
        return flops.penalty
    if phase and kind == "forward":
        return flops.forward
    if phase.endswith("_full") and kind == "backward":
        return flops.full_backward
    if phase and kind == "backward":
        return flops.update_backward if phase == "update" else flops.input_backward
    raise ValueError(
        f"unknown pass {name!r} (allowed: ema, penalty, <phase>_forward, <phase>_backward, <phase>_full_backward)"
    )


def training_calls(recipe: Recipe, calls: Mapping[str, float], steps: int) -> dict[str, float]:
    """The trainer's image passes, and the moving average, which the trainer does not count: once per update of weights.

    Free-AT takes the gradient of the input and of the weights from one backward, so its update is a full one; it
    updates the weights `craft.steps` times a step.
    """
    by_name = dict(calls)
    if recipe.loss == "free-at" and "update_backward" in by_name:
        by_name["update_full_backward"] = by_name.pop("update_backward")
    if recipe.ema.decay is not None:
        by_name["ema"] = steps * (recipe.craft.steps if recipe.loss == "free-at" else 1)
    return by_name


def model_record(flops: PassFlops) -> dict[str, Any]:
    """What run.json says of the model itself."""
    data = flops.to_dict()
    return {"parameters": data.pop("parameters"), "flops_per_image": data}


def training_record(
    recipe: Recipe, flops: PassFlops, calls: Mapping[str, float], *, images: int, steps: int, energy: Energy
) -> dict[str, Any]:
    """What run.json says of the training's cost: `calls`, `images` and `steps` as in the last `EpochRecord`.

    `flops_paper` is NaN where the paper's convention says nothing of the recipe.
    """
    paper = paper_flops_of(recipe, flops.forward, images)
    return stage_record(flops, training_calls(recipe, calls, steps), energy) | {"flops_paper": paper}


def stage_record(flops: PassFlops, calls: Mapping[str, float], energy: Energy) -> dict[str, Any]:
    """FLOPs, energy and seconds of a stage as plain data; of an evaluation, `calls` are `<attack>_forward` and
    `<attack>_backward`. Money and carbon follow from it and a `Prices` record whenever a table is made."""
    by_phase = totals(flops, calls)
    return {
        "flops_exact": sum(by_phase.values()),
        "flops_by_phase": by_phase,
        "flops_how": "counted",
        "seconds": energy.seconds,
        "energy": energy.to_dict(),
    }


# -- counting ---------------------------------------------------------------------------------------------------------


def _count(model: nn.Module, shape: tuple[int, ...], twice: bool) -> PassFlops:
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    device = next((t.device for t in state.values()), torch.device("cpu"))
    on = torch.device("cpu") if device.type == "meta" else device
    try:
        # Tensors that a model holds outside its parameters and buffers are real and stay so.
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = {name: torch.empty_like(t, device=on) for name, t in state.items()}
            return _passes(model, state, fake, shape, on, "shapes alone (fake tensors)", twice)
    except RuntimeError as error:  # any fault of a fake tensor, such as a branch on its values
        if device.type == "meta":
            raise
        copies = {name: t.detach().clone() for name, t in state.items()}
        with torch.random.fork_rng(devices=[] if on.type == "cpu" else [on]):
            method = f"two real images (shapes alone are not enough: {type(error).__name__})"
            return _passes(model, state, copies, shape, on, method, twice)


def _passes(
    model: nn.Module,
    state: Mapping[str, Tensor],
    stand_ins: Mapping[str, Tensor],
    shape: tuple[int, ...],
    device: torch.device,
    method: str,
    twice: bool,
) -> PassFlops:
    learned = {id(t): t for t in state.values() if t.requires_grad}
    parameters = [stand_ins[name] for name, t in state.items() if learned.pop(id(t), None) is not None]
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    images = torch.zeros(_BATCH, *shape, device=device, dtype=dtype)

    def run(of_input: bool, of_parameters: bool) -> tuple[_Counts, _Counts, int]:
        wanted = [images] * of_input + parameters * of_parameters
        for tensor in (images, *parameters):
            tensor.requires_grad_(any(tensor is w for w in wanted))
        with torch.enable_grad(), _saved(stand_ins.values()) as saved, _Counts() as forward:
            logits = torch.func.functional_call(model, dict(stand_ins), (images,))
        with _Counts() as backward:
            if wanted and logits.requires_grad:
                torch.autograd.grad(logits.sum(), wanted, allow_unused=True)
        return forward, backward, sum(saved.values())

    def again() -> int:
        for tensor in (images, *parameters):
            tensor.requires_grad_(True)
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _Counts() as counts:
            logits = torch.func.functional_call(model, dict(stand_ins), (images,))
            loss = logits.logsumexp(1).sum()
            (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
            torch.autograd.grad(loss + gradient.abs().sum(), parameters, allow_unused=True)
        return int(counts.flops)

    _, attack, _ = run(of_input=True, of_parameters=False)
    _, full, _ = run(of_input=True, of_parameters=True)
    forward, update, saved = run(of_input=False, of_parameters=True)
    elements = forward.uncounted + update.uncounted
    work = forward.flops + update.flops + sum(elements.values())
    return PassFlops(
        forward=round(forward.flops / _BATCH),
        input_backward=round(attack.flops / _BATCH),
        update_backward=round(update.flops / _BATCH),
        full_backward=round(full.flops / _BATCH),
        parameters=sum(p.numel() for p in model.parameters()),
        activation_bytes=round(saved / _BATCH),
        image_shape=shape,
        uncounted=_shares(elements, work),
        method=method,
        penalty=round(again() / _BATCH) if twice else None,
    )


def _shares(elements: Counter[str], work: int) -> dict[str, float]:
    listed = {op: n / work for op, n in elements.most_common() if n >= _SMALLEST_SHARE * work}
    other = (sum(elements.values()) - sum(elements[op] for op in listed)) / work if work else 0.0
    return listed | ({"other": other} if other else {})


class _Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs of the ops inside, and per op without a formula the elements that it wrote."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet.__name__ in _QUERIES:
            return NotImplemented
        if packet not in flop_registry:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if packet in flop_registry:
            self.flops += _formula(packet, args, kwargs, out)
        elif not func.is_view and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            self.uncounted[packet.__name__] += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def _formula(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    flops: int = flop_registry[packet](*args, **kwargs, out_val=out)
    if packet is torch.ops.aten.convolution_backward and (groups := args[9]) > 1 and args[10][1]:
        # The weight gradient costs what the forward costs; torch's formula leaves the groups out of it.
        to_weight = flop_registry[packet](*args[:10], [False, True, False], out_val=out)
        flops -= to_weight - to_weight // groups
    return flops


@contextmanager
def _saved(stand_ins: Any) -> Iterator[dict[int, int]]:
    """Storage → bytes of what autograd keeps for the backward, without the `stand_ins`."""
    own = {t.untyped_storage()._cdata for t in stand_ins}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)  # else its address could be given to another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
