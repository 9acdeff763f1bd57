"""HTTP/1.1 over one kept-alive blocking socket: as little work as a client can do.

The kernel copies while the interpreter lock is free, so a few threads of these load a server for a fraction of its own
cost. Answers must state their length or come in chunks.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

TIMEOUT_S = 180.0
IDLE_S = 3.0
"""A connection that was not used for so long is made anew: uvicorn hangs up after 5 s."""
FIRST_READ_BYTES = 64 << 10
COLUMNS_HEADER = b"Content-Type: application/vnd.atropos.groups\r\n"
JSON_HEADER = b"Content-Type: application/json\r\n"


@dataclass(frozen=True)
class Answer:
    """Status and body."""

    status: int
    body: bytes

    def expect(self, status: int = 200) -> bytes:
        """The body, if the status is the expected one."""
        if self.status != status:
            raise RuntimeError(f"expected HTTP {status}, got {self.status}: {self.body[:500]!r}")
        return self.body


class HttpConnection:
    """One connection to 127.0.0.1:port."""

    def __init__(self, port: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self._address = ("127.0.0.1", port)
        self._timeout_s = timeout_s
        self._socket = self._connect()
        self._used = time.monotonic()
        self._host = b"Host: 127.0.0.1:%d\r\n" % port
        self._buffer = bytearray(FIRST_READ_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def call(self, method: bytes, path: str, body: bytes | bytearray = b"", headers: bytes = b"") -> Answer:
        """Send one request and read its whole answer."""
        self.send(method, path, body, headers)
        return self.answer()

    def send(self, method: bytes, path: str, body: bytes | bytearray = b"", headers: bytes = b"") -> None:
        """Send one request; its answer must be read before the next one is sent."""
        length = b"Content-Length: %d\r\n" % len(body) if body or method == b"POST" else b""
        head = b"%s %s HTTP/1.1\r\n%s%s%s\r\n" % (method, path.encode(), self._host, length, headers)
        if time.monotonic() - self._used > IDLE_S:
            self._socket.close()
            self._socket = self._connect()
        self._socket.sendall(head)
        if body:
            self._socket.sendall(body)
        self._used = time.monotonic()

    def answer(self) -> Answer:
        """Read the whole answer of the request that was sent."""
        return self._read_answer()

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=self._timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _read_answer(self) -> Answer:
        filled, end = 0, -1
        while end < 0:
            filled += self._receive(filled)
            end = self._buffer.find(b"\r\n\r\n", 0, filled)
        head = bytes(self._buffer[:end]).lower()
        status = int(head[9:12])
        if b"\r\ntransfer-encoding: chunked" in head:
            return Answer(status, self._read_chunks(end + 4, filled))
        length = _content_length(head)
        return Answer(status, self._read_plain(end + 4, filled, length))

    def _read_plain(self, start: int, filled: int, length: int) -> bytes:
        end = start + length
        if end > len(self._buffer):
            self._buffer.extend(bytes(end - len(self._buffer)))
        while filled < end:
            filled += self._receive(filled)
        with memoryview(self._buffer) as view:
            return bytes(view[start:end])

    def _read_chunks(self, start: int, filled: int) -> bytes:
        body = bytearray()
        while True:
            while (line_end := self._buffer.find(b"\r\n", start, filled)) < 0:
                filled += self._receive(filled)
            size = int(self._buffer[start:line_end].split(b";")[0], 16)
            start = line_end + 2
            while filled < start + size + 2:
                filled += self._receive(filled)
            body += self._buffer[start : start + size]
            start += size + 2
            if size == 0:
                return bytes(body)

    def _receive(self, at: int) -> int:
        if at == len(self._buffer):
            self._buffer.extend(bytes(len(self._buffer)))
        with memoryview(self._buffer) as view:
            received = self._socket.recv_into(view[at:])
        if received == 0:
            raise ConnectionError("the server closed the connection in the middle of an answer")
        return received


def _content_length(head: bytes) -> int:
    _, found, rest = head.partition(b"\r\ncontent-length:")
    if not found:
        return 0  # 204 states none
    return int(rest.split(b"\r\n", 1)[0])
