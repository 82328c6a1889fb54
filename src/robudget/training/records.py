"""What a training tells the outside, epoch by epoch: plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

# The phases of `EpochRecord.calls`.
PHASES = (
    "craft_forward",
    "craft_backward",
    "update_forward",
    "update_backward",
    "recompute_forward",
    "validation_forward",
    "validation_backward",
)


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. Accuracies are fractions; unknown is None.

    `epoch` counts from 1; `steps` and `images` (of the mixed stream) are cumulative. `train_loss` is the mean over this
    epoch's updates, `train_acc` the accuracy on their clean images where the loss sees those (standard, TRADES, MART),
    `craft_acc` that on the crafted images. `val_clean` and `val_robust` are None in an epoch without validation. `lr`
    is the last update's. `one_step` and `multi_step` are what the collapse watch saw, `collapsed` what it concluded.

    `seconds`: this epoch's time by part (data, craft, update, ema, validation, checkpoint). `calls`: image-passes since
    the start of the run, resumed parts and all processes included, by phase; multiply by FLOPs per image:
    `craft_forward`, `craft_backward` (gradient of the input), `update_forward`, `update_backward` (gradient of the
    weights; for Free-AT of both), `recompute_forward` (activation checkpointing), `validation_forward`,
    `validation_backward` (gradient of the input; the collapse watch's passes are among these).
    """

    epoch: int
    steps: int
    images: int
    train_loss: float
    train_acc: float | None
    craft_acc: float | None
    val_clean: float | None
    val_robust: float | None
    val_images: int
    lr: float
    best: bool
    one_step: float | None = None
    multi_step: float | None = None
    collapsed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Best:
    """The checkpoint kept: its epoch (from 1) and its validation, as fractions."""

    epoch: int
    val_clean: float
    val_robust: float

    def score(self, by: str) -> tuple[float, float]:
        """What is compared: robust accuracy first, or clean first for a loss that is not adversarial."""
        return (self.val_robust, self.val_clean) if by == "val_robust" else (self.val_clean, self.val_robust)
