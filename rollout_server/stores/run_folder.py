"""The journal on disk: one folder a run, with the index in SQLite (WAL) and the payload in segment files.

DATA_DIR/current/run.sqlite, segments/     the run that is open
DATA_DIR/archive/NAME-TIME/...             earlier runs, in the same form
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from atroposlib.errors import ConfigError
from atroposlib.wire.models import EnvRequest, GroupRecords, InferenceServer, RunRequest
from rollout_server.stores.changes import Changes, EnvRow, GroupRow, RunRow, Snapshot, TicketRow
from rollout_server.stores.journal import page
from rollout_server.stores.payloads import Payloads, Place
from rollout_server.stores.schema import open_database
from rollout_server.stores.segments import SegmentFiles

log = logging.getLogger(__name__)

GROUP_COLUMNS = (
    "key, group_id, env_id, n_sequences, n_tokens, oldest_version, order_version, segment, offset, size, step, retired"
)
# One statement for all rows of a commit: each statement hands the interpreter lock over once, not once for each row.
INSERT_GROUPS = (
    f"INSERT INTO groups ({GROUP_COLUMNS}) SELECT "
    + ", ".join(f"json_extract(value, '$[{i}]')" for i in range(12))
    + " FROM json_each(?)"
)
MOVE_GROUPS = (
    "UPDATE groups SET step = moved.step, retired = moved.retired FROM (SELECT json_extract(value, '$[0]') AS key,"
    " json_extract(value, '$[1]') AS step, json_extract(value, '$[2]') AS retired FROM json_each(?)) AS moved"
    " WHERE groups.key = moved.key"
)


class RunFolder:
    """See journal.Journal.

    Args:
        data_dir: made when missing; one server at a time may use it.
        synchronous: normal survives SIGKILL of any process, full also a power cut.
        retain_bytes: payload of committed groups kept for export and replay; -1 keeps all.
    Raises:
        ConfigError: the folder is in use, or of a newer version.
    """

    def __init__(self, data_dir: Path, *, synchronous: Literal["normal", "full"], retain_bytes: int) -> None:
        self._data_dir = data_dir
        self._synchronous = synchronous
        self._retain_bytes = retain_bytes
        data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(data_dir)
        try:
            self._db = self._open()
        except BaseException:
            os.close(self._lock)
            raise
        self._reader = _reader(self.folder)
        self._old_reader: sqlite3.Connection | None = None
        self._payloads = self._segments()

    @property
    def folder(self) -> Path:
        """The open run's."""
        return self._data_dir / "current"

    @property
    def payloads(self) -> Payloads:
        """See Journal."""
        return self._payloads

    def _open(self) -> sqlite3.Connection:
        if not self.folder.exists():
            self.folder.mkdir()
            for path in self._data_dir.glob("run.sqlite*"):  # where schema version 1 had it
                path.rename(self.folder / path.name)
        return open_database(self.folder, synchronous=self._synchronous)

    def _segments(self, *, is_new: bool = False) -> SegmentFiles:
        return SegmentFiles(
            self.folder / "segments",
            is_synced=self._synchronous == "full",
            retain_bytes=self._retain_bytes,
            is_new=is_new,
        )

    def load(self) -> Snapshot:
        """See Journal. Also gives up what a transaction that failed had put into the payload files."""
        if _is_closed(self._db):  # archive could not open it again
            self._reopen()
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._payloads.close()
        self._payloads = self._segments()
        snapshot = read_snapshot(self._db)
        self._payloads.adopt(row.place for row in snapshot.groups if row.place is not None)
        return snapshot

    def write(self, changes: Changes, payloads: Payloads) -> None:
        """See Journal. Payload first: an index row never names bytes that are not there."""
        payloads.write(changes.payloads)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            _write_rows(self._db, changes)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def archive(self, run_name: str, payloads: Payloads) -> None:
        """See Journal. One rename moves index and payload together; where it fails, the run stays open as it was."""
        payloads.close()
        archive = self._data_dir / "archive"
        archive.mkdir(exist_ok=True)
        for spare in (self.folder / "segments").glob("*.spare"):
            spare.unlink()
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", run_name)[:80].strip(".") or "run"
        try:
            self.folder.rename(archive / f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")
        finally:
            self._reopen()

    def _reopen(self) -> None:
        """Connections to what is in folder now. The event loop may be asking the last reader something; none before it."""
        self._db, reader = self._open_both()
        if self._old_reader is not None:
            self._old_reader.close()
        self._old_reader, self._reader = self._reader, reader

    def _open_both(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        db = self._open()
        try:
            return db, _reader(self.folder)
        except BaseException:
            db.close()
            raise

    def fresh_payloads(self) -> Payloads:
        """See Journal."""
        self._payloads = self._segments(is_new=True)
        return self._payloads

    def known(self, group_ids: Sequence[str]) -> set[str]:
        """See Journal."""
        rows = self._reader.execute(
            "SELECT group_id FROM json_each(?) JOIN groups ON groups.group_id = json_each.value",
            (msgspec.json.encode(group_ids).decode(),),
        )
        return {group_id for (group_id,) in rows}

    def records(self, after: int, limit: int) -> GroupRecords:
        """See Journal. On a connection of its own, so that a long page holds nobody up."""
        reader = _reader(self.folder)
        try:
            return page(list(read_groups(reader, "key > ? ORDER BY key LIMIT ?", (after, limit + 1))), limit)
        finally:
            reader.close()

    def close(self) -> None:
        """See Journal."""
        self._payloads.close()
        for db in (self._old_reader, self._reader, self._db):
            if db is not None:
                db.close()
        os.close(self._lock)


def _lock(data_dir: Path) -> int:
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"{data_dir.resolve()} is in use by another rollout server; stop it, or choose another --data-dir"
        ) from None
    return descriptor


def _is_closed(db: sqlite3.Connection) -> bool:
    try:
        return db.total_changes < 0
    except sqlite3.ProgrammingError:
        return True


def _reader(folder: Path) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"file:{folder / 'run.sqlite'}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
    )
    db.execute("PRAGMA query_only=1")
    return db


