"""A copy of a model in evaluation mode that is cheaper to attack: BatchNorm folded, neighbours fused (torch.fx)."""

from __future__ import annotations

import copy
import io
import operator
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from robudget.attacks.victim import Model
from robudget.backend.kernels import Arithmetic, Conv, Float, Layer, Norm, Residual, Statistics

Node = Any  # an fx.Node, whose arguments are typed as a union of everything that a graph may hold

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_)
_POOLS = (functional.adaptive_avg_pool2d, functional.avg_pool2d, torch.mean)


@dataclass
class _Source:
    """Where a layer's weights come from: a BatchNorm, or a convolution and the BatchNorms folded into it. The gradient
    of a convolution's input is to be multiplied by the scale of `before`."""

    module: Any
    folded: list[nn.Module] = field(default_factory=list)
    before: Norm | None = None


class Folded(nn.Module):
    """The same function of images as `model` in evaluation mode; gradients reach the images alone.

    A BatchNorm after a convolution becomes that convolution's scale and bias. x: a few images (N, C, H, W), for their
    shapes. What cannot be traced or fused raises some exception of torch.

    `how.live` (training): the copy follows the model, which is in evaluation mode whenever this is called; `refresh` it
    after every update. Else (evaluation) it is independent of the model, and in low precision its first convolution,
    pooling and head compute in float32: the image is not rounded (bfloat16 has 8 bits, and so do its pixels, but ε does
    not fall on them), and margins are few numbers. What training crafts decides no verdict: there only the head does.
    """

    def __init__(self, model: nn.Module, x: Tensor, how: Arithmetic) -> None:
        super().__init__()
        if not how.live:
            model = copy.deepcopy(model).eval().requires_grad_(False)
        self._how = how
        self.traced = fx.GraphModule(model, _Tracer().trace(model))
        self._named = dict(self.traced.named_modules())
        self._layers: dict[Node, Layer] = {}
        self._sources: dict[Layer, _Source] = {}
        with torch.no_grad():
            _Shapes(self.traced).run(x)
        for node in self._nodes():
            self._fuse(node)
        self._set_precision()
        for node in self._nodes():
            self._fuse_block(node)
        self.refresh()
        if not how.live:
            self._sources.clear()
        self._named.clear()
        self._layers.clear()
        self.traced.graph.lint()
        self.traced.delete_all_unused_submodules()
        self.traced.recompile()
        self.forward = self.traced.forward  # the call of a module within a module takes time

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights and statistics as they are now."""
        for layer, source in self._sources.items():
            if isinstance(layer, Norm):
                layer.load(source.module)
            elif isinstance(layer, Conv):
                weight, bias = source.module.weight, source.module.bias
                for norm in source.folded:
                    scale, bias = Statistics.of(norm).scale_shift(bias)
                    weight = weight * scale.view(-1, 1, 1, 1)
                layer.load(weight, bias, None if source.before is None else source.before.scale)

    # -- fusing ----------------------------------------------------------------------------------------------------

    def _fuse(self, node: Node) -> None:
        """Convolution + BatchNorm + skip + ReLU, or BatchNorm + ReLU, into one layer, as far as only it reads them."""
        before: Node = node.args[0] if node.args else None
        source = self._named.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(source, nn.Conv2d) and source.padding_mode == "zeros" and not isinstance(source.padding, str):
            self._put(node, Conv(source, _shape(before)), source)
        elif isinstance(source, (nn.BatchNorm2d, nn.SyncBatchNorm)) and source.track_running_stats:
            conv = self._layers.get(before)
            # The first BatchNorm of a live copy stays where it is: its block is then a whole one.
            stays = self._how.live and len(self._sources) == 1
            if isinstance(conv, Conv) and not conv.relu and _read_once(before) and len(before.args) == 1 and not stays:
                self._sources[conv].folded.append(source)
                self._replace(node, before)
            else:
                self._put(node, Norm(), source)
        elif isinstance(source, nn.Identity):
            self._replace(node, before)
        elif self._is_relu(node):
            if before in self._layers and _read_once(before):
                self._layers[before].relu = True
                self._replace(node, before)
        elif _is_addition(node):
            # The later of the two can take the other one as its skip; the earlier cannot.
            first, second = sorted(node.args, key=self._nodes().index)
            layer = self._layers.get(second)
            if isinstance(layer, Conv) and not layer.relu and _read_once(second) and len(second.args) == 1:
                second.args = (*second.args, first)
                self._replace(node, second)

    def _fuse_block(self, node: Node) -> None:
        """A whole pre-activation block into one layer, where no other reads what is inside."""
        second = self._layers.get(node)
        if not isinstance(second, Conv) or second.relu or len(node.args) != 2:
            return
        z, skip = node.args
        first = self._layers.get(z)
        if not isinstance(first, Conv) or not first.relu or len(z.args) > 1 or not _read_once(z):
            return
        a = z.args[0]
        norm, shortcut = self._layers.get(a), self._layers.get(skip)
        if not isinstance(norm, Norm) or not norm.relu or not set(a.users) <= {z, skip}:
            return
        if skip is a.args[0]:
            shortcut = None
        elif not isinstance(shortcut, Conv) or shortcut.relu or skip.args != (a,) or not _read_once(skip):
            return
        self._put(node, Residual(norm, first, second, shortcut))
        node.args = (a.args[0],)
        for inner in (z, a) if shortcut is None else (z, skip, a):
            self.traced.graph.erase_node(inner)
        if self._how.live:
            for conv in (first, shortcut) if shortcut else (first,):
                self._sources[conv].before = norm

    def _put(self, node: Node, layer: Layer, source: nn.Module | None = None) -> None:
        name = f"fused_{len(self._layers)}_{node.name}"
        self.traced.add_submodule(name, layer)
        node.target, node.kwargs, self._layers[node] = name, {}, layer
        if source is not None:
            self._sources[layer] = _Source(source)

    def _replace(self, node: Node, by: Node) -> None:
        node.replace_all_uses_with(by)
        self.traced.graph.erase_node(node)

    def _nodes(self) -> list[Node]:
        return list(self.traced.graph.nodes)

    # -- precision -------------------------------------------------------------------------------------------------

    def _set_precision(self) -> None:
        how, low, first = self._how, self._how.dtype != torch.float32, not self._how.live
        convolutions = sum(isinstance(layer, Conv) for layer in self._layers.values())
        if low and sum(isinstance(m, nn.Linear) for m in self._named.values()) > convolutions:
            raise NotImplementedError("the work is in linear layers, which stay in float32 here")
        for node in self._nodes():
            layer = self._layers.get(node)
            if layer is not None:
                layer.how = replace(how, dtype=torch.float32) if first else how
                if isinstance(layer, Conv):
                    layer.cast, first = how.dtype if first and low else None, False
            elif low and self._wants_float(node):
                with self.traced.graph.inserting_before(node):
                    self.traced.add_submodule(f"float_{node.name}", Float())
                    wide = self.traced.graph.call_module(f"float_{node.name}", (node.args[0],))
                node.args = (wide, *node.args[1:])

    def _wants_float(self, node: Node) -> bool:
        if node.op == "call_module":
            float_modules = (nn.Linear,) if self._how.live else (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Linear)
            return isinstance(self._named[str(node.target)], float_modules)
        return not self._how.live and _calls(node, _POOLS, "mean")

    def _is_relu(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._named.get(str(node.target)), nn.ReLU)
        return _calls(node, _RELUS, "relu", "relu_")


def _read_once(node: Node) -> bool:
    return len(node.users) == 1


def _calls(node: Node, functions: tuple[Any, ...], *methods: str) -> bool:
    return node.target in {"call_function": functions, "call_method": methods}.get(node.op, ())


def _is_addition(node: Node) -> bool:
    if not _calls(node, _ADDITIONS) or len(node.args) != 2 or node.kwargs:
        return False
    left, right = node.args
    both = isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right
    return both and _shape(left) == _shape(right)


def _shape(node: Node) -> Any:
    return node.meta.get("shape")


class _Tracer(fx.Tracer):
    """Looks into everything but torch's own layers and BatchNorms with nothing inside (training has one of its own)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        norm = isinstance(m, nn.modules.batchnorm._BatchNorm) and not list(m.children())
        return norm or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Runs a graph and notes each tensor's shape, the batch left out."""

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["shape"] = tuple(out.shape[1:])
        return out


