"""Pre-activation residual networks: WideResNets in two variants, PreActResNet-18, and RaWideResNet.

- WideResNet (Zagoruyko & Komodakis 2016), `original`: every 3×3 convolution padded by one pixel on each side,
BatchNorm's
  running statistics with momentum 0.1.
- Its `deepmind` variant (Gowal et al. 2020): strided convolutions padded as TensorFlow's SAME does (one pixel right and
  below only), momentum 0.01. The same parameters.
- PreActResNet-18 (He et al. 2016b) for small images, with the final BatchNorm of Rice et al. 2020.
- RaWideResNet-70-16 (Peng et al. 2023): the deepmind variant of other depths and widths, with squeeze and excitation
after
  the second convolution of every block ("RobustBlock") and SiLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from robudget.errors import InputError, unknown
from robudget.models.layers import ACTIVATIONS, Normalize, kaiming
from robudget.models.memory import run_block

Variant = Literal["original", "deepmind"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
SQUEEZE = 0.25  # of a block's channels (Peng et al. 2023)


class SqueezeExcitation(nn.Module):
    """Each channel scaled by a number in (0, 1) that a small network makes of all channels' means (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(1, round(SQUEEZE * channels))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU()
        self.up = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.up(self.act(self.down(self.pool(x)))))
        return x * gate


class Block(nn.Module):
    """Two 3×3 convolutions, each after BatchNorm and activation, plus a shortcut taken after the first activation."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, activation: type[nn.Module], variant: Variant, *, excite: bool = False
    ) -> None:
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
        self.excite = SqueezeExcitation(c_out) if excite else None
        same = c_in == c_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        h = self.conv2(self.act2(self.bn2(self.conv1(self.pad(h)))))
        out: Tensor = skip + (h if self.excite is None else self.excite(h))
        return out


class PreActNet(nn.Module):
    """Images (N, channels, H, W) in [0, 1] to logits (N, classes).

    A 3×3 stem of `stem` channels, then stages of `depths[i]` blocks with `widths[i]` channels, each stage after the
    first at half the resolution of the one before, then BatchNorm, activation, the mean over pixels and a linear layer.
    `checkpointing` recomputes a block's activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        stem: int,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        classes: int,
        normalize: Normalize,
        channels: int = 3,
        activation: str = "relu",
        variant: str = "original",
        excite: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        act = ACTIVATIONS[activation]
        self.checkpointing = False
        self.normalize = normalize
        self.stem = nn.Conv2d(channels, stem, 3, 1, padding=1, bias=False)
        blocks: list[Block] = []
        c_in = stem
        for stage, (depth, c_out) in enumerate(zip(depths, widths, strict=True)):
            for i in range(depth):
                blocks.append(Block(c_in, c_out, 2 if stage > 0 and i == 0 else 1, act, variant, excite=excite))
                c_in = c_out
        self.blocks = nn.ModuleList(blocks)
        self.bn = nn.BatchNorm2d(c_in, momentum=0.1 if variant == "original" else 0.01)
        self.act = act()
        self.head = nn.Linear(c_in, classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(self.normalize(x))
        for block in self.blocks:
            h = run_block(block, h, recompute=self.checkpointing)
        logits: Tensor = self.head(self.act(self.bn(h)).mean((2, 3)))
        return logits


class WideResNet(PreActNet):
    """`depth` is 6n + 4 with n blocks in each of three stages of base·width, 2·base·width and 4·base·width channels."""

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
        if depth < 10 or (depth - 4) % 6 or width < 1:
            near = max(10, 6 * round((depth - 4) / 6) + 4)
            raise InputError(
                f"wrn-{depth}-{width}: depth must be 6n + 4 and at least 10, width at least 1 "
                f"(did you mean wrn-{near}-{max(width, 1)}?)"
            )
        super().__init__(
            base,
            [(depth - 4) // 6] * 3,
            [base * width * 2**stage for stage in range(3)],
            classes=classes,
            normalize=normalize,
            channels=channels,
            activation=activation,
            variant=variant,
        )
