"""Subcommands that other packages of this project bring: found by entry point, so that the SDK imports none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points

from atroposlib.errors import AtroposError

GROUP = "atropos.commands"

COMMANDS: Mapping[str, str] = {
    "records": "what became of the groups of a run folder",
    "export": "write the groups of a run folder to Parquet or JSON lines",
    "replay": "serve a recorded run to a trainer, batch for batch",
}
"""By name, with the line that `atropos --help` shows."""


class CommandMissingError(AtroposError):
    """The package that brings a subcommand is not installed."""

    hint = "pip install 'atroposlib[server]'"


def run_plugin(name: str, argv: Sequence[str]) -> int:
    """Run a subcommand of COMMANDS with its own arguments; its exit status.

    Raises:
        CommandMissingError: it is not installed, or something that it needs is not.
    """
    return _load(name)(list(argv))


def _load(name: str) -> Callable[[list[str]], int]:
    found = next(iter(entry_points(group=GROUP, name=name)), None)
    if found is None:
        raise CommandMissingError(f"atropos {name} comes with the rollout server, which is not installed here")
    try:
        command: Callable[[list[str]], int] = found.load()
    except ModuleNotFoundError as error:
        raise CommandMissingError(
            f"atropos {name} needs the module {error.name}, which is not installed here"
        ) from error
    return command
