"""Bytes from sockets into one process and out to another socket: what the loopback device allows."""

from __future__ import annotations

import queue
import socket
import struct
import sys
import threading

from benchmarks.rollout_server.exchanges import receive_exactly

frames: queue.SimpleQueue[bytearray] = queue.SimpleQueue()


def serve(connection: socket.socket) -> None:
    """A connection first says whether it posts (P) or takes (T)."""
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            step = _keep if receive_exactly(connection, 1) == b"P" else _give
            while True:
                step(connection)
        except (ConnectionError, OSError):
            return


def _keep(connection: socket.socket) -> None:
    (length,) = struct.unpack("<Q", receive_exactly(connection, 8))
    frames.put(receive_exactly(connection, length))
    connection.sendall(b".")


def _give(connection: socket.socket) -> None:
    receive_exactly(connection, 1)
    frame = frames.get()
    connection.sendall(struct.pack("<Q", len(frame)))
    connection.sendall(frame)


def main() -> None:
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
