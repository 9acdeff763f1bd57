"""The same groups through TransferQueue (verl's data plane): put, get, clear."""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers import peer_python
from benchmarks.rollout_server.report import progress, save, table
from benchmarks.rollout_server.shapes import Shape

CLIENT = Path(__file__).parent / "transfer_queue_client.py"
START_ALLOWANCE_S = 240.0
EXAMPLES = """Its client holds tensors in the process that puts and gets; there is no validation and no disk. Compare groups/s with
`throughput` at the same shape. The peer's environment takes 6 GB of disk.

examples:
  python -m benchmarks.rollout_server transferqueue
  python -m benchmarks.rollout_server transferqueue --shape 8x512 --threads 1
"""


@dataclass(frozen=True)
class TransferQueueFigures:
    """One number of client threads."""

    threads: int
    groups_per_s: float
    million_tokens_per_s: float
    cpu_s_per_million_tokens: float
    """Client included: the queue's client library is part of its cost."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command line."""
    parser = commands.add_parser(
        "transferqueue", help=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=Shape.parse, default="8x2048", help="sequences x tokens (8x2048)")
    parser.add_argument("--seconds", type=int, default=8, help="length of one measurement (8)")
    parser.add_argument("--threads", default="1,4", help="numbers of client threads (1,4)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure each number of threads."""
    figures = []
    for threads in (int(part) for part in args.threads.split(",")):
        progress(f"TransferQueue, {threads} threads: {args.shape}, {args.seconds} s after Ray has started")
        figures.append(_measure(args.shape, args.seconds, threads))
    columns = ["client threads", "groups/s", "M tok/s", "CPU s/M tok (client included)"]
    print(table(columns, [list(asdict(each).values()) for each in figures]))
    save("transferqueue", {"shape": str(args.shape), "transferqueue": [asdict(each) for each in figures]})


def _measure(shape: Shape, seconds: int, threads: int) -> TransferQueueFigures:
    arguments = [shape.groups_per_batch, shape.sequences, shape.tokens_each, seconds, threads]
    command = [str(part) for part in (peer_python("transferqueue"), "-P", CLIENT, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + START_ALLOWANCE_S)
    if done.returncode != 0:
        raise RuntimeError(f"TransferQueue's client ended with status {done.returncode}: {done.stderr[-1500:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    million_tokens_per_s = result["groups_per_s"] * shape.tokens / 1e6
    return TransferQueueFigures(
        threads, result["groups_per_s"], million_tokens_per_s, result["cpu_s"] / million_tokens_per_s
    )
