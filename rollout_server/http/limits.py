"""What a request may cost: bytes of one body, bytes of all bodies together, and the time a body may take to arrive."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from atroposlib.errors import BodyEncodingError, BodyTimeoutError, BodyTooLargeError, MediaTypeError, OverloadedError
from rollout_server.config import ServerConfig
from rollout_server.http.whole_body import EXTENSION, BodyBuffer, Takeover

WHOLE_BODY_BYTES = 64 << 10
"""Smaller bodies come in one or two pieces anyway."""
MIN_BODY_BYTES_PER_S = 64 << 10
"""A body has body_timeout_s, and a second more for each of these that arrived: slow links pass, slow-loris does not."""
DRAIN_TIMEOUT_S = 1.0
"""How long the rest of a refused body is thrown away, so that its sender gets to read the refusal."""
INFLATE_STEP_BYTES = 1 << 20
"""Inflated at once, before other requests get their turn."""
GZIP_WINDOW_BITS = 16 + zlib.MAX_WBITS


class InflightBytes:
    """Bytes of all request bodies that are in memory now.

    Args:
        limit: max_inflight_bytes of the server.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class Charge:
    """One request's share of the bytes in flight; the middleware gives it back when the request has been answered."""

    def __init__(self, inflight: InflightBytes) -> None:
        self._inflight = inflight
        self.n_bytes = 0
        self.whole_bytes = 0
        """Those that came in past receive, where nobody else counts them."""

    def check(self, n_bytes: int) -> None:
        """Refuse what cannot be taken now.

        Raises:
            OverloadedError: the bodies in flight leave no room for n_bytes more.
        """
        if self._inflight.used + n_bytes > self._inflight.limit:
            raise OverloadedError(
                f"request bodies in flight hold {self._inflight.used} bytes, {n_bytes} more would pass"
                f" max_inflight_bytes={self._inflight.limit}; send again after Retry-After"
            )

    def add(self, n_bytes: int) -> None:
        """Take n_bytes more. Raises OverloadedError."""
        self.check(n_bytes)
        self._inflight.used += n_bytes
        self.n_bytes += n_bytes

    def release(self) -> None:
        """Give everything back."""
        self._inflight.used -= self.n_bytes
        self.n_bytes = 0


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """The whole body, inflated where it came as gzip, refused as soon as it passes a limit.

    Raises:
        BodyTooLargeError: over max_body_bytes as sent, or over max_decompressed_bytes inflated (413).
        BodyTimeoutError: it arrives too slowly (408).
        BodyEncodingError: not what Content-Encoding says, cut short, or an encoding that is not understood (400).
        OverloadedError: too many bytes in flight (429).
    """
    is_gzip = _is_gzip(request)
    try:
        _check_stated_length(request, config)
        chunks = _chunks(request, config)
        return await _collect(_inflate(chunks, config.max_decompressed_bytes) if is_gzip else chunks, _charge(request))
    except BodyTooLargeError:
        await _throw_away(request)
        raise


async def read_payload(request: Request, config: ServerConfig) -> bytes | memoryview:
    """As read_body, for bodies of megabytes: without copies where the connection can read into one buffer."""
    take_over: Takeover | None = request.scope.get("extensions", {}).get(EXTENSION)
    stated = request.headers.get("content-length", "")
    is_large = stated.isdigit() and WHOLE_BODY_BYTES <= int(stated) <= config.max_body_bytes
    if take_over is None or not is_large or _is_gzip(request):
        return await read_body(request, config)
    size, charge = int(stated), _charge(request)
    charge.check(size)  # a refusal inside the body would be lost with the connection
    buffer = take_over(size)
    if buffer is None:
        return await read_body(request, config)
    charge.add(size)
    try:
        return await _filled(buffer, config)
    finally:
        charge.whole_bytes += buffer.received


