"""A TCP proxy that can stop forwarding without closing a connection, as a network does that drops packets."""

from __future__ import annotations

import contextlib
import socket
import threading


class StallingProxy:
    """Forwards connections to `target`.

    Args:
        target: host and port.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._flowing = threading.Event()
        self._flowing.set()
        self._stall_at: bytes | None = None
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Forward nothing more, in either direction."""
        self._flowing.clear()

    def stall_at(self, content: bytes) -> None:
        """Stall as soon as a client sends this, and keep it back."""
        self._stall_at = content

    def flow(self) -> None:
        """Forward what was kept back and all that comes."""
        self._stall_at = None
        self._flowing.set()

    def close(self) -> None:
        """Close every connection."""
        self._flowing.set()
        self._listener.close()
        for end in self._sockets:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [client, server]
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                if is_request and self._stall_at is not None and self._stall_at in content:
                    self.stall()
                self._flowing.wait()
                sink.sendall(content)
            self._flowing.wait()
            sink.shutdown(socket.SHUT_WR)
