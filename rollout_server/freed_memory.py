"""Keep freed buffers in the process: bodies of megabytes come one after another, and fresh pages cost more than the copies."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # malloc.h of glibc
LARGEST_ON_HEAP_BYTES = 32 << 20
"""What glibc takes at most for M_MMAP_THRESHOLD."""
KEPT_BYTES = 64 << 20


def keep_freed_memory() -> None:
    """Tell glibc's malloc to give memory back to the system later; elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(M_TOP_PAD, 1 << 20)
    mallopt(M_ARENA_MAX, 2)
