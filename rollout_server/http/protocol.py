"""uvicorn's HTTP/1.1 protocol with the limits that it leaves out: header bytes, header time, connections; and whole bodies."""

from __future__ import annotations

import asyncio
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from rollout_server.config import ServerConfig
from rollout_server.http.whole_body import EXTENSION, BodyBuffer

BODY_AHEAD_BYTES = 1 << 20
"""Of one request, received and not yet looked at."""


class _HeadersTooLargeError(Exception):
    """Stops the parser."""


def bounded_protocol(config: ServerConfig) -> type[HttpToolsProtocol]:
    """The protocol class for uvicorn, with this server's limits."""

    class BoundedProtocol(_BoundedProtocol):
        limits = config

    return BoundedProtocol


def _parser(protocol: HttpToolsProtocol) -> httptools.HttpRequestParser:
    """A parser as uvicorn makes it: what follows a request with Connection: close is not an error."""
    parser = httptools.HttpRequestParser(protocol)
    set_leniencies = getattr(parser, "set_dangerous_leniencies", None)
    if set_leniencies is not None:  # httptools before 0.6.3 has none
        set_leniencies(lenient_data_after_close=True)
    return parser


class _BoundedProtocol(HttpToolsProtocol):
    limits: ServerConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._is_in_headers = True
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the server has max_connections={self.limits.max_connections} connections open; try again",
                retry_after=True,
            )
            return
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        was_in_headers = self._is_in_headers
        super().data_received(data)
        # Headers that are not complete are inside the parser, where nobody counts them.
        if was_in_headers and self._is_in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > self.limits.max_header_bytes:
                self._refuse_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_headers, self._header_bytes = True, 0
        if self._header_timer is None:
            self._start_header_timer()

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._stop_header_timer()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.max_header_bytes:
            raise _HeadersTooLargeError
        extensions: dict[str, Any] = {}
        self.scope["extensions"] = extensions
        super().on_headers_complete()
        extensions[EXTENSION] = partial(self._take_over, self.cycle)

    def on_body(self, body: bytes) -> None:
        """As uvicorn's, but more of a body may come in before its reader is asked: groups are megabytes."""
        if self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) > BODY_AHEAD_BYTES:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def _take_over(self, cycle: RequestResponseCycle, size: int) -> BodyBuffer | None:
        """See whole_body.Takeover. Until the buffer is full this protocol sees nothing of the connection but its end."""
        is_current = cycle is self.cycle and cycle.more_body and not cycle.disconnected and len(cycle.body) <= size
        if not is_current or cycle.waiting_for_100_continue or self.transport.is_closing():
            return None
        head, cycle.body = cycle.body, bytearray()
        cycle.message_event.clear()
        buffer = BodyBuffer(size, head, owner=self, transport=self.transport, on_end=partial(self._body_ended, cycle))
        self.flow.resume_reading()
        return buffer

    def _body_ended(self, cycle: RequestResponseCycle, is_whole: bool) -> None:
        """The parser still waits for bytes that it did not see: right to swallow the rest of a body, not for another request."""
        if is_whole:
            cycle.more_body = False
            self.parser = _parser(self)
        else:
            cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser stopped."""
        if self._is_refused:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers or [])
        if size > self.limits.max_header_bytes:
            self._refuse_headers()
        else:
            super().send_400_response(msg)

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self._close_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_late(self) -> None:
        self._header_timer = None
        self._refuse(
            HTTPStatus.REQUEST_TIMEOUT,
            f"no whole request headers within header_timeout_s={self.limits.header_timeout_s:g}",
        )

    def _refuse_headers(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"request line and headers are over max_header_bytes={self.limits.max_header_bytes}; send fewer or shorter ones",
        )

    def _refuse(self, status: HTTPStatus, text: str, *, retry_after: bool = False) -> None:
        """Answer outside the application, and close."""
        self._is_refused = True
        self._stop_header_timer()
        if self.transport.is_closing():
            return
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            "content-type: text/plain; charset=utf-8",
            f"content-length: {len(text)}",
            "connection: close",
            *(["retry-after: 1"] if retry_after else []),
        ]
        self.transport.write("\r\n".join([*lines, "", text]).encode("ascii"))
        self.transport.close()
