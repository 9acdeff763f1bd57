"""What a status call and a batch cost while the queue is empty and while it is long."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass

from benchmarks.rollout_server.contenders import contender
from benchmarks.rollout_server.exchanges import Taker
from benchmarks.rollout_server.filling import fill
from benchmarks.rollout_server.http_connection import JSON_HEADER, HttpConnection
from benchmarks.rollout_server.report import progress, save, table
from benchmarks.rollout_server.shapes import Shape

SMALL = Shape(sequences=2, tokens_each=8)
STATUS_CALLS = 300
BATCHES = 12
EXAMPLES = """Groups of 2 sequences of 8 tokens, batches of 256 groups; medians in milliseconds. The first /batch stands apart:
upstream forms all batches then.

examples:
  python -m benchmarks.rollout_server status
  python -m benchmarks.rollout_server status --ours 0,10000 --upstream 0,5000
"""


@dataclass(frozen=True)
class NativeCosts:
    """Milliseconds a call of the native routes."""

    server: str
    queued_groups: int
    status_ms: float
    lease_and_ack_ms: float | None


@dataclass(frozen=True)
class OldCosts:
    """Milliseconds a call of the old routes."""

    server: str
    queued_groups: int
    status_env_ms: float
    first_batch_ms: float
    batch_ms: float


@dataclass(frozen=True)
class _Filled:
    """A server with a queue, and ways to it."""

    queued_groups: int
    connection: HttpConnection
    taker: Taker


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command line."""
    parser = commands.add_parser(
        "status", help=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours", type=_lengths, default="0,100000", help="groups queued in our server (0,100000)")
    parser.add_argument(
        "--upstream", type=_lengths, default="0,5000,20000", help="groups queued in upstream's (0,5000,20000)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure every queue length on a fresh server."""
    native = [_native("ours-normal", groups) for groups in args.ours]
    old = [_old("ours-json", groups) for groups in args.ours] + [_old("upstream", groups) for groups in args.upstream]
    columns = ["server", "groups queued", "/v1/status ms", "lease + ack ms"]
    print(table(columns, [list(asdict(each).values()) for each in native]), end="\n\n")
    columns = ["server", "groups queued", "/status-env ms", "first /batch ms", "/batch ms"]
    print(table(columns, [list(asdict(each).values()) for each in old]))
    save("status", {"native": [asdict(each) for each in native], "old": [asdict(each) for each in old]})


def _lengths(text: str) -> list[int]:
    lengths = [int(part) for part in text.split(",")]
    for groups in lengths:
        if 0 < groups <= BATCHES * SMALL.groups_per_batch:
            raise argparse.ArgumentTypeError(
                f"{groups} groups do not make {BATCHES + 1} batches of 256: queue 0 or 5000"
            )
    return lengths


def _native(name: str, groups: int) -> NativeCosts:
    with _filled(name, groups) as server:

        def status() -> None:
            server.connection.call(b"GET", "/v1/status").expect()

        def lease_and_ack() -> None:
            if server.taker.take() is None:
                raise RuntimeError("a full queue gave no batch")

        status_ms = median_ms(status, STATUS_CALLS)
        # An empty queue is long-polled for a second: that is no cost.
        return NativeCosts(name, server.queued_groups, status_ms, median_ms(lease_and_ack, BATCHES) if groups else None)


def _old(name: str, groups: int) -> OldCosts:
    with _filled(name, groups) as server:
        nothing = b'{"batch":null}'

        def status_env() -> None:
            server.connection.call(b"GET", "/status-env", b'{"env_id":0}', JSON_HEADER).expect()

        def batch() -> None:
            answer = server.connection.call(b"GET", "/batch").expect()
            if (answer == nothing) != (server.queued_groups == 0):
                raise RuntimeError(f"unexpected batch with {server.queued_groups} groups queued: {answer[:200]!r}")

        status_ms, first_ms = median_ms(status_env, STATUS_CALLS), median_ms(batch, 1)
        return OldCosts(name, server.queued_groups, status_ms, first_ms, median_ms(batch, BATCHES))


@contextmanager
def _filled(name: str, groups: int) -> Iterator[_Filled]:
    progress(f"{name}: {groups} groups queued")
    chosen = contender(name)
    exchange = chosen.exchange(SMALL)
    with (
        chosen.serve() as server,
        HttpConnection(server.port) as connection,
        closing(exchange.open(server.port)) as taker,
    ):
        yield _Filled(fill(exchange, server.port, groups=groups), connection, taker)


def median_ms(call: Callable[[], None], times: int) -> float:
    """Median time of a call."""
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spans.append((time.perf_counter() - start) * 1e3)
    return statistics.median(spans)
