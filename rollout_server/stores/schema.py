"""The tables of a run's index, their version, and the way from each earlier version to the next."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

from atroposlib.errors import ConfigError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1), run_id TEXT NOT NULL, request TEXT NOT NULL, session INTEGER NOT NULL,
    policy_version INTEGER NOT NULL, next_step INTEGER NOT NULL, acknowledged INTEGER NOT NULL, committed INTEGER NOT NULL);
CREATE TABLE envs (
    env_id INTEGER PRIMARY KEY, session INTEGER NOT NULL, is_connected INTEGER NOT NULL, request TEXT NOT NULL);
CREATE TABLE servers (url TEXT PRIMARY KEY, request TEXT NOT NULL);
CREATE TABLE tickets (
    ticket TEXT PRIMARY KEY, env_id INTEGER NOT NULL, sequences INTEGER NOT NULL, policy_version INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE groups (
    key INTEGER PRIMARY KEY, group_id TEXT NOT NULL UNIQUE, env_id INTEGER NOT NULL,
    n_sequences INTEGER NOT NULL, n_tokens INTEGER NOT NULL, oldest_version INTEGER, order_version INTEGER NOT NULL,
    segment INTEGER, offset INTEGER, size INTEGER, step INTEGER, retired TEXT);
CREATE INDEX groups_step ON groups (step) WHERE step IS NOT NULL;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


def open_database(folder: Path, *, synchronous: str) -> sqlite3.Connection:
    """The index of a run's folder, made or brought up to date.

    Raises:
        ConfigError: a newer server wrote it.
    """
    path = folder / "run.sqlite"
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute(f"PRAGMA synchronous={synchronous.upper()}")
    db.execute("PRAGMA wal_autocheckpoint=4000")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        db.close()
        raise ConfigError(
            f"{path} has schema version {version}, this server reads up to {SCHEMA_VERSION}; update it, or use another --data-dir"
        )
    if version == 0:
        db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
    try:
        while 0 < version < SCHEMA_VERSION:
            log.warning("%s: bringing schema version %d up to %d", path, version, version + 1)
            _migrate(db, folder, version)
            version += 1
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, folder: Path, version: int) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        MIGRATIONS[version](db, folder)
        db.execute(f"PRAGMA user_version={version + 1}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _payloads_to_segments(db: sqlite3.Connection, folder: Path) -> None:
    """Version 1 kept payload in the database, and had neither run ids nor a registry of inference servers."""
    segments = folder / "segments"
    segments.mkdir(exist_ok=True)
    for table in ("run", "envs", "tickets", "groups"):
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    for index in ("groups_step", "groups_queued"):
        db.execute(f"DROP INDEX IF EXISTS {index}")
    for statement in SCHEMA.split(";"):
        if statement.strip() and "TABLE counters" not in statement:
            db.execute(statement)
    db.execute(
        "INSERT INTO run SELECT id, lower(hex(randomblob(16))), request, session, policy_version, next_step, acknowledged, committed"
        " FROM old_run"
    )
    db.execute("INSERT INTO envs SELECT env_id, session, 1, request FROM old_envs")
    db.execute("INSERT INTO tickets SELECT ticket, env_id, sequences, policy_version FROM old_tickets")
    db.execute(
        "INSERT INTO groups SELECT key, group_id, env_id, n_sequences, n_tokens, oldest_version, order_version, NULL, NULL, NULL,"
        " step, retired FROM old_groups"
    )
    with (segments / "00000001.seg").open("wb") as file:
        for key, blob in db.execute("SELECT key, blob FROM payloads ORDER BY key"):
            place = (1, file.tell(), len(blob), key)
            file.write(blob)
            db.execute("UPDATE groups SET segment = ?, offset = ?, size = ? WHERE key = ?", place)
    for table in ("run", "envs", "tickets", "groups"):
        db.execute(f"DROP TABLE old_{table}")
    db.execute("DROP TABLE payloads")


MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection, Path], None]] = {1: _payloads_to_segments}
"""By the version they start from."""
