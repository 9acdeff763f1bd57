"""A run as its folder keeps it: what export, replay and the summary read, and how a command line names one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from atroposlib.errors import ConfigError
from atroposlib.wire.models import GroupRecord, RunInfo
from rollout_server.stores.run_reader import RunReader

GroupState = Literal["batched", "queued", "retired"]
STATES: tuple[GroupState, ...] = ("batched", "queued", "retired")


class RecordedRun(Protocol):
    """Read only; a server may be writing the run at the same time."""

    @property
    def run(self) -> RunInfo:
        """What the run was opened with, and how far it came."""

    def records(self) -> Iterator[GroupRecord]:
        """Where each group is, in order of arrival."""

    def groups(
        self, steps: range | None = None, states: Sequence[GroupState] = ("batched",)
    ) -> Iterator[tuple[GroupRecord, bytes | memoryview]]:
        """Groups whose payload is kept, encoded as they came, by step and place in the batch."""

    def close(self) -> None:
        """Close the files. Use a run on the thread that opened it."""


def open_recorded(folder: Path) -> RecordedRun:
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
