"""Verdicts on a randomised model: it misclassifies an image where it errs in more than half of N passes (ours).

One lucky success of an attack would say that the model can err, not that it does (auto-attack's pull request 105 is of
the same trouble). So a claim of an attack is tried in 20 passes. It ends its image only where at least 18 of them err,
which happens once in 5,000 tries at a point at which the model errs half the time; else the attack goes on, and the
example with the most errors is kept. In the end every kept example is judged by N fresh passes: what they count is no
selection from what the attack saw. The clean images are judged by N passes too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robudget.attacks.driver import State as RowState
from robudget.attacks.victim import margin
from robudget.evaluation.state import ROBUST, State
from robudget.evaluation.victims import Images, Victims, misclassified

TRIAL, DECISIVE = 20, 18  # passes that a claim is tried in, and errors among them that end its image


class Votes:
    """The judge of one evaluation: N = `passes`. What it has kept is in the notes and the examples of `state`."""

    def __init__(self, passes: int, seed: int, images: Images, victims: Victims, state: State) -> None:
        self.passes, self.seed, self.images, self.victims, self.state = passes, seed, images, victims, state
        self._errors = torch.empty(0)

    @contextmanager
    def keyed(self, *key: object) -> Iterator[None]:
        """Inside, torch's generators depend on the seed and `key`; afterwards they are as they were."""
        digest = hashlib.sha256(" ".join(map(str, (self.seed, *key))).encode()).digest()
        number, device = int.from_bytes(digest[:7], "big"), self.images.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(number)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(number)
            yield

    def _count(self, x: Tensor, y: Tensor, passes: int) -> tuple[Tensor, Tensor]:
        """(N,) in how many passes the model as given errs, and its mean logits (N, classes)."""
        errors, total = torch.zeros_like(y), torch.zeros((), device=x.device)
        for _ in range(passes):
            logits = self.victims.given.logits(x)
            errors += misclassified(logits, y)
            total = total + logits
        return errors, total / passes

    def clean_pass(self, batch_size: int) -> None:
        """Judge the images as they are; their margin is that of the mean logits."""
        counts = []
        for part, x, y in self.images.batches(batch_size):
            with self.keyed("clean", int(self.images.index[part][0])):
                errors, logits = self._count(x, y, self.passes)
            counts += errors.tolist()
            self.state.clean_margin[part] = margin(logits, y).cpu().numpy()
            wrong = (2 * errors > self.passes).cpu().numpy()
            self.state.broken_by[part] = np.where(wrong, "clean", self.state.broken_by[part])
        self.state.notes |= {"clean_errors": counts, "candidates": {}}

    # -- while an attack runs ------------------------------------------------------------------------------------------

    def verify(self, x_adv: Tensor, y: Tensor) -> Tensor:
        """(N,) bool: does the model err nearly always?"""
        self._errors, _ = self._count(x_adv, y, TRIAL)
        return self._errors >= DECISIVE

    def tried(self, attack: str, rows: RowState, claims: Tensor, x_adv: Tensor) -> None:
        """Keep the best example of an image. `claims` are rows, verified last as `x_adv`."""
        kept = self.state.notes["candidates"]
        columns = (rows.image, rows.when, rows.restart, rows.target)
        facts = zip(*(column[claims].tolist() for column in columns), strict=True)
        for n, (errors, (image, *where)) in enumerate(zip(self._errors.tolist(), facts, strict=True)):
            if errors > kept.get(str(image), [0])[0]:
                kept[str(image)] = [errors, attack, *where]
                self.state.keep(torch.tensor([image]), x_adv[n : n + 1])

    # -- in the end ----------------------------------------------------------------------------------------------------

    def judge(self, batch_size: int) -> None:
        """Judge every kept example, and enter the verdicts; examples that do not stand are dropped."""
        state, kept, examples = self.state, self.state.notes["candidates"], self.state.examples
        assert examples is not None
        at = sorted(int(image) for image in kept)
        decided = state.robust.copy()
        counts: dict[str, int] = {}
        for first in range(0, len(at), batch_size):
            some = torch.tensor(at[first : first + batch_size])
            x = torch.from_numpy(np.stack([examples[i] for i in some.tolist()])).to(self.images.device)
            with self.keyed("votes", int(self.images.index[some[0]])):
                errors, _ = self._count(x, self.images[some][1], self.passes)
            counts |= {str(i): n for i, n in zip(some.tolist(), errors.tolist(), strict=True)}
        for image in at:
            _, attack, when, restart, target = kept[str(image)]
            stands = 2 * counts[str(image)] > self.passes
            state.broken_by[image] = attack if stands else ROBUST
            found = (when, restart, target) if stands else (0, 0, -1)
            state.when[image], state.restart[image], state.target[image] = found
            if not stands:
                del examples[image]
        state.notes["errors"] = counts
        state.notes["votes"] = {
            "passes": self.passes,
            "tried": len(at),
            "ended_early": int((~decided)[at].sum()) if at else 0,
            "stand": sum(2 * n > self.passes for n in counts.values()),
        }

    def shares(self) -> dict[str, NDArray[np.float64]]:
        """Columns of the verdicts: in which share of N passes the model errs on each image as it is, and on the
        strongest example that was found of it (the image itself, where none was)."""
        clean = np.array(self.state.notes["clean_errors"], dtype=float)
        worst = clean.copy()
        for image, errors in self.state.notes["errors"].items():
            worst[int(image)] = errors
        return {"clean_error": clean / self.passes, "worst_error": worst / self.passes}

    def summary(self) -> dict[str, Any]:
        return dict(self.state.notes["votes"])
