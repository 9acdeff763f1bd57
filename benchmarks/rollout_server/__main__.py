"""Benchmarks of the rollout server against other servers and against physical limits."""

from __future__ import annotations

import argparse
import sys

from benchmarks.rollout_server import idle, json_route, memory, redis_store, status_cost, throughput, transfer_queue

EXAMPLES = """examples:
  python -m benchmarks.rollout_server throughput --shapes 8x2048 --seconds 3 --repetitions 1
  python -m benchmarks.rollout_server status --help
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout_server",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for module in (throughput, json_route, status_cost, idle, memory, transfer_queue, redis_store):
        module.add_parser(commands)
    args = parser.parse_args()
    try:
        args.run(args)
    except ValueError as error:
        print(f"error: {error}\nhint: python -m benchmarks.rollout_server BENCHMARK --help", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
