"""Training one recipe: `Trainer` yields an `EpochRecord` per epoch and leaves metering and storing to others."""

from robudget.training.checkpoint import best_model, load_weights
from robudget.training.loop import Trainer
from robudget.training.records import Best, EpochRecord

__all__ = ["Best", "EpochRecord", "Trainer", "best_model", "load_weights"]
