"""Rollout servers for tests: child processes that are killed and started at will, and one on a thread for quick looks."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from rollout_server.app import create_app
from rollout_server.config import ServerConfig
from rollout_server.http.serving import listen, make_server

START_TIMEOUT_S = 30.0


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RolloutServerProcess:
    """`run-api` as users start it."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.parent / f"{data_dir.name}.log"
        self._command = [
            sys.executable, "-m", "rollout_server.cli",
            "--port", str(self.port), "--data-dir", str(data_dir), "--synchronous", "normal", *options,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            try:
                if httpx.get(f"{self.url}/healthz", timeout=1.0).status_code == 200:
                    return
            except httpx.TransportError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        raise AssertionError(f"rollout server did not start:\n{self.log.read_text()}")

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def wait(self) -> int:
        """Until it has ended by itself; returns the exit status."""
        assert self._process is not None
        return self._process.wait(timeout=15)

    def kill(self) -> None:
        """SIGKILL: no clean-up of any kind. Nothing to do where the process has ended already."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=15)


@contextmanager
def rollout_server_on_a_thread(config: ServerConfig) -> Iterator[str]:
    """The server as run-api serves it, in this process; gives its URL."""
    listener = listen(config)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = make_server(create_app(config), config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="rollout-server")
    thread.start()
    try:
        end = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            assert thread.is_alive(), "the rollout server did not start"
            assert time.monotonic() < end, "the rollout server takes too long to start"
            time.sleep(0.01)
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=15)
        listener.close()
