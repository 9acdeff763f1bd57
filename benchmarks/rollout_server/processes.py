"""Server processes under measurement: started on a free port, awaited, watched and stopped."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.rollout_server.http_connection import HttpConnection

ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUT = ROOT / "runs" / "benchmarks"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder on the disk that runs use, gone afterwards."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="scratch-", dir=OUTPUT))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process tree, in bytes."""

    rss: int
    anonymous: int


@dataclass(frozen=True)
class Server:
    """A running server and its descendants."""

    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        """User and system seconds used so far by the whole tree."""
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._tree()))

    def memory(self) -> Memory:
        """What the tree holds now."""
        tables = [_proc_status(process.pid) for process in self._tree()]
        return Memory(sum(table["VmRSS"] for table in tables), sum(table["RssAnon"] for table in tables))

    def _tree(self) -> Sequence[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


@contextmanager
def running(
    command: Sequence[str | Path],
    port: int,
    *,
    ready_path: str | None = "/",
    folder: Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server as long as the block lasts. It is ready when ready_path answers, or when it accepts, if None.

    Args:
        folder: where its log goes.
        cwd: a server of another package of the same name as ours must not start in our folder.

    Raises:
        RuntimeError: it did not come up; the text ends with its output.
    """
    log = folder / f"server-{port}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=out, cwd=cwd, env={**os.environ, **(env or {})}
        )
    try:
        _wait_until_ready(process, port, ready_path, log)
        yield Server(port, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=STOP_TIMEOUT_S)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, ready_path: str | None, log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with HttpConnection(port, timeout_s=5.0) as connection:
                if ready_path is None or connection.call(b"GET", ready_path).status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(
        f"server on port {port} did not come up within {START_TIMEOUT_S:.0f} s: {log.read_text()[-1500:]}"
    )


def _proc_status(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
