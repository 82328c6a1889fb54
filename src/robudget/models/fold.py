"""A pre-activation network in eval mode, cheaper to attack: BatchNorm folded where it can be, weights cast once."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from robudget.models.preact import Block, PreActNet, SqueezeExcitation


class Folded:
    """The same function of images as `model.eval()`, in `dtype` from the stem to the last block, without its gradients.

    The second BatchNorm of a block follows a convolution, so it becomes that convolution's scale and bias; the first
    follows a sum and stays. Weights are copies: call `refresh` after an update of the model. Logits are float32.
    """

    def __init__(self, model: PreActNet, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._weights: dict[nn.Module, Tensor] = {}
        self._biases: dict[nn.Module, Tensor] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        self._weights[self._model.stem] = self._cast(self._model.stem.weight)
        for block in self._blocks():
            norm = block.bn2
            assert norm.running_var is not None
            assert norm.running_mean is not None
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            self._weights[block.conv1] = self._cast(block.conv1.weight * scale[:, None, None, None])
            self._biases[block.conv1] = (norm.bias - norm.running_mean * scale).to(self._dtype)
            self._weights[block.conv2] = self._cast(block.conv2.weight)
            if block.shortcut is not None:
                self._weights[block.shortcut] = self._cast(block.shortcut.weight)
            if block.excite is not None:
                for layer in (block.excite.down, block.excite.up):
                    assert layer.bias is not None
                    self._weights[layer] = self._cast(layer.weight)
                    self._biases[layer] = layer.bias.detach().to(self._dtype)

    def __call__(self, x: Tensor) -> Tensor:
        model = self._model
        h = self._convolve(model.stem, model.normalize(x).to(self._dtype))
        for block in self._blocks():
            a = block.act1(_affine(block.bn1, h))
            skip = h if block.shortcut is None else self._convolve(block.shortcut, a)
            h = self._convolve(block.conv2, block.act2(self._convolve(block.conv1, block.pad(a))))
            h = skip + (h if block.excite is None else self._excite(block.excite, h))
        pooled = model.act(_affine(model.bn, h)).mean((2, 3))
        return F.linear(pooled.float(), model.head.weight.detach(), model.head.bias.detach())

    def _excite(self, layer: SqueezeExcitation, h: Tensor) -> Tensor:
        gate = layer.act(self._convolve(layer.down, layer.pool(h)))
        return h * torch.sigmoid(self._convolve(layer.up, gate))

    def _blocks(self) -> list[Block]:
        return [block for block in self._model.blocks if isinstance(block, Block)]

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self._dtype).contiguous(memory_format=torch.channels_last)

    def _convolve(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, self._weights[layer], self._biases.get(layer), layer.stride, layer.padding)


def _affine(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """BatchNorm by its running statistics, whatever mode the module is in."""
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps)