def read_groups(db: sqlite3.Connection, where: str, values: Sequence[object] = ()) -> Iterator[GroupRow]:
    """Rows of the groups table."""
    for *facts, segment, offset, size, step, retired in db.execute(
        f"SELECT {GROUP_COLUMNS} FROM groups WHERE {where}", values
    ):
        key, group_id, env_id, n_sequences, n_tokens, oldest_version, order_version = facts
        yield GroupRow(
            key, group_id, env_id, n_sequences, n_tokens, oldest_version, order_version,
            place=None if segment is None else Place(segment, offset, size), step=step, retired=retired,
        )  # fmt: skip


def read_run(db: sqlite3.Connection) -> RunRow | None:
    """The run, if one was opened."""
    row = db.execute(
        "SELECT run_id, request, session, policy_version, next_step, acknowledged, committed FROM run"
    ).fetchone()
    return None if row is None else RunRow(row[0], RunRequest.model_validate_json(row[1]), *row[2:])


def read_snapshot(db: sqlite3.Connection) -> Snapshot:
    """See Journal.load."""
    run = read_run(db)
    (last_key,) = db.execute("SELECT coalesce(max(key), 0) FROM groups").fetchone()
    return Snapshot(
        run=run,
        envs=[
            EnvRow(env_id, EnvRequest.model_validate_json(request), session, bool(is_connected))
            for env_id, session, is_connected, request in db.execute(
                "SELECT env_id, session, is_connected, request FROM envs ORDER BY env_id"
            )
        ],
        servers={
            url: InferenceServer.model_validate_json(request)
            for url, request in db.execute("SELECT url, request FROM servers")
        },
        tickets={
            ticket: TicketRow(*row)
            for ticket, *row in db.execute("SELECT ticket, env_id, sequences, policy_version FROM tickets")
        },
        groups=list(
            read_groups(
                db,
                "retired IS NULL AND (step IS NULL OR step >= ?) ORDER BY order_version, key",
                (run.committed if run is not None else 0,),
            )
        ),
        counters=dict(db.execute("SELECT name, value FROM counters")),
        next_key=last_key + 1,
    )


def _write_rows(db: sqlite3.Connection, changes: Changes) -> None:
    def bulk(statement: str, rows: object) -> None:
        db.execute(statement, (msgspec.json.encode(rows).decode(),))

    if changes.run is not None:
        run = changes.run
        db.execute(
            "INSERT OR REPLACE INTO run (id, run_id, request, session, policy_version, next_step, acknowledged, committed)"
            " VALUES (1, ?, ?, ?, ?, ?, ?, ?)",
            (
                run.run_id, run.request.model_dump_json(), run.session, run.policy_version, run.next_step,
                run.acknowledged, run.committed,
            ),
        )  # fmt: skip
    for env in changes.envs.values():
        db.execute(
            "INSERT OR REPLACE INTO envs (env_id, session, is_connected, request) VALUES (?, ?, ?, ?)",
            (env.env_id, env.session, env.is_connected, env.request.model_dump_json()),
        )
    if changes.servers is not None:
        db.execute("DELETE FROM servers")
        for url, server in changes.servers.items():
            db.execute("INSERT INTO servers (url, request) VALUES (?, ?)", (url, server.model_dump_json()))
    if changes.tickets_added:
        bulk(
            "INSERT INTO tickets (ticket, env_id, sequences, policy_version) SELECT json_extract(value, '$[0]'),"
            " json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]') FROM json_each(?)",
            [(t, row.env_id, row.sequences, row.policy_version) for t, row in changes.tickets_added.items()],
        )
    if changes.tickets_dropped:
        bulk("DELETE FROM tickets WHERE ticket IN (SELECT value FROM json_each(?))", changes.tickets_dropped)
    if changes.groups:
        bulk(INSERT_GROUPS, [_group_values(row) for row in changes.groups])
    if changes.moved:
        bulk(MOVE_GROUPS, [(key, step, retired) for key, (step, retired) in changes.moved.items()])
    if changes.counters:
        bulk("INSERT OR REPLACE INTO counters (name, value) SELECT key, value FROM json_each(?)", changes.counters)


def _group_values(row: GroupRow) -> tuple[object, ...]:
    place = (row.place.segment, row.place.offset, row.place.size) if row.place is not None else (None, None, None)
    return (
        row.key, row.group_id, row.env_id, row.n_sequences, row.n_tokens, row.oldest_version, row.order_version,
        *place, row.step, row.retired,
    )  # fmt: skip
