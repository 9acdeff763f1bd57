"""Which run a command line means by a folder."""

from __future__ import annotations

from pathlib import Path

from atroposlib.errors import ConfigError
from rollout_server.stores.run_reader import GroupState, RunReader

STATES: tuple[GroupState, ...] = ("batched", "queued", "retired")


def open_recorded(folder: Path) -> RunReader:
    """The run in a folder: of a rollout server (its open run), of an archived run, or of `atropos up`.

    Raises:
        ConfigError: there is no run in it.
    """
    for candidate in (folder, folder / "current", folder / "rollout_server", folder / "rollout_server" / "current"):
        if (candidate / "run.sqlite").is_file():
            return RunReader.open(candidate)
    archived = sorted(path.parent.name for path in folder.glob("archive/*/run.sqlite"))
    hint = f"; archived runs are in {folder / 'archive'}: {', '.join(archived[-3:])}" if archived else ""
    raise ConfigError(f"{folder} holds no run: no run.sqlite is there; name the server's --data-dir{hint}")
