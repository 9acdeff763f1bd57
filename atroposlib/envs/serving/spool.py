"""Scored groups that the rollout server could not take yet, on disk, until it does.

One file of safetensors blobs, one after another: a blob tells its own length, so a torn tail is seen and cut off. A
group that is delivered stays in the file until the file is emptied or rewritten; should the process die before, the group
is sent again under its id and answered as a duplicate.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from io import FileIO
from pathlib import Path

from atroposlib.errors import GroupFormatError, SpoolError
from atroposlib.wire.columns import Group, decode_groups, encode_group, read_blobs

log = logging.getLogger(__name__)


class Spool:
    """The journal of one environment. Opened on first use; a second process on the same file is refused.

    Args:
        path: the file.
        max_bytes: its largest size.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._pending: dict[str, None] = {}
        """Group ids, in order."""
        self._file: FileIO | None = None
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._pending

    def recover(self) -> list[Group]:
        """What an earlier process left undelivered, in order. It stays here until delivered() is told.

        Raises:
            SpoolError: another process has the file open.
        """
        if not self.path.exists():
            return []
        self._open()
        blobs = self._read()
        self._pending.update(dict.fromkeys(blobs))
        return [group for blob in blobs.values() for group in decode_groups(blob)]

    def keep(self, group: Group) -> None:
        """Write a group and flush it to the disk; one that is here already is not written again.

        Raises:
            SpoolError: it does not fit; the file is as before.
            GroupFormatError: nobody could read it again; the file is as before.
        """
        if group.group_id in self._pending:
            return
        blob = encode_group(group)
        list(read_blobs(blob))  # one that cannot be read would cost all that come behind it
        self._open()
        if self._size_bytes + len(blob) > self._max_bytes:
            self._rewrite()
        if self._size_bytes + len(blob) > self._max_bytes:
            raise SpoolError(
                f"spool {self.path} holds {self._size_bytes} bytes and max_spool_bytes={self._max_bytes}: a group of "
                f"{len(blob)} bytes does not fit; raise max_spool_bytes, or start the rollout server"
            )
        self._append(blob)
        self._pending[group.group_id] = None

    def delivered(self, group_id: str) -> None:
        """The server has answered for this group: it need not be kept."""
        if group_id not in self._pending:
            return
        del self._pending[group_id]
        if not self._pending:
            self._truncate(0)

    def close(self) -> None:
        """Close the file; an empty one is removed."""
        if self._file is None:
            return
        if self._size_bytes == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def _open(self) -> None:
        if self._file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(self.path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise SpoolError(
                f"spool {self.path} is in use by another process; give each environment its own --wandb_name"
            ) from error
        self._file = file
        self._size_bytes = file.seek(0, os.SEEK_END)

    def _read(self) -> dict[str, bytes]:
        """Whole blobs by group id. A torn tail is cut off the file; what else cannot be read is set aside first."""
        assert self._file is not None
        self._file.seek(0)
        data = self._file.read()
        blobs: dict[str, bytes] = {}
        end = 0
        try:
            for blob in read_blobs(data):
                blobs[blob.header.group_id] = bytes(blob.data)
                end += len(blob.data)
        except GroupFormatError as error:
            rest = data[end:]
            fate = "cut off" if _is_torn(rest) else f"moved to {self._set_aside(rest)}"
            log.warning(
                "spool %s: the %d bytes at its end do not begin with a whole group and are %s: %s",
                self.path,
                len(rest),
                fate,
                error,
            )
            self._truncate(end)
        return blobs

    def _set_aside(self, data: bytes) -> Path:
        path = self.path.with_name(self.path.name + ".bad")
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return path

    def _rewrite(self) -> None:
        """Leave only what is pending: written anew beside the file first, so that a crash loses nothing."""
        blobs = self._read()
        # What the disk has lost is pending in memory only.
        self._pending = dict.fromkeys(group_id for group_id in self._pending if group_id in blobs)
        kept = [blobs[group_id] for group_id in self._pending]
        draft = self.path.with_suffix(".draft")
        with draft.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        assert self._file is not None
        draft.replace(self.path)
        self._file.close()
        self._file = None
        self._open()

    def _append(self, blob: bytes) -> None:
        assert self._file is not None
        try:
            if (written := self._file.write(blob)) != len(blob):
                raise OSError(f"only {written} of {len(blob)} bytes could be written to {self.path}")
            os.fsync(self._file.fileno())
        except OSError:
            self._truncate(self._size_bytes)
            raise
        self._size_bytes += len(blob)

    def _truncate(self, size_bytes: int) -> None:
        assert self._file is not None
        self._file.truncate(size_bytes)
        os.fsync(self._file.fileno())
        self._size_bytes = size_bytes


def _is_torn(rest: bytes) -> bool:
    """Whether this is the beginning of one group: what is left of a write that was cut short."""
    if rest.count(b'"__metadata__"') > 1:
        return False
    start = 8 + int.from_bytes(rest[:8], "little")
    ends = re.findall(rb'"data_offsets":\[\d+,(\d+)\]', rest[8:start])
    return len(rest) < start + max(map(int, ends), default=0)
