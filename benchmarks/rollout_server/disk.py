"""How fast one process appends the same bytes to a file, with and without waiting for the device."""

from __future__ import annotations

import os
import time
from pathlib import Path

SYNC_BYTES = 4 << 20
MAX_FILE_BYTES = 1 << 30


def append_rate(folder: Path, body: bytes, *, seconds: float, is_synced: bool) -> float:
    """Bytes a second; fdatasync after every 4 MB when is_synced. At 1 GB the file is emptied.

    A first gigabyte is written before the clock starts: memory that the machine never used is slower to get.
    """
    path = folder / "append"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for _ in range(MAX_FILE_BYTES // len(body)):
            os.write(file, body)
        return _append(file, body, seconds=seconds, is_synced=is_synced)
    finally:
        os.close(file)
        path.unlink()


def _append(file: int, body: bytes, *, seconds: float, is_synced: bool) -> float:
    written, unsynced, in_file = 0, 0, MAX_FILE_BYTES
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if in_file >= MAX_FILE_BYTES:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            in_file = 0
        size = os.write(file, body)
        written, unsynced, in_file = written + size, unsynced + size, in_file + size
        if is_synced and unsynced >= SYNC_BYTES:
            os.fdatasync(file)
            unsynced = 0
    return written / (time.monotonic() - start)
