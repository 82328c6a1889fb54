"""A copy of a model in evaluation mode with BatchNorm folded and neighbours fused (torch.fx), for crafting only."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from robudget.backend.kernels import Conv, Float, Norm

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_)
_POOLS = (functional.adaptive_avg_pool2d, functional.avg_pool2d, torch.mean)


def fold(model: nn.Module, x: Tensor, dtype: torch.dtype, channels_last: bool) -> nn.Module:
    """The copy, computing in `dtype` but for its first convolution, pooling and head. x: a few images.

    What cannot be traced or fused raises some exception of torch; the caller compares answers before it trusts them.
    """
    traced = fx.symbolic_trace(copy.deepcopy(model).eval())
    _Shapes(traced).run(x)
    modules = dict(traced.named_modules())
    graph = traced.graph
    layers: dict[fx.Node, nn.Module] = {}

    def put(node: fx.Node, layer: nn.Module) -> None:
        name = f"fused_{len(layers)}"
        traced.add_submodule(name, layer)
        node.target, node.kwargs = name, {}
        layers[node] = layer

    for node in list(graph.nodes):
        source = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(source, nn.Conv2d) and source.padding_mode == "zeros" and not isinstance(source.padding, str):
            put(node, Conv(source, source.weight, source.bias, _shape(node.args[0])))
        elif isinstance(source, nn.BatchNorm2d) and source.track_running_stats and source.running_var is not None:
            before = node.args[0]
            norm = Norm(source)
            conv = layers.get(before)
            if isinstance(conv, Conv) and not conv.relu and len(before.users) == 1 and len(before.args) == 1:
                _absorb(conv, norm)
                node.replace_all_uses_with(before)
                graph.erase_node(node)
            else:
                put(node, norm)
        elif _is_relu(node, modules):
            before = node.args[0]
            if isinstance(layers.get(before), (Conv, Norm)) and len(before.users) == 1:
                layers[before].relu = True  # type: ignore[assignment]
                node.replace_all_uses_with(before)
                graph.erase_node(node)
        elif _is_addition(node):
            _fuse_addition(node, layers, graph)
    convolutions = sum(isinstance(layer, Conv) for layer in layers.values())
    if dtype != torch.float32 and sum(isinstance(m, nn.Linear) for m in modules.values()) > convolutions:
        raise NotImplementedError("the work is in linear layers, which stay in float32 here")
    _set_precision(graph, layers, modules, dtype, channels_last, traced)
    graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()
    for parameter in traced.parameters():
        parameter.requires_grad_(False)
    return traced


def _absorb(conv: Conv, norm: Norm) -> None:
    """conv followed by norm is a convolution with scaled weights and another bias."""
    scale = norm.weight / (norm.var + norm.eps).sqrt()
    bias = torch.zeros_like(norm.mean) if conv.bias is None else conv.bias
    conv.weight = conv.weight * scale.view(-1, 1, 1, 1)
    conv.bias = (bias - norm.mean) * scale + norm.bias


def _fuse_addition(node: fx.Node, layers: dict[fx.Node, nn.Module], graph: fx.Graph) -> None:
    """a + conv(b) → conv(b, skip=a), where only the sum reads the convolution's output."""
    left, right = node.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    order = list(graph.nodes)
    # The later of the two can take the other one as its skip; the earlier cannot.
    first, second = sorted((left, right), key=order.index)
    layer = layers.get(second)
    if isinstance(layer, Conv) and not layer.relu and len(second.users) == 1 and len(second.args) == 1:
        second.args = (*second.args, first)
        node.replace_all_uses_with(second)
        graph.erase_node(node)


def _set_precision(
    graph: fx.Graph,
    layers: dict[fx.Node, nn.Module],
    modules: dict[str, Any],
    dtype: torch.dtype,
    channels_last: bool,
    traced: fx.GraphModule,
) -> None:
    low = dtype != torch.float32
    first = True
    for node in list(graph.nodes):
        layer = layers.get(node)
        if isinstance(layer, Conv):
            # The image itself is not rounded: bfloat16 has 8 bits, and so do its pixels, but ε does not fall on them.
            layer.prepare(torch.float32 if first else dtype, channels_last, dtype if first and low else None)
            first = False
        elif isinstance(layer, Norm):
            layer.prepare(torch.float32 if first else dtype, channels_last)
        elif low and _wants_float(node, modules):
            with graph.inserting_before(node):
                traced.add_submodule(f"float_{node.name}", Float())
                wide = graph.call_module(f"float_{node.name}", (node.args[0],))
            node.args = (wide, *node.args[1:])


def _wants_float(node: fx.Node, modules: dict[str, Any]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Linear))
    return (node.op == "call_function" and node.target in _POOLS) or (
        node.op == "call_method" and node.target == "mean"
    )


def _is_relu(node: fx.Node, modules: dict[str, Any]) -> bool:
    if node.op == "call_module":
        return isinstance(modules.get(str(node.target)), nn.ReLU)
    return (node.op == "call_function" and node.target in _RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _is_addition(node: fx.Node) -> bool:
    if not (node.op == "call_function" and node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs):
        return False
    left, right = node.args
    both = isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right
    return both and _shape(left) == _shape(right)


def _shape(node: Any) -> Any:
    return node.meta.get("shape")


class _Shapes(fx.Interpreter):
    """Runs a graph and notes each tensor's shape, the batch left out."""

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["shape"] = tuple(out.shape[1:])
        return out
