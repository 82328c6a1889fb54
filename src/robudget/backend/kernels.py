"""Layers of the crafting copy: weights are constants, so only the input's gradient exists, and what can be fused is.

Each layer is a module with one autograd function. Backward passes need no inputs of the forward pass but the signs of
its ReLU. The choice of kernel depends on shapes and device alone, never on a timing.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d

CHANNELS_LAST = torch.channels_last


def fuses(t: Tensor) -> bool:
    """Can oneDNN apply the ReLU while it writes the convolution's output? (Private to torch, so asked for by name.)"""
    return t.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: tuple[list[int], list[int], list[int]],
    groups: int,
    *,
    relu: bool,
) -> Tensor:
    """Convolution, bias and ReLU in one pass over the output; `how` is padding, stride, dilation."""
    call = torch.ops.mkldnn._convolution_pointwise
    return cast(Tensor, call(x, weight, bias, *how, groups, "relu" if relu else "none", [], ""))


class Conv(nn.Module):
    """Convolution + bias (+ skip) (+ ReLU), as one step forward and one back."""

    def __init__(self, source: nn.Conv2d, weight: Tensor, bias: Tensor | None, in_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = _ints(source)
        self.relu = False
        self.in_shape = in_shape
        self.cast: torch.dtype | None = None
        self.weight = weight.detach().clone()
        self.bias = None if bias is None else bias.detach().clone()
        self.last = False

    def prepare(self, dtype: torch.dtype, channels_last: bool, cast: torch.dtype | None) -> None:
        """Fix the arithmetic: weights in `dtype`, output handed on in `cast` (None: as computed)."""
        self.cast, self.last = cast, channels_last
        self.weight = self._laid(self.weight.to(dtype))
        self.bias = None if self.bias is None else self.bias.to(dtype)
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
        self.fused = channels_last and fuses(self.weight)
        on_cpu = plain and dtype == torch.float32 and self.weight.device.type == "cpu" and not channels_last
        # A few pixels seen by a 3×3 window are a matrix in all but name: `dense` times the multiplications, but none
        # of a convolution's overhead, which counts while channels are few, most of all backward through a stride.
        dense = h * w / (k * k)
        self.matrix: Tensor | None = None
        self.flipped: Tensor | None = None
        self.by_matrix = dense <= 1 or (dense <= 2 and c * out <= 128)
        self.pull_by_matrix = dense <= 1 or (dense <= 2 and s > 1 and c * out <= 512)
        if on_cpu and (self.by_matrix or self.pull_by_matrix):
            eye = torch.eye(c * h * w, device=self.weight.device).view(-1, c, h, w)
            self.matrix = conv2d(eye, self.weight, None, self.stride, self.padding).flatten(1).T.contiguous()
            self.spread = None if self.bias is None else self.bias.repeat_interleave(h2 * w2)
        # Backward is a convolution with the turned kernel. Through a stride the library's own backward is several times
        # slower than that one on a gradient spread out with zeros, unless it runs channels-last.
        if plain and (s == 1 or on_cpu):
            self.flipped = self._laid(self.weight.flip(2, 3).transpose(0, 1))
            self.extra = (h - ((h2 - 1) * s - 2 * p + k), w - ((w2 - 1) * s - 2 * p + k))

    def _laid(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=CHANNELS_LAST) if self.last else t.contiguous()

    def compute(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.relu and skip is None and self.fused:
            y = fused_convolution(
                self._laid(x),
                self.weight,
                self.bias,
                (self.padding, self.stride, self.dilation),
                self.groups,
                relu=True,
            )
            return y if self.cast is None else y.to(self.cast)
        if self.matrix is not None and self.by_matrix:
            y = nn.functional.linear(x.flatten(1), self.matrix, self.spread).view(len(x), *self.out_shape)
        else:
            y = conv2d(self._laid(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if skip is not None:
            y = y.add_(skip)
        if self.relu:
            y = y.relu_()
        return y if self.cast is None else y.to(self.cast)

    def pull(self, g: Tensor, n: int) -> Tensor:
        """The gradient of the input from the gradient of convolution's output."""
        g = g.to(self.weight.dtype)
        if self.matrix is not None and self.pull_by_matrix:
            return (g.flatten(1) @ self.matrix).view(n, *self.in_shape)
        if self.flipped is not None:
            return self._pull_flipped(g, n)
        # The input's values do not matter to its own gradient; only its shape and layout are read.
        layout = CHANNELS_LAST if self.last else torch.contiguous_format
        x = torch.empty(n, *self.in_shape, dtype=g.dtype, device=g.device, memory_format=layout)
        grads = torch.ops.aten.convolution_backward(
            self._laid(g),
            x,
            self.weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            [True, False, False],
        )
        return cast(Tensor, grads[0])

    def _pull_flipped(self, g: Tensor, n: int) -> Tensor:
        assert self.flipped is not None
        s, p, k = self.stride[0], self.padding[0], self.weight.shape[2]
        if s == 1:
            return conv2d(self._laid(g), self.flipped, None, 1, k - 1 - p)
        if k == 1:
            wide = g.new_zeros(n, *self.in_shape)
            wide[:, :, ::s, ::s] = conv2d(g, self.flipped)
            return wide
        c, h2, w2 = self.out_shape
        sparse = g.new_zeros(n, c, (h2 - 1) * s + 1 + self.extra[0], (w2 - 1) * s + 1 + self.extra[1])
        sparse[:, :, : (h2 - 1) * s + 1 : s, : (w2 - 1) * s + 1 : s] = g
        return conv2d(sparse, self.flipped, None, 1, k - 1 - p)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.compute(x, skip)
        return cast(Tensor, _ConvFunction.apply(x, skip, self))


class _ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor | None, layer: Conv) -> Tensor:
        y = layer.compute(x, skip)
        ctx.layer, ctx.n, ctx.dtype = layer, len(x), x.dtype
        ctx.skip = None if skip is None else skip.dtype
        ctx.save_for_backward(y if layer.relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (y,) = ctx.saved_tensors
        g = grads[0] if y is None else torch.ops.aten.threshold_backward(grads[0], y, 0)
        own = ctx.layer.pull(g, ctx.n).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return own, None if ctx.skip is None else g.to(ctx.skip), None


class Norm(nn.Module):
    """BatchNorm in evaluation mode (+ ReLU): a scale and a shift per channel."""

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, var = source.running_mean, source.running_var
        assert mean is not None
        assert var is not None
        weight = torch.ones_like(mean) if source.weight is None else source.weight
        bias = torch.zeros_like(mean) if source.bias is None else source.bias
        self.mean, self.var = mean.detach().clone(), var.detach().clone()
        self.weight, self.bias = weight.detach().clone(), bias.detach().clone()
        self.eps = source.eps
        self.relu = False

    def prepare(self, dtype: torch.dtype, channels_last: bool) -> None:
        scale = self.weight / (self.var + self.eps).sqrt()
        self.scale = scale.view(1, -1, 1, 1).to(dtype)
        self.last = channels_last
        # In bfloat16 torch's own elementwise kernels are slower than a convolution with one 1×1 kernel per channel.
        self.kernel: tuple[Tensor, Tensor] | None = None
        if channels_last and dtype == torch.bfloat16 and fuses(self.scale):
            shift = self.bias - self.mean * scale
            self.kernel = scale.view(-1, 1, 1, 1).to(dtype), shift.to(dtype)

    def compute(self, x: Tensor) -> Tensor:
        if self.kernel is not None and x.dtype == self.kernel[0].dtype:
            return self._by_kernel(x, self.kernel[1], self.relu)
        y = batch_norm(x, self.mean, self.var, self.weight, self.bias, False, 0.0, self.eps)
        return y.relu_() if self.relu else y

    def _by_kernel(self, x: Tensor, shift: Tensor | None, relu: bool) -> Tensor:
        assert self.kernel is not None
        x, scale = x.contiguous(memory_format=CHANNELS_LAST), self.kernel[0]
        return fused_convolution(x, scale, shift, ([0, 0], [1, 1], [1, 1]), len(scale), relu=relu)

    def pull(self, g: Tensor) -> Tensor:
        """The gradient of the input from that of the scaled and shifted output."""
        if self.kernel is not None and g.dtype == self.kernel[0].dtype:
            return self._by_kernel(g, None, False)
        return g * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.compute(x)
        return cast(Tensor, _NormFunction.apply(x, self))


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Norm) -> Tensor:
        y = layer.compute(x)
        ctx.layer = layer
        ctx.save_for_backward(y if layer.relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        g = grads[0] if y is None else torch.ops.aten.threshold_backward(grads[0], y, 0)
        return ctx.layer.pull(g), None


class Float(nn.Module):
    """Back to float32, before pooling and the head: their few numbers decide margins."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def _ints(conv: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    padding = conv.padding
    assert not isinstance(padding, str)
    return list(conv.stride), list(padding), list(conv.dilation), conv.groups
