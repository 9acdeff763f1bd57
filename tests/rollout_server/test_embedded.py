"""What only the store on disk promises: a write that fails refuses everybody in it, runs are put aside whole, a restart finds all."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import StoreUnavailableError
from atroposlib.wire.columns import Blob, Group, encode_group, read_blobs
from atroposlib.wire.models import EnvRequest, TicketRequest
from rollout_server.stores import run_folder
from rollout_server.stores.base import Batch, StoreLimits
from rollout_server.stores.embedded import SQLiteStore
from rollout_server.stores.run_reader import RunReader
from rollout_server.stores.run_state.state import RunState
from rollout_server.stores.schema import open_database
from rollout_server.stores.segments import SegmentFiles
from tests.builders import a_group, a_run


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    store = await SQLiteStore.open(tmp_path / "data", StoreLimits())
    yield store
    await store.close()


def blobs(*groups: Group) -> list[Blob]:
    return list(read_blobs(b"".join(encode_group(group) for group in groups)))


async def started(store: SQLiteStore) -> tuple[int, int]:
    run = await store.open_run(a_run())
    env = await store.register_env(EnvRequest(name="env", group_size=2))
    await store.set_policy(0, run.session)
    return run.session, env.session


async def a_ticket(store: SQLiteStore, session: int) -> str:
    grant = await store.grant_tickets(TicketRequest(env_id=0, session=session, sequences=2))
    return grant.tickets[0].ticket


def refuse(*arguments: Any) -> Any:
    raise OSError(28, "No space left on device")


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


class FullDisk:
    """Stands in for SegmentFiles.write until it is told that there is room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(SegmentFiles, "write", refuse)

    def has_room(self) -> None:
        self._monkeypatch.undo()


