"""When a loss is beyond use, and why that is likely."""

from __future__ import annotations

from collections.abc import Sequence

from robudget.errors import RunFailed

EXPLODED = 1e4  # a mean loss that large means logits beyond any use
_RECENT = 20  # updates before the bad one that tell how it came
_GROWN = 2.0  # a loss that many times its lowest had been growing


def check(losses: Sequence[float], *, first: int, steps: int, lr: float, epoch: int, precision: str) -> None:
    """Raise RunFailed at the first loss that is not finite or has exploded: the step, the last good checkpoint (that of
    `epoch`, 0 = none), the likely cause and what to try.

    `losses` are those of this epoch so far (0 for updates still to come), `first` the number of its first step.
    """
    for index, loss in enumerate(losses):
        if not abs(loss) < EXPLODED:
            kept = f"the last good checkpoint is of epoch {epoch}" if epoch else "there is no checkpoint yet"
            cause = likely_cause(losses[:index], start=first + index == 0, precision=precision)
            raise RunFailed(f"the loss is {loss:g} at step {first + index} of {steps} (lr {lr:.3g}); {kept}; {cause}")


def likely_cause(before: Sequence[float], *, start: bool, precision: str) -> str:
    """From the losses before the bad one: growth means steps that are too large; a sudden
    end means one update that was, or an overflow."""
    recent = list(before[-_RECENT:])
    if start:
        return "likely cause: the data or the model, since nothing was learnt yet (look at the images and the labels)"
    if not recent or recent[-1] > _GROWN * min(recent):
        grown = f", the loss grew from {min(recent):.3g} to {recent[-1]:.3g} before" if recent else ""
        return (
            f"likely cause: steps that are too large{grown}; try a smaller optim.lr, optim.warmup_epochs or optim.clip"
        )
    other = ", precision=float32" if precision != "float32" else ""
    return (
        f"likely cause: a single update that was too large, since the loss was {recent[-1]:.3g} just before; try "
        f"optim.clip, a smaller optim.lr{other}"
    )
