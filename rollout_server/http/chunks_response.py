"""An answer made of pieces: large ones are sent as they are, small ones joined until they are large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rollout_server.stores.base import Payload

SMALL_BYTES = 64 << 10
"""Up to here copying costs less than one more message."""
JOINED_BYTES = 512 << 10


class ChunksResponse(Response):
    """See starlette.responses.Response.

    Args:
        chunks: the body, piece after piece.
        media_type: Content-Type.
    """

    def __init__(self, chunks: Sequence[Payload], media_type: str) -> None:
        size = sum(len(chunk) for chunk in chunks)
        super().__init__(headers={"Content-Length": str(size)}, media_type=media_type)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for chunk in coalesce(self._chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def coalesce(chunks: Sequence[Payload]) -> Iterator[Payload]:
    """The same bytes in fewer pieces: neighbours of at most SMALL_BYTES are joined to about JOINED_BYTES."""
    small: list[Payload] = []
    n_bytes = 0
    for chunk in chunks:
        is_small = len(chunk) <= SMALL_BYTES
        if small and (not is_small or n_bytes + len(chunk) > JOINED_BYTES):
            yield b"".join(small)
            small, n_bytes = [], 0
        if is_small:
            small.append(chunk)
            n_bytes += len(chunk)
        else:
            yield chunk
    if small:
        yield b"".join(small)