async def test_a_write_that_fails_refuses_everybody_in_it_and_leaves_no_trace(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, env = await started(store)
    ticket = await a_ticket(store, env)
    disk = FullDisk(monkeypatch)

    refused = await asyncio.gather(
        store.append(blobs(a_group("g1", ticket=ticket))),
        store.append(blobs(a_group("g2"))),
        store.ack(0, trainer, 1),
        return_exceptions=True,
    )
    disk.has_room()

    assert [type(error) for error in refused[:2]] == [StoreUnavailableError] * 2
    assert "No space left on device" in str(refused[0])
    status = await store.status()
    assert (status.queued_groups, status.tickets_outstanding, status.groups_accepted) == (0, 1, 0)
    assert (await store.append(blobs(a_group("g1", ticket=ticket))))[0].status == "accepted"


async def test_a_group_that_could_not_be_written_is_not_taken_for_a_duplicate(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(store)
    disk = FullDisk(monkeypatch)
    with pytest.raises(StoreUnavailableError):
        await store.append(blobs(a_group("g1")))
    disk.has_room()

    assert await store.known(["g1"]) == set()
    assert (await store.append(blobs(a_group("g1"))))[0].status == "accepted"


async def test_another_run_starts_clean_and_the_earlier_one_can_be_read_in_the_archive(
    store: SQLiteStore, tmp_path: Path
) -> None:
    trainer, _ = await started(store)
    first = a_group("g1")
    await store.append(blobs(first, a_group("g2")))
    assert isinstance(await store.lease(0, trainer), Batch)

    await store.open_run(a_run("another/run"))
    await store.register_env(EnvRequest(name="env", group_size=2))
    await store.append(blobs(a_group("g1")))

    status = await store.status()
    assert (status.run_name, status.queued_groups, status.formed_steps) == ("another/run", 1, 0)
    [folder] = (tmp_path / "data" / "archive").iterdir()
    with RunReader.open(folder) as archived:
        assert archived.run.run_name == "run"
        assert [(record.group_id, record.step) for record, _ in archived.groups()] == [("g1", 0), ("g2", 0)]
        assert bytes(next(archived.groups())[1]) == encode_group(first)


async def test_a_run_that_is_opened_while_others_are_written_loses_nothing_of_either(
    store: SQLiteStore, tmp_path: Path
) -> None:
    await started(store)
    old, kept = a_group("old", n=4), a_group("kept", n=2)

    await asyncio.gather(
        store.append(blobs(old)),
        store.open_run(a_run("new")),
        store.append(blobs(kept), is_strict=False),
    )
    assert [record.group_id for record in (await store.records()).records] == ["kept"]
    await store.close()

    [folder] = (tmp_path / "data" / "archive").iterdir()
    for path, group in ((folder, old), (tmp_path / "data" / "current", kept)):
        with RunReader.open(path) as run:
            assert [bytes(payload) for _, payload in run.groups(states=("queued",))] == [encode_group(group)]


async def test_a_restarted_server_has_queue_batches_tickets_and_counters(store: SQLiteStore, tmp_path: Path) -> None:
    trainer, env = await started(store)
    ticket = await a_ticket(store, env)
    await store.append(blobs(*[a_group(f"g{i}") for i in range(3)]))
    batch = await store.lease(0, trainer)
    before = await store.status()
    await store.close()

    again = await SQLiteStore.open(tmp_path / "data", StoreLimits())
    try:
        leased = await again.lease(0, trainer)
        after = await again.status()

        assert isinstance(batch, Batch)
        assert isinstance(leased, Batch)
        assert [bytes(blob) for blob in leased.blobs] == [bytes(blob) for blob in batch.blobs]
        ages = {"trainer_last_seen_s", "envs", "trainer_waits_for"}
        assert after.model_dump(exclude=ages) == before.model_dump(exclude=ages)
        assert (await again.append(blobs(a_group("late", ticket=ticket))))[0].status == "accepted"
        assert (await again.status()).tickets_outstanding == 0
    finally:
        await again.close()


async def test_bytes_that_no_row_names_do_no_harm(store: SQLiteStore, tmp_path: Path) -> None:
    """As after a crash between the payload and its row."""
    await started(store)
    await store.append(blobs(a_group("g1")))
    await store.close()
    [segment] = (tmp_path / "data" / "current" / "segments").glob("*.seg")
    with segment.open("ab") as file:
        file.write(b"half a group")

    again = await SQLiteStore.open(tmp_path / "data", StoreLimits())

    assert (await again.status()).queued_groups == 1
    assert (await again.append(blobs(a_group("g2"))))[0].status == "accepted"
    latest = await again.latest_group()
    assert latest is not None
    assert next(read_blobs(latest)).header.group_id == "g2"
    await again.close()


async def test_a_run_that_cannot_be_put_aside_stays_open_and_the_next_try_works(
    store: SQLiteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(store)
    await store.append(blobs(a_group("g1")))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(StoreUnavailableError, match="No space left on device"):
            await asyncio.wait_for(store.open_run(a_run("another")), 5)

    assert (await store.status()).run_name == "run"
    assert (await store.append(blobs(a_group("g1"), a_group("g2")), is_strict=False))[1].status == "accepted"
    await store.open_run(a_run("another"))
    assert (await store.status()).run_name == "another"
    assert len(list((tmp_path / "data" / "archive").iterdir())) == 1


async def test_a_run_that_is_put_aside_with_no_room_for_a_new_one_is_followed_by_it_later(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(store)
    await store.append(blobs(a_group("g1")))
    tries: list[int] = []

    def refuse_once(*arguments: Any, **options: Any) -> Any:
        tries.append(1)
        return refuse() if len(tries) == 1 else open_database(*arguments, **options)

    monkeypatch.setattr(run_folder, "open_database", refuse_once)
    with pytest.raises(StoreUnavailableError):
        await asyncio.wait_for(store.open_run(a_run("another")), 5)

    assert await store.known(["g1"]) == set()
    await started(store)
    assert (await store.append(blobs(a_group("g1"))))[0].status == "accepted"


async def test_a_store_that_cannot_go_back_refuses_at_once_and_says_so(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(store)
    monkeypatch.setattr(SegmentFiles, "write", refuse)
    monkeypatch.setattr(run_folder, "read_snapshot", refuse)

    for text in ("could not write", "restart the server"):
        with pytest.raises(StoreUnavailableError, match=text):
            await asyncio.wait_for(store.append(blobs(a_group("g1"))), 5)
    with pytest.raises(StoreUnavailableError, match="restart the server"):
        await store.status()
    await asyncio.wait_for(store.close(), 5)


async def test_files_kept_for_reuse_do_not_go_to_the_archive(store: SQLiteStore, tmp_path: Path) -> None:
    await started(store)
    await store.append(blobs(a_group("g1")))
    (tmp_path / "data" / "current" / "segments" / "00000009.spare").write_bytes(b"old")

    await store.open_run(a_run("another"))

    assert list((tmp_path / "data" / "archive").glob("*/segments/*.seg"))
    assert not list((tmp_path / "data" / "archive").rglob("*.spare"))


async def test_runs_that_follow_each_other_leave_no_connection_open(store: SQLiteStore, tmp_path: Path) -> None:
    def open_indexes() -> int:
        links = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_open(number)]
        return sum(link.startswith(str(tmp_path)) and "archive" in link for link in links)

    found = []
    for number in range(4):
        await store.open_run(a_run(f"run-{number}"))
        await store.register_env(EnvRequest(name="env", group_size=2))
        await store.known(["g1"])
        found.append(open_indexes())

    assert found[3] == found[2] == found[1]


async def test_changes_that_cannot_be_collected_are_refused_and_the_next_are_written(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await started(store)
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "take_changes", refuse)
        with pytest.raises(StoreUnavailableError):
            await asyncio.wait_for(store.append(blobs(a_group("g1"))), 5)

    assert (await store.append(blobs(a_group("g1"))))[0].status == "accepted"
