"""Payload in append-only segment files. The index says what lies where; a tail that no index row names is never read.

A segment whose groups are all committed or retired is kept for export and replay while there is room. Then its file is
written over as a new segment: pages and blocks that are there already cost a fraction of fresh ones.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from rollout_server.stores.base import Payload
from rollout_server.stores.direct_file import DirectFile
from rollout_server.stores.payloads import Place
from rollout_server.stores.recent_payloads import RecentPayloads

log = logging.getLogger(__name__)

SEGMENT_BYTES = 64 << 20
RECENT_BYTES = 32 << 20
SPARE_FILES = 4
BUFFERS_A_CALL = 512
"""Below the IOV_MAX of every system."""


class SegmentWriter(Protocol):
    """The file being written."""

    descriptor: int

    def write(self, offset: int, payloads: Sequence[Payload]) -> None:
        """Put payloads side by side at offset."""

    def close(self) -> None:
        """Close it."""


@dataclass
class _Segment:
    """A file's fill and how many of its payloads may still be leased."""

    size: int = 0
    needed: int = 0


class CachedFile:
    """A file written through the page cache, at any offset.

    Args:
        path: made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, offset: int, payloads: Sequence[Payload]) -> None:
        """See SegmentWriter."""
        total = sum(len(payload) for payload in payloads)
        written = os.pwritev(self.descriptor, payloads, offset)
        if written != total:  # a full disk or a signal: say so, or finish
            rest = memoryview(b"".join(payloads))[written:]
            while rest:
                written = os.pwrite(self.descriptor, rest, offset + total - len(rest))
                rest = rest[written:]

    def close(self) -> None:
        """See SegmentWriter."""
        os.close(self.descriptor)


class SegmentFiles:
    """See payloads.Payloads.

    Args:
        folder: holds the files, 00000001.seg and so on; made at the first write.
        is_synced: flush to the disk before write returns, to survive a power cut; then past the page cache, where possible.
        retain_bytes: released payload kept for export and replay; -1 keeps all.
        is_new: the folder will be moved away before the first write; what is in it is another run's.
        recent_bytes: newest payload kept in memory too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_synced: bool,
        retain_bytes: int,
        is_new: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
        recent_bytes: int = RECENT_BYTES,
    ) -> None:
        self._folder = folder
        self._is_synced = is_synced
        self._retain_bytes = retain_bytes
        self._segment_bytes = segment_bytes
        self._segments: dict[int, _Segment] = {
            number: _Segment(size=size) for number, size in (() if is_new else sorted(_files(folder)))
        }
        # A new file at each start: what lies behind the last indexed byte of an old one is never written over.
        self._active = max(self._segments, default=0) + 1
        self._finished: deque[tuple[int, int]] = deque()
        """Number and size of segments that nobody needs any more, for the writing thread to put away."""
        self._retained: deque[tuple[int, int]] = deque()
        self._retained_bytes = 0
        self._spares: list[Path] = [] if is_new else list(folder.glob("*.spare"))
        self._reading: Counter[int] = Counter()
        """Reads under way, by segment: what is being read is not written over."""
        self._lock = threading.Lock()
        self._open_segment: tuple[int, SegmentWriter] | None = None
        """Number and file being written; used by the writing thread alone."""
        self._recent = RecentPayloads(recent_bytes)
        self._is_direct = is_synced and hasattr(os, "O_DIRECT")

    def adopt(self, places: Iterable[Place]) -> None:
        """Payloads that a restarted server may still lease."""
        for place in places:
            self._segments.setdefault(place.segment, _Segment()).needed += 1
        for number in sorted(self._segments):
            self._finish_if_unneeded(number)

    def allocate(self, size: int) -> Place:
        """See Payloads."""
        segment = self._segments.setdefault(self._active, _Segment())
        if segment.size and segment.size + size > self._segment_bytes:
            self._active += 1
            self._finish_if_unneeded(self._active - 1)
            segment = self._segments[self._active] = _Segment()
        place = Place(self._active, segment.size, size)
        segment.size += size
        segment.needed += 1
        return place

    def write(self, payloads: Sequence[tuple[Place, Payload]]) -> None:
        """See Payloads."""
        self._put_away()
        for number, members in groupby(payloads, key=lambda payload: payload[0].segment):
            writer = self._writer(number)
            for run in _runs(list(members)):
                writer.write(run[0][0].offset, [payload for _, payload in run])
            if self._is_synced:
                os.fdatasync(writer.descriptor)
        self._recent.add(payloads)

    def read(self, places: Sequence[Place]) -> list[Payload]:
        """See Payloads."""
        found = [self._recent.get(place) for place in places]
        pieces: list[Payload] = []
        for is_recent, members in groupby(zip(places, found, strict=True), key=lambda pair: pair[1] is not None):
            if is_recent:
                pieces += [payload for _, payload in members if payload is not None]
            else:
                pieces += [self._read_extent(extent) for extent in _extents([place for place, _ in members])]
        return pieces

    def _read_extent(self, extent: Sequence[Place]) -> bytes:
        number, start, end = extent[0].segment, extent[0].offset, extent[-1].offset + extent[-1].size
        path = _path(self._folder, number)
        with self._lock:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._reading[number] += 1
        try:
            data = _read_all(descriptor, start, end - start)
            _check_kept(path, descriptor)
            return data
        finally:
            with self._lock:
                self._reading -= Counter((number,))  # entries at zero go
            os.close(descriptor)

    def release(self, places: Iterable[Place]) -> None:
        """See Payloads."""
        places = list(places)
        self._recent.drop(places)
        for place in places:
            self._segments[place.segment].needed -= 1
            self._finish_if_unneeded(place.segment)

    def _finish_if_unneeded(self, number: int) -> None:
        if number != self._active and self._segments[number].needed == 0:
            self._finished.append((number, self._segments.pop(number).size))

    def _put_away(self) -> None:
        """Retain finished segments, oldest out first where they are too many."""
        while self._finished:
            number, size = self._finished.popleft()
            self._retained.append((number, size))
            self._retained_bytes += size
            self._drop_from_cache(number)
        while 0 <= self._retain_bytes < self._retained_bytes:
            number, size = self._retained.popleft()
            self._retained_bytes -= size
            self._discard(number)

    def _drop_from_cache(self, number: int) -> None:
        """What is kept for later need not push out what is in use."""
        try:
            descriptor = os.open(_path(self._folder, number), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    def _discard(self, number: int) -> None:
        path = _path(self._folder, number)
        with self._lock:
            if self._reading[number] or len(self._spares) >= SPARE_FILES:
                path.unlink(missing_ok=True)
            elif path.exists():
                self._spares.append(path.rename(path.with_suffix(".spare")))

    def close(self) -> None:
        """Close the file being written."""
        if self._open_segment is not None:
            self._open_segment[1].close()
            self._open_segment = None

    def _writer(self, number: int) -> SegmentWriter:
        if self._open_segment is not None and self._open_segment[0] == number:
            return self._open_segment[1]
        self.close()
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            if self._is_synced:
                _sync_folder(self._folder.parent)
        with self._lock:
            if self._spares:
                self._spares.pop().rename(_path(self._folder, number))
        writer = self._open_writer(_path(self._folder, number))
        if self._is_synced:
            _sync_folder(self._folder)
        self._open_segment = (number, writer)
        return writer

    def _open_writer(self, path: Path) -> SegmentWriter:
        if self._is_direct:
            try:
                return DirectFile(path)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                log.info("%s has no direct writes; payload goes through the page cache", self._folder)
                self._is_direct = False
        return CachedFile(path)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.seg"


def _files(folder: Path) -> Iterator[tuple[int, int]]:
    """Number and size of each segment."""
    for path in folder.glob("*.seg"):
        with suppress(FileNotFoundError):  # a server that is running may put it away
            yield int(path.stem), path.stat().st_size


def _check_kept(path: Path, descriptor: int) -> None:
    """A server in another process does not see who reads: it may have renamed the file, and written it over.

    Raises:
        FileNotFoundError: path is another file by now, or none. A file without any name is nobody's to write over.
    """
    held = os.fstat(descriptor)
    if held.st_nlink and held.st_ino != path.stat().st_ino:
        raise FileNotFoundError(errno.ENOENT, "the segment was put away while it was read", str(path))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs(payloads: Sequence[tuple[Place, Payload]]) -> Iterator[list[tuple[Place, Payload]]]:
    """Payloads of one segment, cut where they are not side by side."""
    run: list[tuple[Place, Payload]] = []
    for place, payload in payloads:
        is_adjacent = run and run[-1][0].offset + run[-1][0].size == place.offset
        if run and not (is_adjacent and len(run) < BUFFERS_A_CALL):
            yield run
            run = []
        run.append((place, payload))
    if run:
        yield run


def _extents(places: Sequence[Place]) -> Iterator[list[Place]]:
    run: list[Place] = []
    for place in places:
        if run and (run[-1].segment, run[-1].offset + run[-1].size) != (place.segment, place.offset):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _read_all(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise OSError(f"the segment ends at byte {offset + len(data)}, the index promises {offset + size}")
        data += more
    return data
