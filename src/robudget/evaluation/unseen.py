"""Accuracy under attacks that no model here is trained against: elastic, JPEG and Gabor (`attacks/unseen.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robudget.accuracy import wilson
from robudget.attacks.driver import drive, plan
from robudget.attacks.noise import Noise
from robudget.attacks.unseen import Unseen, UnseenAttack
from robudget.attacks.victim import Model
from robudget.errors import InputError
from robudget.evaluation.measurement import Arrays, Measured, Piece, Setting, Work, prepared, read, together
from robudget.evaluation.spent import by_attack
from robudget.threat import Threat

ATTACKS = ("elastic", "jpeg", "gabor")
_ANY_IMAGE = Threat("linf", 1.0)


@dataclass(frozen=True, kw_only=True)
class UnseenAccuracy(Measured):
    """`frame` has a line per image: `index`, `label`, `clean`, and a column per attack: does it stand (correct, and not
    broken)?"""

    kind = "unseen"

    @property
    def attacks(self) -> list[str]:
        return list(self.about["strengths"])

    def accuracy(self, attack: str) -> float:
        return float(self.frame[attack].mean())

    def interval(self, attack: str) -> tuple[float, float]:
        """95% Wilson interval of `accuracy`."""
        return wilson(int(self.frame[attack].sum()), self.n)

    @property
    def mean(self) -> float:
        """The mean over the attacks."""
        return float(np.mean([self.accuracy(attack) for attack in self.attacks]))

    def results(self) -> dict[str, Any]:
        clean = int(self.frame["clean"].sum())
        against_all = int(self.frame[self.attacks].all(axis=1).sum())
        return {
            "clean_accuracy": clean / self.n,
            "unseen_accuracy": self.mean,
            "union_accuracy": against_all / self.n,
            "union_interval": list(wilson(against_all, self.n)),
            "attacks": {
                attack: {
                    "eps": self.about["strengths"][attack],
                    "accuracy": self.accuracy(attack),
                    "interval": list(self.interval(attack)),
                }
                for attack in self.attacks
            },
        }

    def page(self) -> str:
        data = self.results()
        low, high = (100 * end for end in data["union_interval"])
        lines = [
            f"Accuracy under unseen attacks {100 * self.mean:.2f}%, the mean of {len(self.attacks)}; of the images "
            f"that stand against each {100 * data['union_accuracy']:.2f}% [{low:.2f}, {high:.2f}]; on {self.n} images",
            f"Clean accuracy {100 * data['clean_accuracy']:.2f}%",
            "",
            f"{'attack':<24}{'ε':>10}{'accuracy %':>12}{'95% interval':>18}",
        ]
        for attack, item in data["attacks"].items():
            interval = f"[{100 * item['interval'][0]:.2f}, {100 * item['interval'][1]:.2f}]"
            lines.append(f"{attack:<24}{item['eps']:>10g}{100 * item['accuracy']:>12.2f}{interval:>18}")
        lines += [
            "",
            "ε: pixels of flow (elastic), steps of quantisation (jpeg), 255ths of brightness (gabor).",
            f"By PGD over an attack's own parameters ({', '.join(self.about['members'])}): upper bounds of accuracy.",
            "",
            *self.bill_lines(),
        ]
        return "\n".join(lines) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote. Raises InputError."""
        data, frame, spent = read(folder, cls.kind)
        return cls(frame=frame, spent=spent, about=data["about"])


def unseen(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    attacks: Sequence[str | UnseenAttack] = ATTACKS,
    setting: Setting | None = None,
    index: Tensor | None = None,
    classes: int | None = None,
) -> UnseenAccuracy:
    """Which of the images x (N, C, H, W; float32 in [0, 1] or uint8), label y (N,) int64, stand against each attack.
    Successes are confirmed in float32 by the model as given. Raises InputError."""
    chosen = [item if isinstance(item, UnseenAttack) else UnseenAttack.parse(item) for item in attacks]
    if not chosen or len({attack.name for attack in chosen}) < len(chosen):
        raise InputError(f"attacks = {', '.join(map(str, chosen)) or 'none'} (allowed: at least one, each once)")
    with prepared(model, x, y, setting or Setting(), index=index, classes=classes) as work:
        if not work.victims.differentiable:
            raise InputError(f"{chosen[0].name} needs a gradient, and the model's logits carry none to the image")
        c, h, w = x.shape[1:]
        about = work.about(
            measures="unseen",
            members=[str(attack) for attack in chosen],
            strengths={attack.name: attack.strength((c, h, w)) for attack in chosen},
        )
        (clean,) = work.run([work.clean()], about)
        right = torch.from_numpy(clean["margin"] > 0)
        pieces = [_piece(work, attack, block, right) for attack in chosen for block in work.blocks()]
        found = [arrays["stands"] for arrays in work.run(pieces, about)]
        each = len(work.blocks())
        columns = {attack.name: np.concatenate(found[n * each : (n + 1) * each]) for n, attack in enumerate(chosen)}
        frame = pd.DataFrame(
            {
                "index": work.images.index.numpy(),
                "label": work.images.y.cpu().numpy(),
                "clean": right.numpy(),
                **columns,
            }
        )
        return UnseenAccuracy(frame=frame, spent=by_attack(work.spent), about=about)


def _piece(work: Work, attack: UnseenAttack, block: slice, right: Tensor) -> Piece:
    """`stands` (of the block) bool."""

    def compute() -> tuple[Arrays, int]:
        images, victims, setting = work.images, work.victims, work.setting
        x, y = images.x[block], images.y[block]
        some = right[block].nonzero().squeeze(1).to(images.device)
        stands = right[block].clone()
        if len(some):
            c, h, w = x.shape[1:]
            reports = drive(
                Unseen(victims.copy(precise=victims.precision == "float32"), attack, (c, h, w)),
                plan(some, x.new_empty(0)),
                x,
                y,
                _ANY_IMAGE,
                noise=Noise(setting.seed, images.index[block]),
                verify=victims.misclassified,
                batch_size=setting.batch_size,
            )
            for report in reports:
                stands &= ~report.outcome.broken.cpu()
        return {"stands": stands.numpy()}, int((right[block] & ~stands).sum())

    return Piece(f"{attack.name}-{block.start}-{block.stop}", attack.name, int(right[block].sum()), compute)


def merge_unseen(parts: Sequence[UnseenAccuracy]) -> UnseenAccuracy:
    """One over the images of all parts. Raises InputError."""
    frame, spent, about = together(parts)
    return UnseenAccuracy(frame=frame, spent=spent, about=about)
