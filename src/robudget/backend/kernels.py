"""Layers of the crafting copy: weights are constants, so only the input's gradient exists, and neighbours are fused.

The choice of kernel depends on shapes, device and `Arithmetic` alone, never on a timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, linear

_RELU_GRADIENT = torch.ops.aten.threshold_backward.default
_RELU_GRADIENT_IN_PLACE = torch.ops.aten.threshold_backward.grad_input
_CONVOLUTION_GRADIENT = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Arithmetic:
    """What a layer computes in. `live`: its weights are renewed after every update of the model (training), so nothing
    is prepared that pays only where they stay, and a BatchNorm that cannot be folded is torch's own."""

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    live: bool = False

    @cached_property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def arrange(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=self.layout)


@dataclass(frozen=True)
class Statistics:
    """A BatchNorm in evaluation mode: running mean and variance, weight and bias (detached), ε."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> Statistics:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        weight = torch.ones_like(mean) if norm.weight is None else norm.weight.detach()
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach()
        return cls(mean, var, weight, bias, norm.eps)

    def scale_shift(self, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """scale·x + shift, for an x that still lacks its `bias`."""
        # torch's fuse_conv_bn_weights multiplies by the reciprocal of the root, whose last bits are others than those
        # that verdicts and trainings on record were computed with.
        scale = self.weight / (self.var + self.eps).sqrt()
        return scale, (-self.mean if bias is None else bias - self.mean) * scale + self.bias


class Layer(nn.Module):
    """`compute` is the forward pass and `input_gradient` the backward pass; one autograd function serves all layers.

    With `relu` a ReLU of the output is part of the layer. `how` is set before the first use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.how = False, Arithmetic()

    def compute(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def input_gradient(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """From the gradient of the output before its ReLU. x: the input, if at hand."""
        raise NotImplementedError

    def run(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, ...]:
        """The output, and what `gradients` needs: only a ReLU's mask, which is its own output."""
        y = self.compute(x, skip)
        return (y, y) if self.relu else (y,)

    def gradients(self, g: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and of the skip."""
        if self.relu:
            g = _RELU_GRADIENT(g, saved[0], 0)
        return self.input_gradient(g), g

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        # A live layer by itself is a few operations of torch, with their own gradients.
        if self.how.live or not torch.is_grad_enabled():
            return self.compute(x, skip)
        return cast(Tensor, _LayerFunction.apply(self, x, skip))


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, x: Tensor, skip: Tensor | None) -> Tensor:
        y, *saved = layer.run(x, skip)
        ctx.layer, ctx.x, ctx.skip = layer, x.dtype, None if skip is None else skip.dtype
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[None, Tensor, Tensor | None]:
        own, skip = ctx.layer.gradients(outputs[0], *ctx.saved_tensors)
        return None, own.to(ctx.x), None if ctx.skip is None else skip.to(ctx.skip)


class Conv(Layer):
    """Convolution + bias (+ skip) (+ ReLU). `load` gives it its weights."""

    def __init__(self, source: nn.Conv2d, in_shape: tuple[int, int, int]) -> None:
        super().__init__()
        assert not isinstance(source.padding, str)
        self.stride, self.padding = list(source.stride), list(source.padding)
        self.dilation, self.groups = list(source.dilation), source.groups
        self.in_shape = in_shape
        self.weight: Tensor
        self.bias: Tensor | None = None
        self.cast: torch.dtype | None = None  # what the output is handed on in, None: as computed
        self.fused = self.loaded = False
        self.matrix: Tensor | None = None
        self.turned: Tensor | None = None

    def load(self, weight: Tensor, bias: Tensor | None, gradient_scale: Tensor | None = None) -> None:
        """Take these float32 weights. `gradient_scale` (input channels) multiplies the gradient of the input: the scale
        of a BatchNorm before, which costs nothing here and a pass over memory of its own there."""
        how = self.how
        scaled = None if gradient_scale is None else weight.detach() * gradient_scale.view(1, -1, 1, 1)
        if self.loaded:  # in place, since a graph reads them where they lie
            self.weight.copy_(weight.detach())
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias.detach())
            if scaled is not None:
                self.gradient_weight.copy_(scaled)
            return
        self.loaded = True
        self.weight = how.arrange(weight.detach().to(how.dtype, copy=how.live))
        self.bias = None if bias is None else bias.detach().to(how.dtype, copy=how.live)
        self.gradient_weight: Tensor = self.weight if scaled is None else how.arrange(scaled.to(how.dtype))
        if not how.live:
            self._prepare()

    def _prepare(self) -> None:
        """Kernels that take their time to make, so only for weights that stay."""
        self.fused = self.how.channels_last and _fuses(self.weight)
        out, _, k, _ = self.weight.shape
        c, h, w = self.in_shape
        s, p = self.stride[0], self.padding[0]
        plain = (
            self.groups == 1
            and self.dilation == [1, 1]
            and self.weight.shape[2] == self.weight.shape[3]
            and self.stride[0] == self.stride[1]
            and self.padding[0] == self.padding[1]
            and p < k
        )
        h2, w2 = (h + 2 * p - k) // s + 1, (w + 2 * p - k) // s + 1
        self.out_shape = (out, h2, w2)
        contiguous = self.how.dtype == torch.float32 and not self.how.channels_last
        on_cpu = plain and contiguous and self.weight.device.type == "cpu"
        # Over a few pixels a 3×3 convolution is nearly a full matrix: `dense` times the multiplications, but none
        # of a convolution's overhead, which counts while channels are few, most of all backward through a stride.
        dense = h * w / (k * k)
        self.by_matrix = dense <= 1 or (dense <= 2 and c * out <= 128)
        self.gradient_by_matrix = dense <= 1 or (dense <= 2 and s > 1 and c * out <= 512)
        if on_cpu and (self.by_matrix or self.gradient_by_matrix):
            eye = torch.eye(c * h * w, device=self.weight.device).view(-1, c, h, w)
            self.matrix = conv2d(eye, self.weight, None, self.stride, self.padding).flatten(1).T.contiguous()
            self.bias_by_pixel = None if self.bias is None else self.bias.repeat_interleave(h2 * w2)
        # Backward is a convolution with the turned kernel. Through a stride the library's own backward is several times
        # slower than that one on a gradient spread out with zeros, unless it runs channels-last.
        if plain and (s == 1 or on_cpu):
            self.turned = self.how.arrange(self.weight.flip(2, 3).transpose(0, 1))
            self.extra = (h - ((h2 - 1) * s - 2 * p + k), w - ((w2 - 1) * s - 2 * p + k))

    def compute(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.how.arrange(x.to(self.weight.dtype))
        fused = self.fused and self.relu and skip is None
        if fused:
            y = _pointwise(x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, "relu")
        elif self.matrix is not None and self.by_matrix:
            y = linear(x.flatten(1), self.matrix, self.bias_by_pixel).view(len(x), *self.out_shape)
        else:
            y = conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if skip is not None:
            y = y.add_(skip)
        if self.relu and not fused:
            y = y.relu_()
        return y if self.cast is None else y.to(self.cast)

    def input_gradient(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        g = g.to(self.weight.dtype)
        if self.matrix is not None and self.gradient_by_matrix:
            return (g.flatten(1) @ self.matrix).view(len(g), *self.in_shape)
        if self.turned is not None:
            return self._by_turned(g, self.turned)
        # The input's values do not matter to its own gradient; only its shape and layout are read.
        if x is None:
            x = torch.empty(len(g), *self.in_shape, dtype=g.dtype, device=g.device, memory_format=self.how.layout)
        geometry = self.stride, self.padding, self.dilation, False, [0, 0], self.groups
        out: Tensor = _CONVOLUTION_GRADIENT(
            self.how.arrange(g), x, self.gradient_weight, None, *geometry, [True, False, False]
        )[0]
        return out

    def _by_turned(self, g: Tensor, turned: Tensor) -> Tensor:
        s, p, k = self.stride[0], self.padding[0], self.weight.shape[2]
        if s == 1:
            return conv2d(self.how.arrange(g), turned, None, 1, k - 1 - p)
        if k == 1:
            wide = g.new_zeros(len(g), *self.in_shape)
            wide[:, :, ::s, ::s] = conv2d(g, turned)
            return wide
        c, h2, w2 = self.out_shape
        sparse = g.new_zeros(len(g), c, (h2 - 1) * s + 1 + self.extra[0], (w2 - 1) * s + 1 + self.extra[1])
        sparse[:, :, : (h2 - 1) * s + 1 : s, : (w2 - 1) * s + 1 : s] = g
        return conv2d(sparse, turned, None, 1, k - 1 - p)


class Norm(Layer):
    """BatchNorm in evaluation mode (+ ReLU), where no convolution before it can take it in."""

    def load(self, source: nn.Module) -> None:
        """Take the weights and running statistics of a BatchNorm."""
        self.statistics = Statistics.of(source)
        self.scale, shift = self.statistics.scale_shift()
        self.kernel: tuple[Tensor, Tensor] | None = None
        # In bfloat16 torch's own elementwise kernels are slower than a convolution with one 1×1 kernel per channel.
        if self.how.channels_last and self.how.dtype == torch.bfloat16 and not self.how.live and _fuses(shift):
            self.kernel = self.scale.view(-1, 1, 1, 1).to(self.how.dtype), shift.to(self.how.dtype)

    def compute(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.kernel is not None and x.dtype == self.how.dtype:
            return self._by_kernel(x, self.kernel[1], "relu" if self.relu else "none")
        s = self.statistics
        y = batch_norm(x, s.mean, s.var, s.weight, s.bias, False, 0.0, s.eps)
        return y.relu_() if self.relu else y

    def input_gradient(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        if self.kernel is not None and g.dtype == self.how.dtype:
            return self._by_kernel(g, None, "none")
        return g * self.scale.view(1, -1, 1, 1).to(self.how.dtype)

    def _by_kernel(self, x: Tensor, shift: Tensor | None, then: str) -> Tensor:
        assert self.kernel is not None
        scale = self.kernel[0]
        return _pointwise(self.how.arrange(x), scale, shift, [0, 0], [1, 1], [1, 1], len(scale), then)


class Residual(Layer):
    """h → a = relu(norm(h)) → z = relu(first(a)) → second(z) + (h or shortcut(a)): a whole pre-activation block.

    One step for autograd instead of four, and both masks are applied in place. In a live copy the scale of `norm` has
    been multiplied into the weights that the gradient comes back through.
    """

    def __init__(self, norm: Norm, first: Conv, second: Conv, shortcut: Conv | None) -> None:
        super().__init__()
        self.parts = norm, first, second, shortcut  # not registered as submodules, whose look-up takes time

    def run(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, ...]:
        norm, first, second, shortcut = self.parts
        a = norm.compute(x)
        z = first.compute(a)
        y = second.compute(z)
        y += x if shortcut is None else shortcut.compute(a)
        return y, a, z

    def gradients(self, g: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        (norm, first, second, shortcut), (a, z) = self.parts, saved
        inner = second.input_gradient(g, z).to(z.dtype)
        _RELU_GRADIENT_IN_PLACE(inner, z, 0, grad_input=inner)
        outer = first.input_gradient(inner, a).to(a.dtype)
        if shortcut is not None:
            outer += shortcut.input_gradient(g, a)
        _RELU_GRADIENT_IN_PLACE(outer, a, 0, grad_input=outer)
        if not norm.how.live:
            outer = norm.input_gradient(outer)
        if shortcut is None:
            outer += g
        return outer, g

    def compute(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.run(x, skip)[0]


class Float(nn.Module):
    """Back to float32, for the few numbers that decide margins."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def _fuses(t: Tensor) -> bool:
    """Can oneDNN apply the ReLU while it writes the convolution's output? (Private to torch, so asked for by name.)"""
    return t.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _pointwise(*arguments: Any) -> Tensor:
    """x, weight, bias, padding, stride, dilation, groups, "relu" or "none": all in one pass over the output."""
    return cast(Tensor, torch.ops.mkldnn._convolution_pointwise(*arguments, [], ""))
