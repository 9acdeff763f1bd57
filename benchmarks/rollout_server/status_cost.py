"""What a status call and a batch cost while the queue is empty and while it is long."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

from benchmarks.rollout_server.contenders import CONTENDERS
from benchmarks.rollout_server.exchanges import Exchange, Taker
from benchmarks.rollout_server.filling import fill
from benchmarks.rollout_server.http_connection import JSON_HEADER, HttpConnection
from benchmarks.rollout_server.report import Cell, progress, save, table
from benchmarks.rollout_server.shapes import Shape

SMALL = Shape(sequences=2, tokens_each=8)
STATUS_CALLS = 300
LEASES = 12
BATCHES = 7
BATCHES_TAKEN = LEASES + 1 + BATCHES
EXAMPLES = """Groups of 2 sequences of 8 tokens, batches of 256 groups; medians in milliseconds.

examples:
  python -m benchmarks.rollout_server status
  python -m benchmarks.rollout_server status --ours 0,10000 --upstream 0,5000
"""


@dataclass(frozen=True)
class Costs:
    """Milliseconds a call, at one queue length."""

    server: str
    queued_groups: int
    status_env_ms: float
    v1_status_ms: float | None
    lease_and_ack_ms: float | None
    first_batch_ms: float
    """GET /batch after no batch was asked for: upstream forms every batch then."""
    batch_ms: float


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command line."""
    parser = commands.add_parser(
        "status", help=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", default="ours-normal", help="contender measured as ours (ours-normal)")
    parser.add_argument("--ours", default="0,100000", help="groups queued in our server (0,100000)")
    parser.add_argument("--upstream", default="0,5000,20000", help="groups queued in upstream's (0,5000,20000)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure every queue length on a fresh server."""
    lengths: Mapping[str, str] = {args.server: args.ours, "upstream": args.upstream}
    costs = []
    for name, text in lengths.items():
        for groups in (int(part) for part in text.split(",") if part):
            progress(f"{name}: {groups} groups queued")
            costs.append(_measure(name, groups))
    rows: Sequence[Sequence[Cell]] = [list(asdict(each).values()) for each in costs]
    print(
        table(
            [
                "server",
                "groups queued",
                "/status-env ms",
                "/v1/status ms",
                "lease + ack ms",
                "first /batch ms",
                "/batch ms",
            ],
            rows,
        )
    )
    save("status", {"costs": [asdict(each) for each in costs]})


def _measure(name: str, groups: int) -> Costs:
    chosen = CONTENDERS[name]
    exchange = chosen.exchange(SMALL)
    if 0 < groups <= (BATCHES_TAKEN - 1) * SMALL.groups_per_batch:
        raise ValueError(
            f"{groups} groups are too few for {BATCHES_TAKEN} batches of {SMALL.groups_per_batch}: queue 0 or 5000"
        )
    with (
        chosen.serve() as server,
        HttpConnection(server.port) as connection,
        closing(exchange.open(server.port)) as taker,
    ):
        queued = fill(exchange, server.port, groups=groups)
        return _costs(name, exchange, queued, connection, taker, is_ours=not chosen.is_peer)


def _costs(
    name: str, exchange: Exchange, queued: int, connection: HttpConnection, taker: Taker, *, is_ours: bool
) -> Costs:
    def status_env() -> None:
        connection.call(b"GET", "/status-env", b'{"env_id":0}', JSON_HEADER).expect()

    def v1_status() -> None:
        connection.call(b"GET", "/v1/status").expect()

    def lease_and_ack() -> None:
        assert (taker.take() is None) == (queued == 0)

    def batch() -> None:
        answer = connection.call(b"GET", "/batch").expect()
        assert (answer == b'{"batch":null}') == (queued == 0), answer[:200]

    status_ms = median_ms(status_env, STATUS_CALLS)
    native_ms = median_ms(v1_status, STATUS_CALLS) if is_ours else None
    # An empty queue is long-polled for a second: that is no cost.
    lease_ms = median_ms(lease_and_ack, LEASES) if is_ours and queued else None
    first_ms = median_ms(batch, 1)
    return Costs(name, queued, status_ms, native_ms, lease_ms, first_ms, median_ms(batch, BATCHES))


def median_ms(call: Callable[[], None], times: int) -> float:
    """Median time of a call."""
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spans.append((time.perf_counter() - start) * 1e3)
    return statistics.median(spans)
