"""Freed memory kept by the process instead of returned to the system and asked for again.

A training step frees and allocates the same megabytes over and over. By default glibc hands large blocks back at once,
so that every activation's pages are faulted in and zeroed again: about a tenth of a step on a CPU.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, for the rest of this process. No result depends on it; memory stays at its
    peak.

    False where there is no glibc to tell (other systems, other C libraries).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
