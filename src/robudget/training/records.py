"""What a training reports, epoch by epoch, in plain numbers; and what follows: the best, a way back, an early end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from robudget.losses import LOSSES
from robudget.recipe import Recipe
from robudget.training.checkpoint import State

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
    `validation_backward` (gradient of the input; the collapse watch's passes are among these). Where a recipe has them,
    `penalty`: gradients of an image that are in the loss, each one a forward pass, a backward pass and a backward pass
    through both (with loss grad-norm: the update).
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
    """The best checkpoint: its epoch (from 1) and its validation, as fractions."""

    epoch: int
    val_clean: float
    val_robust: float

    def score(self, by: str) -> tuple[float, float]:
        """What is compared: robust accuracy first, or clean first for a loss that is not adversarial."""
        return (self.val_robust, self.val_clean) if by == "val_robust" else (self.val_clean, self.val_robust)


class Course:
    """A training so far, and what follows from it: which epoch is best, whether to go back or to end early.

    `records` are all epochs, `best` the best validated one; `stopped`: why it ended before its epochs did. `lr_scale`
    is halved by every return to `good`, the weights before a collapse. `notify` is told of a collapse.
    """

    def __init__(self, recipe: Recipe, notify: Callable[[str], None]) -> None:
        self._recipe, self._notify = recipe, notify
        self.records: list[EpochRecord] = []
        self.best: Best | None = None
        self.stopped: str | None = None
        self.lr_scale = 1.0
        self.good: State | None = None

    @property
    def selected_by(self) -> str:
        """Robust validation accuracy; clean for a standard loss, whose most robust epoch is the untrained one."""
        return "val_robust" if LOSSES[self._recipe.loss].robust else "val_clean"

    @property
    def multi_step(self) -> float:
        """The best accuracy against many steps that the collapse watch has seen, 0 before it looked."""
        return max((record.multi_step or 0.0 for record in self.records), default=0.0)

    def is_best(self, found: Best) -> bool:
        """Is this validation better than all before? Then it is the `best` from now on."""
        if self.best is not None and found.score(self.selected_by) <= self.best.score(self.selected_by):
            return False
        self.best = found
        return True

    def add(self, record: EpochRecord, weights: Callable[[], State], load: Callable[[State], None]) -> None:
        """The epoch that ended, and what the collapse watch's action and early stopping make of it. `weights()` is a
        copy of everything that an update changes, and `load` puts one back."""
        self.records.append(record)
        part, patience = self._recipe.collapse, self._recipe.validation.patience
        if record.collapsed:
            assert record.one_step is not None
            assert record.multi_step is not None
            self._notify(
                f"epoch {record.epoch}: catastrophic overfitting, {100 * record.one_step:.0f}% robust to one step but "
                f"{100 * record.multi_step:.0f}% to {part.steps} (collapse.action = {part.action})"
            )
            if part.action == "stop":
                self.stopped = f"collapsed at epoch {record.epoch}"
            elif part.action == "restore" and self.good is not None:
                load(self.good)
                self.lr_scale /= 2
        elif part.action == "restore":
            self.good = weights()
        validated = [r for r in self.records if r.val_robust is not None]
        since = len(validated) - max((i + 1 for i, r in enumerate(validated) if r.best), default=0)
        ended = record.epoch >= self._recipe.epochs or self.stopped is not None
        if patience is not None and since >= patience and not ended:
            self.stopped = f"no better validation in {patience}"

    def state(self) -> State:
        return {
            "good": self.good,
            "lr_scale": self.lr_scale,
            "best": asdict(self.best) if self.best else None,
            "stopped": self.stopped,
            "records": [asdict(record) for record in self.records],
        }

    def restore(self, state: State) -> None:
        self.good, self.lr_scale, self.stopped = state["good"], state["lr_scale"], state["stopped"]
        self.best = Best(**state["best"]) if state["best"] else None
        self.records = [EpochRecord(**record) for record in state["records"]]
