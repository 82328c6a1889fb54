"""What a training tells the outside, epoch by epoch: plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. Accuracies are fractions; unknown is None.

    `epoch` counts from 1; `steps` and `images` (of the mixed stream) are cumulative. `train_loss` and `train_acc` are
    means over this epoch's updates: of the clean images where the loss sees them (standard, TRADES, MART), else None;
    `craft_acc` is the accuracy on the crafted images. `val_clean` and `val_robust` are None in an epoch without
    validation. `lr` is the last update's.

    `seconds`: this epoch's time by part (data, craft, update, ema, validation, checkpoint). `calls`: image-passes since
    the start of the run, resumed parts included, by phase; multiply by FLOPs per image:
    `craft_forward`, `craft_backward` (gradient of the input), `update_forward`, `update_backward` (gradient of the
    weights), `validation_forward`, `validation_backward` (of the input).
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
