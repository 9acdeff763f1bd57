"""A batch as JSON text, piece by piece: neither the text nor the lists behind it are ever in memory whole."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Sequence

from atroposlib.wire.columns import decode_groups
from atroposlib.wire.json_codec import group_to_json_text
from rollout_server.compat.answering import MIN_GZIP_BYTES, gzip_stream, work
from rollout_server.stores.base import Payload

PIECE_BYTES = 256 << 10
"""Payload that is written out at a time."""
HEAD, SEPARATOR, TAIL = b'{"batch":[', b",", b"]}"


class BatchPieces:
    """The answer of GET /batch.

    Args:
        blobs: the groups.
        may_compress: whether the client takes gzip.
    """

    def __init__(self, blobs: Sequence[Payload], *, may_compress: bool) -> None:
        self._slices = slices(blobs)
        self._may_compress = may_compress
        self._stream: zlib._Compress | None = None

    @property
    def is_compressed(self) -> bool:
        """Whether it goes out as gzip; known once the first piece was made."""
        return self._stream is not None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The pieces, at least one."""
        for index in range(len(self._slices)):
            yield await work(sum(len(blob) for blob in self._slices[index]), self._piece, index)

    def _piece(self, index: int) -> bytes:
        is_last = index == len(self._slices) - 1
        text = SEPARATOR.join(group_to_json_text(decode_groups(blob)[0]) for blob in self._slices[index])
        text = (SEPARATOR if index else HEAD) + text + (TAIL if is_last else b"")
        if index == 0 and self._may_compress and (not is_last or len(text) >= MIN_GZIP_BYTES):
            self._stream = gzip_stream()
        if self._stream is None:
            return text
        return self._stream.compress(text) + (self._stream.flush() if is_last else b"")


def slices(blobs: Sequence[Payload]) -> list[Sequence[Payload]]:
    """Cut a batch into parts of about PIECE_BYTES, whole groups each."""
    parts: list[list[Payload]] = [[]]
    size = 0
    for blob in blobs:
        if size >= PIECE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(blob)
        size += len(blob)
    return list(parts)
