"""Reading a run from its folder, open or archived, while a server may be writing it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from atroposlib.errors import ConfigError, GroupFormatError
from atroposlib.wire.columns import read_blobs
from atroposlib.wire.models import GroupRecord
from rollout_server.stores.base import Payload
from rollout_server.stores.changes import GroupRow, RunRow
from rollout_server.stores.journal import record_of
from rollout_server.stores.run_folder import read_groups, read_run
from rollout_server.stores.schema import SCHEMA_VERSION
from rollout_server.stores.segments import SegmentFiles

GroupState = Literal["batched", "queued", "retired"]
PAGE = 1_000
"""Rows read at a time: a long transaction would keep a running server from shortening its log."""


class RunReader:
    """One run's groups; use as ``with RunReader.open(folder) as run``."""

    def __init__(self, db: sqlite3.Connection, payloads: SegmentFiles, run: RunRow) -> None:
        self._db = db
        self._payloads = payloads
        self.run = run.info()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a run's folder: current/, or one in archive/.

        Raises:
            ConfigError: no run is there, or another version wrote it.
        """
        path = folder / "run.sqlite"
        if not path.is_file():
            raise ConfigError(f"{folder} holds no run: no run.sqlite is there; name a run's folder")
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            db.close()
            raise ConfigError(
                f"{path} has schema version {version}, expected {SCHEMA_VERSION}; start run-api on its folder once to bring it up to date"
            )
        run = read_run(db)
        if run is None:
            db.close()
            raise ConfigError(f"{folder} holds no run: no trainer has opened one there")
        return cls(db, SegmentFiles(folder / "segments", is_synced=False, retain_bytes=-1), run)

    def close(self) -> None:
        """Close the files."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def records(self) -> Iterator[GroupRecord]:
        """Where each group is, in order of arrival."""
        key = 0
        while rows := list(read_groups(self._db, "key > ? ORDER BY key LIMIT ?", (key, PAGE))):
            for row in rows:
                yield record_of(row)
            key = rows[-1].key

    def groups(
        self, steps: range | None = None, states: Sequence[GroupState] = ("batched",)
    ) -> Iterator[tuple[GroupRecord, Payload]]:
        """Records with payloads that are still kept: batches in order of step and place, then the queue, then what was retired.

        Args:
            steps: of the batches; None for all.
        """
        if "batched" in states:
            for step in self._steps(steps):
                yield from self._with_payload(read_groups(self._db, "step = ? ORDER BY order_version, key", (step,)))
        if "queued" in states:
            where = "step IS NULL AND retired IS NULL ORDER BY order_version, key"
            yield from self._with_payload(read_groups(self._db, where))
        if "retired" in states:
            yield from self._with_payload(read_groups(self._db, "retired IS NOT NULL ORDER BY key"))

    def _steps(self, steps: range | None) -> list[int]:
        found = [
            step
            for (step,) in self._db.execute("SELECT DISTINCT step FROM groups WHERE step IS NOT NULL ORDER BY step")
        ]
        return found if steps is None else [step for step in found if step in steps]

    def _with_payload(self, rows: Iterator[GroupRow]) -> Iterator[tuple[GroupRecord, Payload]]:
        for row in rows:
            if row.place is None:
                continue
            try:
                (payload,) = self._payloads.read([row.place])
                (blob,) = read_blobs(payload)
            except (FileNotFoundError, GroupFormatError, ValueError):  # committed, and beyond what is retained
                continue
            if blob.header.group_id == row.group_id:  # its file may be another segment by now
                yield record_of(row), payload
