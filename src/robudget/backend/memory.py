"""Freed memory stays with the process, instead of being returned to the system and requested again.

A step of a training or of an attack frees and allocates the same megabytes again and again. By default glibc returns
large blocks at once, so that the system maps and clears every activation's pages anew: a tenth of a training step on a
CPU, and for small networks more than their arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for the rest of this process. No result depends on it; memory stays at its peak.

    False where there is no glibc (other systems, other C libraries).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Older versions of glibc take no more than 32 MiB.
    threshold = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(threshold) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
