"""python -m atroposlib.data check FILE."""

from __future__ import annotations

import argparse
import sys

from atroposlib.data import check
from atroposlib.errors import AtroposError

USAGE_STATUS = 2


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; its exit status. Errors of ours become a line, never a traceback."""
    parser = argparse.ArgumentParser(prog="python -m atroposlib.data", description="Look at data sets.")
    check.add_parser(parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND"))
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except AtroposError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_STATUS


if __name__ == "__main__":
    sys.exit(main())
