"""Pre-activation WideResNets (Zagoruyko & Komodakis 2016) and the DeepMind variant of Gowal et al. 2020.

`original` pads every 3×3 convolution by one pixel on each side and keeps BatchNorm's running statistics with momentum
0.1. `deepmind` pads strided convolutions as TensorFlow's SAME does (one pixel right and below only) and uses momentum
0.01. Parameters are the same for both.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from robudget.errors import InputError, unknown
from robudget.models.layers import ACTIVATIONS, Normalize, kaiming
from robudget.models.memory import run_block

Variant = Literal["original", "deepmind"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


class Block(nn.Module):
    """Two 3×3 convolutions, each after BatchNorm and activation, plus a shortcut taken after the first activation."""

    def __init__(self, c_in: int, c_out: int, stride: int, activation: type[nn.Module], variant: Variant) -> None:
        super().__init__()
        momentum = 0.1 if variant == "original" else 0.01
        same_padding = variant == "deepmind" and stride != 1
        self.bn1 = nn.BatchNorm2d(c_in, momentum=momentum)
        self.act1 = activation()
        # A strided SAME convolution of an even-sized image reads one pixel more on the right and below, none before.
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if same_padding else nn.Identity()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=0 if same_padding else 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out, momentum=momentum)
        self.act2 = activation()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, padding=1, bias=False)
        same = c_in == c_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        h = self.act2(self.bn2(self.conv1(self.pad(h))))
        out: Tensor = self.conv2(h) + skip
        return out


class WideResNet(nn.Module):
    """Images (N, channels, H, W) in [0, 1] to logits (N, classes).

    `depth` is 6n + 4 with n blocks in each of three stages of base·width, 2·base·width and 4·base·width channels, the
    last two at half the resolution of the one before. `checkpointing` recomputes a block's activations in the
    backward pass instead of keeping them: less memory for about a third more work.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        classes: int,
        normalize: Normalize,
        channels: int = 3,
        activation: str = "relu",
        variant: str = "original",
        base: int = 16,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            near = max(10, 6 * round((depth - 4) / 6) + 4)
            raise InputError(
                f"wrn-{depth}-{width}: depth must be 6n + 4 and at least 10, width at least 1 "
                f"(did you mean wrn-{near}-{max(width, 1)}?)"
            )
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        act, kind = ACTIVATIONS[activation], variant
        self.checkpointing = False
        self.normalize = normalize
        self.stem = nn.Conv2d(channels, base, 3, 1, padding=1, bias=False)
        blocks: list[Block] = []
        c_in = base
        for stage in range(3):
            c_out = base * width * 2**stage
            for i in range((depth - 4) // 6):
                blocks.append(Block(c_in, c_out, 2 if stage > 0 and i == 0 else 1, act, kind))
                c_in = c_out
        self.blocks = nn.ModuleList(blocks)
        self.bn = nn.BatchNorm2d(c_in, momentum=0.1 if kind == "original" else 0.01)
        self.act = act()
        self.head = nn.Linear(c_in, classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(self.normalize(x))
        for block in self.blocks:
            h = run_block(block, h, recompute=self.checkpointing)
        logits: Tensor = self.head(self.act(self.bn(h)).mean((2, 3)))
        return logits
