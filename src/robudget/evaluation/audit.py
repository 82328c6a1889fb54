"""`--version quick`: short attacks on every image, the full ensemble on a random sample of what they leave.

Between the two, the survivors that came nearest to misclassified are attacked at length: of the reference model, the
two that the full ensemble breaks and short attacks do not were the two nearest of 173.
The two together give an estimate of the full ensemble's accuracy with an exact interval (the combination is ours). Pure
data: imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from robudget.accuracy import hypergeometric_cdf, hypergeometric_most, spent_error
from robudget.evaluation.confirmation import Blocks

NEAR, NEAR_LEAST = 0.02, 4  # of the survivors, images: a block of the nearest
SHARE, LEAST = 0.05, 8  # of the survivors, images: the audit, where no precision is asked
GROWTH = 1.5  # at least, of the audit, when it is extended
LEVEL = 0.95  # of the interval
# A share of the audited that fell above which the short attacks were not enough, and the full ensemble is due.
HITS = 0.05
PRIOR = (0.25, 50)  # hits, audited: half a percent; of the reference model 2 of 173 (L∞) and 0 of 128 (L2) were missed
BAD_LUCK = 0.01  # probability of so many hits at that threshold, below which they are not taken for bad luck


def near_more(survivors: int, fell: Sequence[int]) -> int:
    """How many more of the survivors to attack at length, the nearest to misclassified first; 0: none.

    `fell`: of each block so far, how many images fell. A block of which one fell is followed by another one.
    """
    return 0 if fell and not fell[-1] else max(NEAR_LEAST, math.ceil(NEAR * survivors))


def audit_more(survivors: int, images: int, done: Sequence[int], fell: Sequence[int], until: float | None) -> int:
    """How many more of the survivors to audit; 0: none.

    `done` and `fell` are the images and hits of each extension so far; `images` all that were evaluated. `until`: the
    half-width in points that the interval of the accuracy is to have; None: 5% of the survivors, 8 at least, and more
    where hits are above the threshold of `HITS` by what may be bad luck.
    """
    size, hits, look = sum(done), sum(fell), len(done)
    if until is None:
        if not done:
            return max(LEAST, int(SHARE * survivors))
        # So many audited, and those hits are no longer above the threshold, if there are no more of them.
        wanted = min(math.ceil(hits / HITS), survivors)
        chance = 1 - hypergeometric_cdf(hits - 1, size, math.ceil(HITS * survivors), survivors) if hits else 0.0
        return max(wanted - size, 0) if chance > BAD_LUCK else 0

    def half_width(size: int, hits: int, look: int) -> float:
        most = hypergeometric_most(hits, size, survivors, spent_error(look, 1 - LEVEL))
        return 50 * (most - hits) / images

    if done and half_width(size, hits, look - 1) <= until:
        return 0
    least = min(math.ceil(GROWTH * size) if done else min(1, survivors), survivors)
    # The smallest that would do if the rate of hits stays what it is.
    rate, low, high = hits / size if size else 0.0, least, survivors
    while low < high:
        middle = (low + high) // 2
        if half_width(middle, min(max(hits, round(rate * middle)), middle), look) <= until:
            high = middle
        else:
            low = middle + 1
    return low - size


@dataclass(frozen=True)
class Audit(Blocks):
    """What the full ensemble, in float32, did to a random sample (`attacked`) of the `survivors` of the short attacks.

    The sample depends on the seed and an image's row in the split alone. The bound on how many of the rest would fall
    is exact (hypergeometric, one-sided, `LEVEL`), wherever an audit that is extended until it is precise enough ends,
    and it holds for weak attacks and low precision alike.
    """

    @property
    def estimate(self) -> float:
        """How many of the survivors the full ensemble would leave, expected.

        The rate of hits among those not audited is that of the audit together with `PRIOR`: a small audit's own rate
        jumps by more than short attacks ever missed of a model without masking.
        """
        hits, audited = PRIOR
        return sum(
            p.survivors - p.fell - (p.survivors - p.attacked) * (p.fell + hits) / (p.attacked + audited)
            for p in self.parts
        )

    @property
    def deviation(self) -> float:
        """Of `estimate`, in images: the standard deviation of a rate of hits distributed as beta, `PRIOR` and audit."""
        hits, audited = PRIOR
        return math.sqrt(
            sum(
                (p.survivors - p.attacked) ** 2
                * (p.fell + hits)
                * (p.attacked - p.fell + audited - hits)
                / ((p.attacked + audited) ** 2 * (p.attacked + audited + 1))
                for p in self.parts
            )
        )

    def robust(self, error: float = 1 - LEVEL) -> tuple[int, int]:
        """The least number of images that the full ensemble would leave, and the most (which is certain)."""
        most = self.survivors - self.fell
        return most - self.bound(error), most

    @property
    def hit_rate(self) -> float:
        """Share of the audited that fell; NaN without an audited image."""
        return self.fell / self.attacked if self.attacked else math.nan

    def __str__(self) -> str:
        if not self.survivors:
            return "the short attacks left no image to audit"
        fell = "none fell" if not self.fell else f"{self.fell} fell"
        return (
            f"the short attacks left {self.survivors} images; of these {self.attacked} at random were put through the "
            f"full ensemble in float32, and {fell}"
        )

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"hit_rate": None if math.isnan(self.hit_rate) else self.hit_rate}
