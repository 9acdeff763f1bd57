"""run-api at its old import path: starts the rollout server, where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

from atroposlib.cli.plugins import CommandMissingError

NAME = "run-api"
GROUPS = ("atropos.commands", "console_scripts")


def main(argv: Sequence[str] | None = None) -> None:
    """Hand the arguments to the rollout server. --reload, which old commands carry, is dropped with a word."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--reload" in arguments:
        arguments.remove("--reload")
        print("warning: --reload is ignored: the rollout server keeps its data over a restart", file=sys.stderr)
    try:
        _load()(arguments)
    except CommandMissingError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(1)


def _load() -> Callable[[list[str]], object]:
    found = next(
        (point for group in GROUPS for point in entry_points(group=group, name=NAME) if _is_other(point)), None
    )
    if found is None:
        raise CommandMissingError("run-api starts the rollout server, which is not installed here")
    try:
        command: Callable[[list[str]], object] = found.load()
    except ModuleNotFoundError as error:
        raise CommandMissingError(f"run-api needs the module {error.name}, which is not installed here") from error
    return command


def _is_other(point: EntryPoint) -> bool:
    """The console script may be this very module."""
    return point.module != "atroposlib.cli.run_api"


if __name__ == "__main__":
    main()