async def _filled(buffer: BodyBuffer, config: ServerConfig) -> memoryview:
    """The body, within its deadline."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    try:
        while not buffer.done.done():
            received = buffer.received
            left_s = start + config.body_timeout_s + received / MIN_BODY_BYTES_PER_S - loop.time()
            if left_s <= 0:
                raise _too_slow(received, config)
            await asyncio.wait([buffer.done], timeout=left_s)
        return buffer.done.result()
    finally:
        buffer.give_up()


def check_media_type(request: Request, *expected: str) -> None:
    """Refuse a body that says it is something else; one that says nothing is taken for what the route expects.

    Raises:
        MediaTypeError: 415, naming what to send.
    """
    stated = request.headers.get("content-type")
    if stated is not None and stated.partition(";")[0].strip().lower() not in expected:
        raise MediaTypeError(f"Content-Type {stated[:80]!r} is not understood here; send {expected[0]}")


def _charge(request: Request) -> Charge:
    charge: Charge = request.state.charge
    return charge


async def _collect(chunks: AsyncIterator[bytes], charge: Charge) -> bytes:
    parts: list[bytes] = []
    async for chunk in chunks:
        charge.add(len(chunk))
        parts.append(chunk)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _check_stated_length(request: Request, config: ServerConfig) -> None:
    stated = request.headers.get("content-length", "")
    if not stated.isdigit():
        return
    if int(stated) > config.max_body_bytes:
        raise _too_large(f"of {stated} bytes", config)
    _charge(request).check(int(stated))


async def _chunks(request: Request, config: ServerConfig) -> AsyncIterator[bytes]:
    """The body as it arrives, within its size limit and its deadline."""
    start, received, has_more = asyncio.get_running_loop().time(), 0, True
    while has_more:
        try:
            async with asyncio.timeout_at(start + config.body_timeout_s + received / MIN_BODY_BYTES_PER_S):
                message = await request.receive()
        except TimeoutError as error:
            raise _too_slow(received, config) from error
        if message["type"] == "http.disconnect":
            raise BodyEncodingError(f"the connection closed after {received} bytes, inside the body; send whole bodies")
        chunk: bytes = message.get("body", b"")
        received += len(chunk)
        if received > config.max_body_bytes:
            raise _too_large(f"of {received} bytes or more", config)
        if chunk:
            yield chunk
        has_more = message.get("more_body", False)


def _too_large(size: str, config: ServerConfig) -> BodyTooLargeError:
    return BodyTooLargeError(f"body {size} is over max_body_bytes={config.max_body_bytes}; send fewer groups a request")


def _too_slow(received: int, config: ServerConfig) -> BodyTimeoutError:
    return BodyTimeoutError(
        f"{received} bytes of the body came within body_timeout_s={config.body_timeout_s:g} and a second for each"
        f" {MIN_BODY_BYTES_PER_S} bytes; send it faster, or in smaller requests"
    )


def _is_gzip(request: Request) -> bool:
    """Old clients are lax about the header: anything that contains gzip, in any case, means gzip."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity") and "gzip" not in encoding:
        raise BodyEncodingError(f"Content-Encoding {encoding[:40]!r} is not understood; send gzip or nothing")
    return "gzip" in encoding


async def _inflate(chunks: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    """Inflate gzip members as they arrive, never more than a step ahead of the limit. An empty body stays empty."""
    inflater, inflated, is_empty = zlib.decompressobj(GZIP_WINDOW_BITS), 0, True
    async for chunk in chunks:
        is_empty = False
        while chunk:  # the trailer stays behind as long as output does: no input left means nothing left inside
            if inflater.eof:
                inflater = zlib.decompressobj(GZIP_WINDOW_BITS)
            try:
                piece = inflater.decompress(chunk, INFLATE_STEP_BYTES)
            except zlib.error as error:
                raise BodyEncodingError(f"Content-Encoding says gzip, but the body is not gzip: {error}") from error
            inflated += len(piece)
            if inflated > limit:
                raise BodyTooLargeError(
                    f"gzip body inflates to more than max_decompressed_bytes={limit}; send fewer groups a request"
                )
            yield piece
            await asyncio.sleep(0)
            chunk = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
    if not is_empty and not inflater.eof:
        raise BodyEncodingError(f"gzip body ends early, after {inflated} inflated bytes; send the whole stream")


async def _throw_away(request: Request) -> None:
    if "expect" in request.headers:  # the sender waits for leave to send the body at all
        return
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            message = await request.receive()
            while message["type"] == "http.request" and message.get("more_body", False):
                message = await request.receive()
    except TimeoutError:
        pass
