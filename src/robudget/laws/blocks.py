"""Likelihoods of many parameters × many runs, faster and with the same bits: in blocks, and a cheaper `ndtr`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from robudget.tables.usable import Floats

# Numbers of an intermediate value, 96 kB: below what the allocator asks the system for, and in the processor's cache.
BLOCK = 12_288
ZERO, ONE = -38.6, 8.3  # the normal distribution function is 0 below and 1 above, in double precision
SMALL = 1_000  # numbers: to look for what may be left out would take longer


def in_blocks(likelihood: Callable[..., Floats]) -> Callable[..., Floats]:
    """`likelihood(form, theta (d, p), t (n,), …)` → (d,), called for as many rows of θ at once as make a block."""

    @functools.wraps(likelihood)
    def by_blocks(form: Any, theta: Floats, t: Sequence[float] | Floats, *others: Any) -> Floats:
        rows = max(1, BLOCK // len(t))
        parts = [likelihood(form, theta[i : i + rows], t, *others) for i in range(0, len(theta), rows)]
        return np.concatenate([np.empty(0), *parts])

    return by_blocks


def ndtr(x: Floats) -> Floats:
    """The normal distribution function, same shape as x. scipy's takes as long as ten exponentials: it is left out
    where it is 0 or 1, as for most runs."""
    if x.size < SMALL:
        return np.asarray(special.ndtr(x))
    out = np.asarray(x > 0, dtype=np.float64)
    between = np.flatnonzero((x > ZERO) & (x < ONE))
    out.put(between, special.ndtr(x.take(between)))  # scipy 1.17 crashes with `where=`
    return out
