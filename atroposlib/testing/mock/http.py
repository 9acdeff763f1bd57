"""A small HTTP/1.1 server over asyncio's protocols: thousands of connections, one task a request, nothing to install."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

MAX_HEAD_BYTES = 64 * 1024
BACKLOG = 4096
_TURNS_TO_ACCEPT = 6
"""Of the event loop, more than it needs until a connection that it is just accepting is among those that are known."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back to the client."""

    status: int
    body: bytes
    content_type: str = "application/json"
    is_truncated: bool = False
    """Send half of the body that Content-Length announces, then close."""


Handler: TypeAlias = Callable[[str, str, bytes], Awaitable[Answer | None]]
"""Method, path with query, body. None resets the connection."""


@dataclass(frozen=True, slots=True)
class _Head:
    method: str
    path: str
    body_bytes: int
    wants_continue: bool
    is_last: bool
    """The client asked for `Connection: close`."""


class HttpServer:
    """Listens on one port; `stop` looks from outside as a SIGKILL does: connections reset, port closed."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._listener: asyncio.Server | None = None
        self.connections: set[_Connection] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, which the system chooses when it is 0."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: _Connection(self._handle, self.connections), host, port, backlog=BACKLOG, reuse_address=True
        )
        chosen: int = self._listener.sockets[0].getsockname()[1]
        return chosen

    async def stop(self) -> None:
        """Reset every connection, end every request, close the port."""
        if self._listener is None:
            return
        # Python 3.11 loses, unclosed, a connection that is being accepted while its listener closes.
        for listening in self._listener.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(_TURNS_TO_ACCEPT):
            await asyncio.sleep(0)
        self._listener.close()
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        for connection in list(self.connections):
            connection.reset()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._listener.wait_closed()
        self._listener = None


class _Connection(asyncio.Protocol):
    """One client; its requests are answered one after the other."""

    def __init__(self, handle: Handler, connections: set[_Connection]) -> None:
        self._handle = handle
        self._connections = connections
        self._buffer = bytearray()
        self._head: _Head | None = None
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        # Engines abort the generation of a client that is gone.
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self.task is None:
            self._start_next()

    def reset(self) -> None:
        """Close with RST, so that the client sees a broken connection and not the end of an answer."""
        raw = self._transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._transport.abort()

    def _start_next(self) -> None:
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    self.reset()
                return
            self._head = _parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            if self._head is None:
                self._transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self._transport.close()
                return
            if self._head.wants_continue:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = self._head
        if len(self._buffer) < head.body_bytes:
            return
        body = bytes(self._buffer[: head.body_bytes])
        del self._buffer[: head.body_bytes]
        self._head = None
        self.task = asyncio.get_running_loop().create_task(self._serve(head, body))

    async def _serve(self, head: _Head, body: bytes) -> None:
        answer = await self._handle(head.method, head.path, body)
        self.task = None
        if self._transport.is_closing():
            return
        if answer is None:
            self.reset()
            return
        sent = answer.body[: len(answer.body) // 2] if answer.is_truncated else answer.body
        self._transport.write(
            b"HTTP/1.1 %d MOCK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
            % (answer.status, answer.content_type.encode(), len(answer.body))
            + sent
        )
        if answer.is_truncated or head.is_last:
            self._transport.close()
        elif self._buffer:
            self._start_next()


def _parse_head(head: bytes) -> _Head | None:
    """None when it is no request with a known length."""
    request, *lines = head.split(b"\r\n")
    parts = request.split(b" ")
    if len(parts) != 3:
        return None
    body_bytes, wants_continue, is_last = 0, False, parts[2] == b"HTTP/1.0"
    for line in lines:
        name, _, value = line.partition(b":")
        match name.lower():
            case b"content-length":
                if not value.strip().isdigit():
                    return None
                body_bytes = int(value)
            case b"transfer-encoding":
                return None
            case b"expect":
                wants_continue = True
            case b"connection" if value.strip().lower() == b"close":
                is_last = True
    return _Head(parts[0].decode("latin-1"), parts[1].decode("latin-1"), body_bytes, wants_continue, is_last)
