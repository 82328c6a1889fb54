"""A pre-activation network in eval mode, cheaper to attack: BatchNorm folded where it can be, weights cast once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robudget.models.preact import Block, PreActNet, SqueezeExcitation

_RELU_BACKWARD = torch.ops.aten.threshold_backward.grad_input


class Folded:
    """The same function of images as `model.eval()`, in `dtype` from the stem to the last block, without its gradients.

    The second BatchNorm of a block follows a convolution, so it becomes that convolution's scale and bias; the first
    follows a sum and stays in the forward pass, but for ReLU its scale is folded into the convolutions of the backward
    pass. Weights are copies: call `refresh` after an update of the model. Logits are float32.
    """

    def __init__(self, model: PreActNet, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._weights: dict[nn.Module, Tensor] = {}
        self._biases: dict[nn.Module, Tensor] = {}
        self._backward: dict[nn.Module, Tensor] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights and statistics as they are now."""
        self._weights[self._model.stem] = self._cast(self._model.stem.weight)
        for block in self._blocks():
            scale, shift = _scale_shift(block.bn2)
            folded = block.conv1.weight * scale[:, None, None, None]
            self._weights[block.conv1], self._biases[block.conv1] = self._cast(folded), shift.to(self._dtype)
            self._weights[block.conv2] = self._cast(block.conv2.weight)
            before, _ = _scale_shift(block.bn1)
            self._backward[block.conv1] = self._cast(folded * before[None, :, None, None])
            if block.shortcut is not None:
                self._weights[block.shortcut] = self._cast(block.shortcut.weight)
                self._backward[block.shortcut] = self._cast(block.shortcut.weight * before[None, :, None, None])
            if block.excite is not None:
                for layer in (block.excite.down, block.excite.up):
                    assert layer.bias is not None
                    self._weights[layer] = self._cast(layer.weight)
                    self._biases[layer] = layer.bias.detach().to(self._dtype)

    def __call__(self, x: Tensor) -> Tensor:
        model = self._model
        h = self._convolve(model.stem, model.normalize(x).to(self._dtype))
        for block in self._blocks():
            h = self._fast(block, h) if _is_plain(block) else self._any(block, h)
        pooled = model.act(_affine(model.bn, h)).mean((2, 3))
        return F.linear(pooled.float(), model.head.weight.detach(), model.head.bias.detach())

    def _any(self, block: Block, h: Tensor) -> Tensor:
        a = block.act1(_affine(block.bn1, h))
        skip = h if block.shortcut is None else self._convolve(block.shortcut, a)
        h = self._convolve(block.conv2, block.act2(self._convolve(block.conv1, block.pad(a))))
        return skip + (h if block.excite is None else self._excite(block.excite, h))

    def _fast(self, block: Block, h: Tensor) -> Tensor:
        shortcut = block.shortcut
        out: Tensor = _ReluBlock.apply(
            h,
            block,
            self._weights[block.conv1],
            self._biases[block.conv1],
            self._weights[block.conv2],
            self._weights[shortcut] if shortcut is not None else None,
            self._backward[block.conv1],
            self._backward[shortcut] if shortcut is not None else None,
        )
        return out

    def _excite(self, layer: SqueezeExcitation, h: Tensor) -> Tensor:
        gate = layer.act(self._convolve(layer.down, layer.pool(h)))
        return h * torch.sigmoid(self._convolve(layer.up, gate))

    def _blocks(self) -> list[Block]:
        return [block for block in self._model.blocks if isinstance(block, Block)]

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self._dtype).contiguous(memory_format=torch.channels_last)

    def _convolve(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, self._weights[layer], self._biases.get(layer), layer.stride, layer.padding)


class _ReluBlock(torch.autograd.Function):
    """A block with ReLU, gradient with respect to its input alone.

    h → a = relu(s·h + t) → z = relu(conv1(a)) → conv2(z) + (h or shortcut(a)). Backward, the mask of each ReLU is its
    own output, and the factor s has been multiplied into the weights that the gradient comes back through; so each
    activation costs one pass over memory, and h itself need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        block: Block,
        first: Tensor,
        bias: Tensor,
        second: Tensor,
        shortcut: Tensor | None,
        first_back: Tensor,
        shortcut_back: Tensor | None,
    ) -> Tensor:
        stride = block.conv1.stride[0]
        a = torch.relu_(_affine(block.bn1, h))
        z = torch.relu_(F.conv2d(a, first, bias, stride, 1))
        out = F.conv2d(z, second, None, 1, 1)
        out += h if shortcut is None else F.conv2d(a, shortcut, None, stride)
        ctx.stride = stride
        ctx.save_for_backward(a, z, second, first_back, shortcut_back)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, z, second, first_back, shortcut_back = ctx.saved_tensors
        inner = _input_gradient(gradient, z, second, 1, 1)
        _RELU_BACKWARD(inner, z, 0, grad_input=inner)
        outer = _input_gradient(inner, a, first_back, ctx.stride, 1)
        if shortcut_back is not None:
            outer += _input_gradient(gradient, a, shortcut_back, ctx.stride, 0)
        _RELU_BACKWARD(outer, a, 0, grad_input=outer)
        if shortcut_back is None:
            outer += gradient
        return outer, None, None, None, None, None, None, None


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    out: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False]
    )[0]
    return out


def _is_plain(block: Block) -> bool:
    """Can `_ReluBlock` stand for it? (ReLU, symmetric padding, nothing after the second convolution.)"""
    return isinstance(block.act1, nn.ReLU) and isinstance(block.pad, nn.Identity) and block.excite is None


def _scale_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Evaluation-mode BatchNorm as scale·x + shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _affine(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """BatchNorm by its running statistics, whatever mode the module is in."""
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps)
