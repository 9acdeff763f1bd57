"""Writing to a file past the page cache: what must reach the device anyway need not fill memory on its way.

A fresh page in the cache costs more than the write itself, many times more on virtual machines.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rollout_server.stores.base import Payload

BLOCK_BYTES = 4096
"""Offsets, sizes and memory of a direct write are multiples of the device's block; no common device has a larger one."""
BUFFER_BYTES = 4 << 20


class DirectFile:
    """A file that is written front to back in pieces of any size.

    The last block is written again as it fills, with what it held before: a torn write damages nothing older.

    Args:
        path: made when missing; bytes behind the last one written have no meaning.
    Raises:
        OSError: the file system has no direct writes (EINVAL), or the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o644)
        self._memory = mmap.mmap(-1, BUFFER_BYTES)  # begins at a page
        self._buffer = np.frombuffer(self._memory, dtype=np.uint8)
        self._base = 0
        """Where in the file the buffer begins; a multiple of BLOCK_BYTES."""
        self._fill = 0
        try:  # some file systems open the file and refuse the first write; what is written here is written over
            os.pwrite(self.descriptor, self._buffer[:BLOCK_BYTES].data, 0)
        except BaseException:
            os.close(self.descriptor)
            raise

    def write(self, offset: int, payloads: Sequence[Payload]) -> None:
        """Put payloads side by side, at or behind the end of what was written before.

        Raises:
            OSError: the device is full or failed; what is in the file then is not known.
        """
        gap = offset - self._base - self._fill
        if gap < 0:
            raise ValueError(
                f"offset {offset} lies before the end, {self._base + self._fill}: payload is only appended"
            )
        if gap:
            self._put(np.zeros(gap, dtype=np.uint8))
        for payload in payloads:
            self._put(np.frombuffer(payload, dtype=np.uint8))
        self._flush()

    def close(self) -> None:
        """Close the file; the buffer goes with its last user."""
        os.close(self.descriptor)

    def _put(self, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        at = 0
        while at < len(data):
            size = min(len(data) - at, BUFFER_BYTES - self._fill)
            self._buffer[self._fill : self._fill + size] = data[at : at + size]
            self._fill += size
            at += size
            if self._fill == BUFFER_BYTES:
                self._flush()

    def _flush(self) -> None:
        """Write the buffer in whole blocks; the last one stays in it unless it is full."""
        end = -(-self._fill // BLOCK_BYTES) * BLOCK_BYTES
        self._buffer[self._fill : end] = 0
        written = 0
        while written < end:
            size = os.pwrite(self.descriptor, self._buffer[written:end].data, self._base + written)
            written += size // BLOCK_BYTES * BLOCK_BYTES
            if size < BLOCK_BYTES:
                raise OSError(f"the device took {size} of {end - written} bytes")
        whole = self._fill // BLOCK_BYTES * BLOCK_BYTES
        self._buffer[: self._fill - whole] = self._buffer[whole : self._fill].copy()
        self._base, self._fill = self._base + whole, self._fill - whole
