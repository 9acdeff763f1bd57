"""An answer made of large pieces that are sent as they are, without being joined first."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rollout_server.stores.base import Payload


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
        for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
