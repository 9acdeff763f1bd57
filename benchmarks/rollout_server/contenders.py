"""The servers that can be measured: how each is started and how it is spoken to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers import peer_python
from benchmarks.rollout_server.exchanges import (
    ColumnsExchange,
    Exchange,
    JsonExchange,
    LoopbackExchange,
    MoverExchange,
)
from benchmarks.rollout_server.processes import ROOT, Server, free_port, running, scratch_folder
from benchmarks.rollout_server.shapes import Shape


@dataclass(frozen=True)
class Contender:
    """A server program and the protocol it is measured with."""

    about: str
    command: Callable[[int, Path], Sequence[str | Path]]
    """Port and scratch folder to command line."""
    exchange: Callable[[Shape], Exchange]
    ready_path: str | None = "/"
    is_peer: bool = False
    """Runs packages of its own, which those of our folder must not hide."""

    @contextmanager
    def serve(self) -> Iterator[Server]:
        """A fresh server with an empty scratch folder."""
        port = free_port()
        with scratch_folder() as folder:
            command, cwd = self.command(port, folder), folder if self.is_peer else ROOT
            with running(command, port, ready_path=self.ready_path, folder=folder, cwd=cwd) as server:
                yield server


def run_api(port: int, folder: Path, options: Sequence[str] = ()) -> list[str | Path]:
    """Our server, as users start it."""
    return [
        sys.executable, "-m", "rollout_server.cli", "--port", str(port), "--data-dir", folder / "data",
        "--log-level", "warning", *options,
    ]  # fmt: skip


def upstream(port: int, folder: Path) -> list[str | Path]:
    """Upstream's server as its run-api starts it, without the lines of its access log."""
    return [
        peer_python("atroposlib"), "-m", "uvicorn", "atroposlib.api:app", "--port", str(port),
        "--no-access-log", "--log-level", "warning",
    ]  # fmt: skip


def ours(*options: str) -> Callable[[int, Path], Sequence[str | Path]]:
    """Our server with options."""
    return partial(run_api, options=options)


CONTENDERS: Mapping[str, Contender] = {
    "ours-full": Contender(
        "ours, an answer survives a power cut", ours("--synchronous", "full"), ColumnsExchange, "/healthz"
    ),
    "ours-normal": Contender(
        "ours, an answer survives SIGKILL", ours("--synchronous", "normal"), ColumnsExchange, "/healthz"
    ),
    "ours-unretained": Contender(
        "as ours-full, and payload goes when it is committed",
        ours("--synchronous", "full", "--retain-bytes", "0"),
        ColumnsExchange,
        "/healthz",
    ),
    "ours-memory": Contender("ours, nothing on disk", ours("--store", "memory"), ColumnsExchange, "/healthz"),
    "ours-json": Contender("ours over the old JSON routes", ours("--synchronous", "normal"), JsonExchange, "/healthz"),
    "upstream": Contender("atroposlib 0.4.0, /scored_data_list", upstream, JsonExchange, is_peer=True),
    "upstream-single": Contender(
        "atroposlib 0.4.0, /scored_data, one group a batch",
        upstream,
        partial(JsonExchange, listed=False),
        is_peer=True,
    ),
    "mover": Contender(
        "bare ASGI, same bytes in and out",
        lambda port, folder: [sys.executable, "-m", "benchmarks.rollout_server.mover", str(port)],
        MoverExchange,
    ),
    "loopback": Contender(
        "sockets in and out of one process",
        lambda port, folder: [sys.executable, "-m", "benchmarks.rollout_server.relay", str(port)],
        LoopbackExchange,
        None,
    ),
}


def contender(name: str) -> Contender:
    """The contender of this name.

    Raises:
        ValueError: there is none; the text lists them.
    """
    if name not in CONTENDERS:
        raise ValueError(f"no contender {name!r}; there are {', '.join(CONTENDERS)}")
    return CONTENDERS[name]
