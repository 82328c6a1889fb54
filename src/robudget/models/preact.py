"""Pre-activation residual networks: WideResNets in two variants, PreActResNet-18, and RaWideResNet.

- WideResNet (Zagoruyko & Komodakis 2016), `original`: every 3×3 convolution padded by one pixel on each side, running
  statistics of BatchNorm with momentum 0.1.
- Its `deepmind` variant (Gowal et al. 2020): strided convolutions padded as TensorFlow's SAME does (one pixel right and
  below only), momentum 0.01. The same parameters.
- PreActResNet-18 (He et al. 2016b) for small images, with the final BatchNorm of Rice et al. 2020.
- RaWideResNet-70-16 (Peng et al. 2023): the deepmind variant of other depths and widths, with squeeze and excitation
  after the second convolution of every block ("RobustBlock") and SiLU.

Any classifier's input normalisation, and the recomputation of activations in place of keeping them, are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robudget.errors import InputError, unknown

Variant = Literal["original", "deepmind"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
SQUEEZE = 0.25  # of a block's channels (Peng et al. 2023)
_NORM = nn.modules.batchnorm._BatchNorm


class Normalize(nn.Module):
    """(x − mean) / std per channel, for images (N, C, H, W) in [0, 1].

    The first layer of every model here, so that attacks work in image units and need no constants. Mean and std are
    buffers: they are saved with the weights, and weights loaded into a fresh model bring their own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or any(s <= 0 for s in std):
            raise InputError(f"normalisation needs one mean and one positive std per channel, got {mean} and {std}")
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor([float(s) for s in std]).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Normalized(nn.Module):
    """Any classifier of normalised images behind a `Normalize`: images in [0, 1] to logits."""

    def __init__(self, normalize: Normalize, body: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(self.normalize(x))
        return logits


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


def kaiming(model: nn.Module) -> None:
    """He et al. 2015, fan-out, for convolutions; BatchNorm to (1, 0); a linear layer's bias to 0."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # nothing to fill; torch would import its compiler (2.5 s) to draw nothing
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


# -- activations recomputed in the backward pass instead of kept: less memory for one more forward pass ---------------


def run_block(block: nn.Module, x: Tensor, *, recompute: bool) -> Tensor:
    """`block(x)`, its inner activations kept for the backward pass or computed again in it.

    The second forward must not count in BatchNorm's running statistics: the batch counts once.
    """
    if not recompute or not torch.is_grad_enabled():
        out: Tensor = block(x)
        return out
    norms = [module for module in block.modules() if isinstance(module, _NORM)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _untracked(norms)

    again: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return again


@contextmanager
def _untracked(norms: list[_NORM]) -> Iterator[None]:
    # Momentum 0 leaves the running statistics exactly as they are, and saves the same tensors as the first forward did.
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Turn recomputation on. Raises InputError for a model that can't: one of timm's without the switch, or with
    BatchNorm, whose statistics timm would update twice."""
    if hasattr(model, "checkpointing"):
        setattr(model, "checkpointing", True)  # noqa: B010 (nn.Module's attributes are typed as modules and tensors)
        return
    switch: Callable[[bool], None] | None = None
    if isinstance(model, Normalized) and not any(isinstance(m, _NORM) for m in model.modules()):
        switch = getattr(model.body, "set_grad_checkpointing", None)
    if switch is None:
        raise InputError(f"activation checkpointing is not available for model {name!r}")
    try:
        switch(True)
    except AssertionError:
        raise InputError(f"activation checkpointing is not available for model {name!r}") from None
