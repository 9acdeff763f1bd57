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
    # Settings may stand after options as well, where the parser does not take them.
    arguments, later = parser.parse_known_args(argv)
    unknown = [word for word in later if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.settings += later
    try:
        return int(arguments.run(arguments))
    except AtroposError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_STATUS


if __name__ == "__main__":
    sys.exit(main())
