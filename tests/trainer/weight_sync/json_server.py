"""HTTP for FAKE engines: JSON routes on threads, and a death like that of a killed process."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias
from urllib.parse import urlsplit

Answer: TypeAlias = Callable[[str, str, dict[str, Any]], tuple[int, Any]]
"""From path, query and body to status and content. A string is sent as it is, all else as JSON."""


class JsonServer(ThreadingHTTPServer):
    """Answers at `url` until it dies. An answer that raises breaks its connection."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.connections: list[socket.socket] = []
        """All that were ever opened."""
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        """Close the door and every connection, as the kernel does for a killed process."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                # Not only close(): a handler that is at work keeps the socket open.
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, *_: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    server: JsonServer
    protocol_version = "HTTP/1.1"  # keeps connections open, as vLLM and SGLang do

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        self._answer(json.loads(self.rfile.read(length) or b"{}"))

    def _answer(self, body: dict[str, Any]) -> None:
        url = urlsplit(self.path)
        status, answer = self.server.answer(url.path, url.query, body)
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
