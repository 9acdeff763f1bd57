"""TCP ports for the processes of a run: free ones, and who holds one that is not."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping

import psutil

from atroposlib.launch.config import LaunchConfigError


def assign_ports(wanted: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """A port for each name.

    Args:
        wanted: for each name (the config key of the port) the host and the port, 0 for any free one.
    Raises:
        LaunchConfigError: a port is in use, with who uses it.
    """
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as open_sockets:
        # All are held until all are chosen, so that no two get the same; fixed ones first.
        for name, (host, port) in sorted(wanted.items(), key=lambda item: item[1][1] == 0):
            listener = open_sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen(1)
            except OSError as error:
                raise LaunchConfigError(
                    f"{name}: cannot listen on {host}:{port}: {_reason(error, port)}",
                    hint=f"stop that process, or take a free port: add {name}=0 to the command",
                ) from None
            ports[name] = listener.getsockname()[1]
    return ports


def _reason(error: OSError, port: int) -> str:
    holder = _holder(port)
    return f"in use by {holder}" if holder else str(error.strerror or error).lower()


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid and connection.laddr[1:] == (port,):
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
