"""Groups through each server, and how far that is from what disk, sockets and a bare HTTP server allow."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.rollout_server.contenders import CONTENDERS, contender
from benchmarks.rollout_server.disk import append_rate
from benchmarks.rollout_server.load import LoadOptions, LoadResult, run_load
from benchmarks.rollout_server.payloads import columns_payload
from benchmarks.rollout_server.processes import scratch_folder
from benchmarks.rollout_server.report import progress, save, table
from benchmarks.rollout_server.shapes import Shape, parse_shapes

DISKS = {"disk": False, "disk-sync": True}
DEFAULT_PEERS = "ours-full,ours-normal,upstream,mover,loopback,disk,disk-sync"
LIMITS = ("mover", "loopback", "disk", "disk-sync")
EXAMPLES = f"""contenders:
{chr(10).join(f"  {name:16} {each.about}" for name, each in CONTENDERS.items())}
  disk             the same bytes appended to a file
  disk-sync        the same with fdatasync every 4 MB

examples:
  python -m benchmarks.rollout_server throughput
  python -m benchmarks.rollout_server throughput --shapes 8x2048 --seconds 3 --repetitions 1 --peers ours-normal,mover
"""


@dataclass(frozen=True)
class Figures:
    """Medians over the repetitions for one contender and shape."""

    contender: str
    shape: str
    groups_per_s: float
    spread: float
    """Largest rate over smallest."""
    million_tokens_per_s: float
    megabytes_per_s: float
    """In; as much goes out again."""
    bytes_per_token: float
    cpu_s_per_million_tokens: float | None
    """Server process tree."""
    generator_cpu_s_per_million_tokens: float | None
    repetitions: Sequence[LoadResult]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command line."""
    parser = commands.add_parser(
        "throughput", help=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=parse_shapes, default="8x512,8x2048,16x8192", help="sequences x tokens, ...")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of one measurement (8)")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements, of which the median counts (3)")
    parser.add_argument("--posters", type=int, default=4, help="requests in flight (4)")
    parser.add_argument("--peers", default=DEFAULT_PEERS, help=f"contenders ({DEFAULT_PEERS})")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure all contenders turn by turn, so that a change of the machine's load meets all of them."""
    names, options = args.peers.split(","), LoadOptions(seconds=args.seconds, posters=args.posters)
    for name in names:
        if name not in DISKS:
            contender(name)
    figures = []
    for shape in args.shapes:
        rounds: dict[str, list[LoadResult]] = {name: [] for name in names}
        for i in range(args.repetitions):
            for name in names:
                progress(f"{shape} {name}: measurement {i + 1} of {args.repetitions}, {args.seconds:.0f} s")
                rounds[name].append(_measure(name, shape, options))
        figures += [summarize(name, shape, rounds[name]) for name in names]
        print(f"\n{shape}\n{report([each for each in figures if each.shape == str(shape)])}", flush=True)
    save("throughput", {"figures": [asdict(each) for each in figures]})


def _measure(name: str, shape: Shape, options: LoadOptions) -> LoadResult:
    if name in DISKS:
        payload = columns_payload(shape, shape.groups_per_batch)
        body = bytes(payload.body())
        with scratch_folder() as folder:
            rate = append_rate(folder, body, seconds=options.seconds, is_synced=DISKS[name])
        groups = round(rate * options.seconds / len(body) * shape.groups_per_batch)
        return LoadResult(options.seconds, groups, 0.0, 0.0, groups, groups, 0)
    chosen = contender(name)
    exchange = chosen.exchange(shape)
    with chosen.serve() as server:
        return run_load(exchange, [server.port], options, server_cpu_s=server.cpu_s)


def summarize(name: str, shape: Shape, results: Sequence[LoadResult]) -> Figures:
    """Medians of the rates."""
    rates = [result.groups / result.seconds for result in results]
    rate = statistics.median(rates)
    exchange = CONTENDERS[name].exchange if name in CONTENDERS else CONTENDERS["mover"].exchange
    payload = exchange(shape).payload
    group_bytes = len(payload.body()) / len(payload.groups)
    million_tokens = [result.groups * shape.tokens / 1e6 for result in results]
    has_server = name not in DISKS
    return Figures(
        contender=name,
        shape=str(shape),
        groups_per_s=rate,
        spread=max(rates) / min(rates),
        million_tokens_per_s=rate * shape.tokens / 1e6,
        megabytes_per_s=rate * group_bytes / 1e6,
        bytes_per_token=group_bytes / shape.tokens,
        cpu_s_per_million_tokens=statistics.median(
            result.server_cpu_s / size for result, size in zip(results, million_tokens, strict=True)
        )
        if has_server
        else None,
        generator_cpu_s_per_million_tokens=statistics.median(
            result.generator_cpu_s / size for result, size in zip(results, million_tokens, strict=True)
        )
        if has_server
        else None,
        repetitions=results,
    )


def report(figures: Sequence[Figures]) -> str:
    """The table of one shape; ratios of groups/s to the best upstream figure and to each limit that was measured."""
    rates: Mapping[str, float] = {each.contender: each.groups_per_s for each in figures}
    upstream = max((rate for name, rate in rates.items() if name.startswith("upstream")), default=None)
    limits = [name for name in LIMITS if name in rates]
    columns = ["server", "groups/s", "spread", "M tok/s", "MB/s in", "B/tok", "server CPU s/M tok", "generator"]
    columns += ["x upstream", *(f"/ {name}" for name in limits)]
    rows = [
        [
            each.contender, each.groups_per_s, each.spread, each.million_tokens_per_s, each.megabytes_per_s,
            each.bytes_per_token, each.cpu_s_per_million_tokens, each.generator_cpu_s_per_million_tokens,
            each.groups_per_s / upstream if upstream else None,
            *(each.groups_per_s / rates[name] for name in limits),
        ]
        for each in figures
    ]  # fmt: skip
    return table(columns, rows)
