"""An index written by an earlier version is brought up to date; one written by a newer version is refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from atroposlib.errors import ConfigError
from atroposlib.wire.columns import encode_group
from rollout_server.stores.base import Batch, StoreLimits
from rollout_server.stores.embedded import SQLiteStore
from rollout_server.stores.schema import SCHEMA_VERSION
from tests.builders import a_group, a_run

SCHEMA_1 = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1), name TEXT NOT NULL, request TEXT NOT NULL, session INTEGER NOT NULL,
    policy_version INTEGER NOT NULL, next_step INTEGER NOT NULL, acknowledged INTEGER NOT NULL, committed INTEGER NOT NULL);
CREATE TABLE envs (
    env_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, session INTEGER NOT NULL, request TEXT NOT NULL);
CREATE TABLE tickets (
    ticket TEXT PRIMARY KEY, env_id INTEGER NOT NULL, sequences INTEGER NOT NULL, policy_version INTEGER NOT NULL);
CREATE TABLE groups (
    key INTEGER PRIMARY KEY AUTOINCREMENT, group_id TEXT NOT NULL UNIQUE, env_id INTEGER NOT NULL,
    n_sequences INTEGER NOT NULL, n_tokens INTEGER NOT NULL, n_bytes INTEGER NOT NULL,
    oldest_version INTEGER, order_version INTEGER NOT NULL, step INTEGER, retired TEXT);
CREATE INDEX groups_step ON groups (step) WHERE step IS NOT NULL;
CREATE INDEX groups_queued ON groups (order_version, key) WHERE step IS NULL AND retired IS NULL;
CREATE TABLE payloads (key INTEGER PRIMARY KEY, blob BLOB NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
PRAGMA user_version=1;
"""


def a_folder_of_version_1(data_dir: Path, *, payload_count: int = 4) -> list[bytes]:
    """One run with an environment, a ticket, a batch of two groups and two queued ones."""
    data_dir.mkdir()
    payloads = [encode_group(a_group(f"g{i}")) for i in range(payload_count)]
    db = sqlite3.connect(data_dir / "run.sqlite")
    db.executescript(SCHEMA_1)
    db.execute("INSERT INTO run VALUES (1, 'run', ?, 3, 7, 1, 0, 0)", (a_run().model_dump_json(),))
    db.execute('INSERT INTO envs VALUES (0, \'env\', 2, \'{"name": "env", "group_size": 2}\')')
    db.execute("INSERT INTO tickets VALUES ('t1', 0, 2, 7)")
    for i, payload in enumerate(payloads):
        step = 0 if i < 2 else None
        db.execute("INSERT INTO groups VALUES (?, ?, 0, 2, 14, ?, 0, 0, ?, NULL)", (i + 1, f"g{i}", len(payload), step))
        db.execute("INSERT INTO payloads VALUES (?, ?)", (i + 1, payload))
    db.execute("INSERT INTO counters VALUES ('groups_accepted', 4)")
    db.commit()
    db.close()
    return payloads


async def test_a_run_of_version_1_goes_on_where_it_was(tmp_path: Path) -> None:
    payloads = a_folder_of_version_1(tmp_path / "data")

    store = await SQLiteStore.open(tmp_path / "data", StoreLimits())
    try:
        status = await store.status()
        batch = await store.lease(0, session=3)

        assert isinstance(batch, Batch)
        assert [bytes(blob) for blob in batch.blobs] == payloads[:2]
        assert (status.queued_groups, status.tickets_outstanding, status.policy_version) == (2, 1, 7)
        assert (status.groups_accepted, status.formed_steps, status.envs[0].name) == (4, 1, "env")
        assert await store.known(["g3", "g9"]) == {"g3"}
        assert [record.state for record in (await store.records()).records] == ["batched"] * 2 + ["queued"] * 2
    finally:
        await store.close()


async def test_a_migration_that_fails_leaves_the_old_version_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_folder_of_version_1(tmp_path / "data")
    with monkeypatch.context() as broken:
        broken.setattr("rollout_server.stores.schema.SCHEMA", "CREATE TABLE run (id INTEGER)")
        with pytest.raises(sqlite3.OperationalError):
            await SQLiteStore.open(tmp_path / "data", StoreLimits())

    store = await SQLiteStore.open(tmp_path / "data", StoreLimits())

    assert (await store.status()).queued_groups == 2
    await store.close()


async def test_a_folder_of_a_newer_version_is_refused_and_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "current"
    folder.mkdir(parents=True)
    db = sqlite3.connect(folder / "run.sqlite")
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()

    with pytest.raises(ConfigError, match=f"schema version {SCHEMA_VERSION + 1}, this server reads up to"):
        await SQLiteStore.open(tmp_path / "data", StoreLimits())


async def test_one_server_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    store = await SQLiteStore.open(tmp_path / "data", StoreLimits())

    with pytest.raises(ConfigError, match="in use by another rollout server"):
        await SQLiteStore.open(tmp_path / "data", StoreLimits())

    await store.close()
    await (await SQLiteStore.open(tmp_path / "data", StoreLimits())).close()
