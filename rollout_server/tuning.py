"""What a process that moves megabytes a request does better with other settings than an interpreter starts with."""

from __future__ import annotations

import ctypes
import gc
import sys

SWITCH_INTERVAL_S = 0.0005
"""The event loop and the writing thread share one interpreter: whoever waits for it waits for the other's answers too."""
GC_THRESHOLDS = (20_000, 20, 100)
"""Groups make thousands of objects and no cycles."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # malloc.h of glibc
LARGEST_ON_HEAP_BYTES = 32 << 20
"""What glibc takes at most for M_MMAP_THRESHOLD."""
KEPT_BYTES = 64 << 20


def tune_process() -> None:
    """Apply everything; call once, when the modules are imported."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Give buffers back to the system later: the next body is as large, and fresh pages cost more than the copies.

    Speaks to glibc's malloc; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(M_TOP_PAD, 1 << 20)
    mallopt(M_ARENA_MAX, 2)
