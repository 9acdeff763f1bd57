"""Upstream's own client code against our old routes and against upstream's server, with gzip and without."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers import peer_python
from benchmarks.rollout_server.contenders import contender
from benchmarks.rollout_server.exchanges import register_json
from benchmarks.rollout_server.http_connection import HttpConnection
from benchmarks.rollout_server.processes import Server
from benchmarks.rollout_server.report import Cell, progress, save, table
from benchmarks.rollout_server.shapes import Shape

CLIENT = Path(__file__).parent / "upstream_client.py"
CLIENT_TIMEOUT_S = 330.0
GROUPS_PER_BATCH = 8
EXAMPLES = """Eight sends in flight and one trainer. The clients share the cores with the server and cost more than ours does,
so the server's CPU seconds a group are the figure that compares.

examples:
  python -m benchmarks.rollout_server json
  python -m benchmarks.rollout_server json --shape 8x512 --groups 64 --encodings plain
"""


@dataclass(frozen=True)
class JsonFigures:
    """One server, one encoding."""

    server: str
    encoding: str
    groups_per_s: float
    server_cpu_ms_per_group: float
    poster_cpu_ms_per_group: float
    taker_cpu_ms_per_group: float


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command line."""
    parser = commands.add_parser(
        "json", help=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=Shape.parse, default="8x2048", help="sequences x tokens (8x2048)")
    parser.add_argument("--groups", type=int, default=64, help="groups sent, a multiple of 8 (64)")
    parser.add_argument("--servers", default="ours-json,upstream", help="contenders (ours-json,upstream)")
    parser.add_argument("--encodings", default="gzip,plain", help="gzip,plain")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure each server with each encoding."""
    figures = []
    for encoding in args.encodings.split(","):
        for name in args.servers.split(","):
            progress(f"{name}, {encoding}: {args.groups} groups of {args.shape}")
            figures.append(_measure(name, encoding, args.shape, args.groups))
    rows: Sequence[Sequence[Cell]] = [list(asdict(each).values()) for each in figures]
    columns = ["server", "encoding", "groups/s", "server CPU ms/group", "poster CPU ms/group", "taker CPU ms/group"]
    print(table(columns, rows))
    save("json", {"shape": str(args.shape), "groups": args.groups, "json": [asdict(each) for each in figures]})


def _measure(name: str, encoding: str, shape: Shape, groups: int) -> JsonFigures:
    with contender(name).serve() as server, ExitStack() as stack:
        with HttpConnection(server.port) as connection:
            register_json(connection, batch_size=GROUPS_PER_BATCH * shape.sequences, group_size=shape.sequences)
        clients = [stack.enter_context(_client(role, server, groups, shape, encoding)) for role in ("post", "take")]
        cpu_s = server.cpu_s()
        for client in clients:
            _say_go(client)
        poster, taker = [_result(client) for client in clients]
        server_cpu_s = server.cpu_s() - cpu_s
    ms = 1e3 / groups
    return JsonFigures(
        name, encoding, groups / taker["seconds"], server_cpu_s * ms, poster["cpu_s"] * ms, taker["cpu_s"] * ms
    )


@contextmanager
def _client(role: str, server: Server, groups: int, shape: Shape, encoding: str) -> Iterator[subprocess.Popen[str]]:
    """A client process that has built its groups and waits."""
    arguments = [role, f"http://127.0.0.1:{server.port}", groups, shape.sequences, shape.tokens_each, encoding]
    # -P: our atroposlib must not hide upstream's.
    command = [str(part) for part in (peer_python("atroposlib"), "-P", CLIENT, *arguments)]
    client = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert client.stdout is not None
        if client.stdout.readline() != "ready\n":
            raise RuntimeError(f"upstream's client did not start: {' '.join(command)}")
        yield client
    finally:
        client.kill()
        client.communicate()


def _say_go(client: subprocess.Popen[str]) -> None:
    assert client.stdin is not None
    client.stdin.write("go\n")
    client.stdin.flush()


def _result(client: subprocess.Popen[str]) -> dict[str, float]:
    out, errors = client.communicate(timeout=CLIENT_TIMEOUT_S)
    if client.returncode != 0:
        raise RuntimeError(f"upstream's client ended with status {client.returncode}: {errors[-1500:]}")
    result: dict[str, float] = json.loads(out)
    return result
