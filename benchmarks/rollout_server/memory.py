"""How much memory a server holds when a given amount of groups waits in it."""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import asdict, dataclass

from benchmarks.rollout_server.contenders import contender
from benchmarks.rollout_server.filling import fill
from benchmarks.rollout_server.payloads import columns_payload
from benchmarks.rollout_server.report import progress, save, table
from benchmarks.rollout_server.shapes import Shape

UPSTREAM_GIGABYTES = 0.1
"""At most, for upstream: it holds each number as an object."""
EXAMPLES = """Gigabytes are of columns: upstream gets the same groups as JSON, at most 0.1 GB of them.

examples:
  python -m benchmarks.rollout_server memory --gigabytes 1
  python -m benchmarks.rollout_server memory --gigabytes 0.2 --servers ours-normal,upstream
"""


@dataclass(frozen=True)
class MemoryFigures:
    """Megabytes of the server process tree."""

    server: str
    queued_mb: float
    """The queued groups as columns."""
    rss_before_mb: float
    rss_mb: float
    anonymous_before_mb: float
    anonymous_mb: float
    """Memory that no file backs: the part that the machine cannot take back."""
    growth: float
    """Anonymous growth over queued bytes."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command line."""
    parser = commands.add_parser(
        "memory", help=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="groups queued, as columns (1)")
    parser.add_argument("--shape", type=Shape.parse, default="8x2048", help="sequences x tokens (8x2048)")
    parser.add_argument("--servers", default="ours-normal,upstream", help="contenders (ours-normal,upstream)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fill each server and read /proc."""
    figures = []
    for name in args.servers.split(","):
        gigabytes = min(args.gigabytes, UPSTREAM_GIGABYTES) if contender(name).is_peer else args.gigabytes
        progress(f"{name}: queueing {gigabytes:g} GB")
        figures.append(_measure(name, args.shape, gigabytes))
    columns = ["server", "queued MB", "RSS before", "RSS", "anonymous before", "anonymous", "growth / queued"]
    print(table(columns, [list(asdict(each).values()) for each in figures]))
    save("memory", {"memory": [asdict(each) for each in figures]})


def _measure(name: str, shape: Shape, gigabytes: float) -> MemoryFigures:
    chosen, group_bytes = contender(name), len(columns_payload(shape, 1).groups[0].data)
    exchange = chosen.exchange(shape)
    with chosen.serve() as server, closing(exchange.open(server.port)):
        before = server.memory()
        queued = fill(exchange, server.port, groups=int(gigabytes * 1e9 / group_bytes)) * group_bytes
        after = server.memory()
    growth = (after.anonymous - before.anonymous) / queued
    return MemoryFigures(
        server=name,
        queued_mb=queued / 1e6,
        rss_before_mb=before.rss / 1e6,
        rss_mb=after.rss / 1e6,
        anonymous_before_mb=before.anonymous / 1e6,
        anonymous_mb=after.anonymous / 1e6,
        growth=growth,
    )
