"""When and how a training's checkpoints are written: small ones at once, large ones beside the training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from robudget.models.build import ImageSpec, build_for
from robudget.recipe import Recipe
from robudget.training import checkpoint
from robudget.training.records import Best

LARGE_BYTES = 64 << 20  # of a checkpoint from which on it is written beside the training
SAVE_SECONDS = 60.0  # at least, between two such checkpoints, but for a better validation


class Saver:
    """Writes the checkpoints and the best weights of a training to `folder`; without one, it keeps the best weights in
    memory. `size_bytes`: of a checkpoint, about. `leads`: whether this process is the one that writes."""

    def __init__(self, recipe: Recipe, folder: Path | None, *, leads: bool, size_bytes: int) -> None:
        self._recipe, self.folder, self._leads = recipe, folder, leads
        self.large = size_bytes >= LARGE_BYTES
        self.step = -1  # of the last checkpoint
        self._at = time.monotonic()
        self._best_weights: dict[str, Tensor] = {}
        self._best_about: dict[str, str] = {}  # of best weights that are still to be written
        self._writer = checkpoint.Writer()

    @property
    def seconds(self) -> float:
        """Since the last checkpoint."""
        return time.monotonic() - self._at

    def save(self, state: checkpoint.State) -> None:
        """Write `last.pt`, a large one in the background."""
        assert self.folder is not None
        self._at, self.step = time.monotonic(), state["step"]
        if not self._leads:
            return
        if self.large:
            self._writer.wait()  # one snapshot at a time
            state = checkpoint.copied(state)
        folder, weights, about = self.folder, self._best_weights, self._best_about
        self._best_weights, self._best_about = ({}, {}) if about else (weights, {})

        def write() -> None:
            if about:
                checkpoint.save_weights(folder / checkpoint.BEST, weights, self._recipe, about)
            checkpoint.save_last(folder, state)

        self._writer(write, background=self.large)

    def keep_best(self, best: Best, weights: Mapping[str, Tensor]) -> None:
        """These weights are the best so far; large ones are written with the next checkpoint."""
        if self.folder is None:
            self._best_weights = checkpoint.copied(weights)
        elif self._leads:
            about = {key: str(value) for key, value in asdict(best).items()}
            if self.large:
                self._best_weights, self._best_about = checkpoint.copied(weights), about
            else:
                checkpoint.save_weights(self.folder / checkpoint.BEST, weights, self._recipe, about)

    def best_model(self, spec: ImageSpec) -> nn.Module:
        """A new model in eval mode with the best weights, contiguous float32, on the CPU."""
        if self.folder is not None:
            self.wait()
            return checkpoint.best_model(self._recipe, spec, self.folder / checkpoint.BEST)
        model = build_for(self._recipe, spec)
        model.load_state_dict(self._best_weights)
        return model.eval()

    def wait(self) -> None:
        """Return when everything is on the disk. Raises what a writing raised."""
        self._writer.wait()
