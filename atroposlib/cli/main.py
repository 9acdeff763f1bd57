"""atropos: one command, one module for each of its subcommands."""

from __future__ import annotations

import argparse
import sys

from atroposlib.cli import report, up
from atroposlib.errors import AtroposError

USAGE_STATUS = 2

EXAMPLES = """examples:
  atropos up --config configs/demo.yaml      start the whole loop, show it, report on it
  atropos report runs/demo                   write runs/demo/report.html again
  atropos up --help                          all options of a subcommand
"""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; its exit status. Errors of ours become a line with the fix, never a traceback."""
    parser = argparse.ArgumentParser(
        prog="atropos",
        description="Reinforcement learning of language models as decoupled services.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    for module in (up, report):
        module.add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except AtroposError as error:
        print(f"error: {error}", file=sys.stderr)
        if hint := getattr(error, "hint", ""):
            print(f"hint: {hint}", file=sys.stderr)
        return USAGE_STATUS


if __name__ == "__main__":
    sys.exit(main())
