"""Reads the folder of a run, also while a server writes it: facts, ledger and payload. It writes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from atroposlib.errors import ConfigError
from atroposlib.wire.models import GroupRecord, RunInfo
from rollout_server.stores.changes import GroupRow
from rollout_server.stores.journal import record_of
from rollout_server.stores.run_folder import read_groups, read_run
from rollout_server.stores.schema import SCHEMA_VERSION
from rollout_server.stores.segments import SegmentFiles

PAGE_GROUPS = 1000

State = Literal["batched", "queued", "retired"]


class RunReader:
    """The run in a folder. Each page is a query of its own, so that a long read does not make the server's log grow.

    Args:
        db: its index, open for reading.
        run: what the run was opened with, and how far it came.
        payloads: its segment files.
    """

    def __init__(self, db: sqlite3.Connection, run: RunInfo, payloads: SegmentFiles) -> None:
        self._db = db
        self.run = run
        self._payloads = payloads

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the run whose run.sqlite lies in the folder; use the reader on the thread that made it.

        Raises:
            ConfigError: no run was opened there, or a newer or older server wrote it.
        """
        path = folder / "run.sqlite"
        if not path.is_file():
            raise ConfigError(f"{folder} holds no run: {path.name} is not there; name the folder of a run")
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        try:
            run = _run_of(db, path)
        except BaseException:
            db.close()
            raise
        return cls(db, run, SegmentFiles(folder / "segments", is_synced=False, retain_bytes=-1, is_new=True))

    def close(self) -> None:
        """Close the index."""
        self._db.close()

    def records(self) -> Iterator[GroupRecord]:
        """Where each group of the run is, in order of arrival."""
        for row in self._rows("1"):
            yield record_of(row)

    def groups(
        self, steps: range | None = None, states: Sequence[State] = ("batched",)
    ) -> Iterator[tuple[GroupRecord, memoryview]]:
        """Groups whose payload is kept: those in batches by step and place in the batch, then the others by arrival.

        Args:
            steps: only the batches of these; groups in no batch are left out.
        """
        if "batched" in states:
            for step in self._steps(steps):
                rows = list(read_groups(self._db, "step = ? ORDER BY order_version, key", (step,)))
                yield from self._with_payload(rows)
        if steps is None and "queued" in states:
            yield from self._with_payload(self._rows("step IS NULL AND retired IS NULL"))
        if steps is None and "retired" in states:
            yield from self._with_payload(self._rows("retired IS NOT NULL"))

    def _steps(self, steps: range | None) -> list[int]:
        known = self._db.execute("SELECT DISTINCT step FROM groups WHERE step IS NOT NULL ORDER BY step")
        return [step for (step,) in known if steps is None or step in steps]

    def _rows(self, where: str) -> Iterator[GroupRow]:
        after = 0
        while rows := list(read_groups(self._db, f"key > ? AND ({where}) ORDER BY key LIMIT ?", (after, PAGE_GROUPS))):
            yield from rows
            after = rows[-1].key

    def _with_payload(self, rows: Iterable[GroupRow]) -> Iterator[tuple[GroupRecord, memoryview]]:
        for row in rows:
            if row.place is None:
                continue
            try:
                (payload,) = self._payloads.read([row.place])
            except FileNotFoundError:  # retention deleted its segment
                continue
            yield record_of(row), memoryview(payload)


def _run_of(db: sqlite3.Connection, path: Path) -> RunInfo:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION};"
            " start run-api once on its folder to bring an older one up to date"
        )
    row = read_run(db)
    if row is None:
        raise ConfigError(f"{path.parent} holds no run yet: no trainer has opened one")
    return RunInfo(
        run_name=row.request.run_name,
        run_id=row.run_id,
        session=row.session,
        policy_version=row.policy_version,
        committed_step=row.committed,
        acknowledged_step=row.acknowledged,
        request=row.request,
    )