# -- the copy that an evaluation attacks ------------------------------------------------------------------------------


def crafting_copy(model: Model, x: Tensor, precision: str) -> Model:
    """The cheapest copy whose answers agree with the model's on images x (N, C, H, W), or the model itself.

    Successes are verified on the model as given whatever this returns; a copy that agreed on no more than x would cost
    attack strength, never a false success.
    """
    if not isinstance(model, nn.Module):
        return model
    low = precision == "bfloat16"
    dtype = torch.bfloat16 if low else torch.float32
    channels_last = x.shape[2] * x.shape[3] >= 256
    truth = _answers(model, x)
    # Rounding moves a few ReLUs across zero, which shows in gradients long before it does in logits.
    tolerance = (0.03, 0.3) if low else (1e-3, 1e-2)
    try:
        # A traced graph prints what fails in it; here a failure only means that the model is run as it is.
        with redirect_stderr(io.StringIO()):
            folded = Folded(model, x[:2], Arithmetic(dtype, channels_last))
            agrees = _agree(_answers(folded, x), truth, tolerance)
    # The code of a model from elsewhere can fail in any way when it is traced; the model itself always works.
    except Exception:
        agrees = False
    if agrees:
        return folded
    return _autocast(model, x.device.type) if low else model


def _autocast(model: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            z: Tensor = model(x.contiguous(memory_format=torch.channels_last))
        return z

    return call


def _answers(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and a gradient of x; few images at a time, since it is not known yet how many fit into memory."""
    logits, gradients = [], []
    for part in x.split(8):  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            z = model(leaf).float()
            (gradient,) = torch.autograd.grad((z - z.detach().mean(1, keepdim=True)).square().sum(), leaf)
        logits.append(z.detach())
        gradients.append(gradient)
    return torch.cat(logits), torch.cat(gradients)


def _agree(answers: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], tolerances: tuple[float, float]) -> bool:
    for answer, true, tolerance in zip(answers, truth, tolerances, strict=True):
        error = (answer - true).flatten(1).norm(dim=1)
        size = true.flatten(1).norm(dim=1)
        if not bool((error <= tolerance * size + 1e-12).float().mean() > 0.9):
            return False
    return True
