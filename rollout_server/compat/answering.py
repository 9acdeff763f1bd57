"""Large answers: written in a worker thread, and compressed where the client asks for it."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from starlette.requests import Request
from starlette.responses import Response

P = ParamSpec("P")
T = TypeVar("T")

JSON = "application/json"
GZIP_LEVEL = 1
GZIP_WINDOW_BITS = 16 + zlib.MAX_WBITS
MIN_GZIP_BYTES = 1000
"""Shorter answers are never compressed."""
IN_LOOP_BYTES = 64 << 10
"""Work on more than this goes to a thread, so that nobody waits for it."""


def accepts_gzip(request: Request) -> bool:
    """Whether the client takes compressed answers."""
    return "gzip" in request.headers.get("accept-encoding", "").lower()


def gzip_stream() -> zlib._Compress:
    """A compressor whose output is one gzip stream."""
    return zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, GZIP_WINDOW_BITS)


async def work(n_bytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that handles so many bytes: here, or in a thread where they are many."""
    if n_bytes <= IN_LOOP_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


async def json_answer(request: Request, text: bytes) -> Response:
    """A JSON text that was written already."""
    if len(text) < MIN_GZIP_BYTES or not accepts_gzip(request):
        return Response(text, media_type=JSON)
    packed = await work(len(text), _gzip, text)
    return Response(packed, media_type=JSON, headers={"Content-Encoding": "gzip", "Vary": "Accept-Encoding"})


def _gzip(text: bytes) -> bytes:
    stream = gzip_stream()
    return stream.compress(text) + stream.flush()
