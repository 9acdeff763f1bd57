"""atropos: one command, one module for each of its subcommands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from atroposlib.cli import check, doctor, inference, init, mock_inference, report, up, view
from atroposlib.cli.plugins import COMMANDS, run_plugin
from atroposlib.errors import AtroposError

USAGE_STATUS = 2

EXAMPLES = """examples:
  atropos up --config configs/demo.yaml      start the whole loop, show it, report on it
  atropos inference models/base              start one more inference server for a run
  atropos report runs/demo                   write runs/demo/report.html again
  atropos view                               watch the run of the rollout server on this machine
  atropos doctor                             say what is wrong with it, and the fix
  atropos init my_task                       write an environment and its test
  atropos check my_task.py                   run it against a mock, say what is wrong
  atropos mock-inference --text 42           an inference server that holds no model
  atropos export DATA_DIR --out run.parquet  take the groups of a run elsewhere
  atropos up --help                          all options of a subcommand
"""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; its exit status. Errors of ours become a line with the fix, never a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        # Their options are their own: argparse must not look at them.
        if arguments and arguments[0] in COMMANDS:
            return run_plugin(arguments[0], arguments[1:])
        return _run_own(arguments)
    except AtroposError as error:
        print(f"error: {error}", file=sys.stderr)
        if hint := getattr(error, "hint", ""):
            print(f"hint: {hint}", file=sys.stderr)
        return USAGE_STATUS
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who read our output has read enough, as `head` does. What is still in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run_own(argv: Sequence[str]) -> int:
    # argparse would give what follows to the first positional argument, or to nobody.
    end = argv.index("--") if argv and argv[0] == inference.NAME and "--" in argv else len(argv)
    parser = build_parser()
    arguments, later = parser.parse_known_args(argv[:end])
    # argparse gives a subcommand its overrides up to the next option; more may stand behind it.
    if later and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in later)):
        parser.error(f"unrecognized arguments: {' '.join(later)}")
    if later:
        arguments.overrides += later
    arguments.extra = list(argv[end + 1 :])
    return int(arguments.run(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The options of every subcommand of this package; `run` of what it parses is the subcommand."""
    parser = argparse.ArgumentParser(
        prog="atropos",
        description="Reinforcement learning of language models as decoupled services.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    for module in (up, inference, report, view, doctor, init, check, mock_inference):
        module.add_parser(subparsers)
    for name, line in COMMANDS.items():
        subparsers.add_parser(name, help=line)
    return parser


if __name__ == "__main__":
    sys.exit(main())
