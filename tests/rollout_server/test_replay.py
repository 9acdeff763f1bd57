"""A replay gives a trainer the recorded batches again, byte for byte and in order, and takes nothing in."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from atroposlib.client import RolloutClient
from atroposlib.errors import AtroposError, ConfigError, FencedError, StepError
from atroposlib.wire.columns import encode_group, read_blobs
from atroposlib.wire.models import EnvRequest, NackRequest, RunRequest, TicketRequest
from rollout_server.app import create_app
from rollout_server.config import ServerConfig
from rollout_server.http.serving import listen, make_server
from rollout_server.run_database.replay_store import ReplayError, ReplayStore
from rollout_server.stores.base import Batch, NotReady, Shard, StoreLimits
from rollout_server.stores.embedded import SQLiteStore
from tests.builders import a_group, a_run
from tests.rollout_server.recordings import BATCH_SIZE, record, some_batches

STEPS = 3


def a_replay(num_steps: int = STEPS, *, batch_size: int = BATCH_SIZE, start_step: int | None = None) -> RunRequest:
    return a_run("again", batch_size=batch_size, num_steps=num_steps).model_copy(update={"start_step": start_step})


@pytest.fixture
async def leased(tmp_path: Path) -> list[list[bytes]]:
    """What the first trainer was given; the recording is in tmp_path / data."""
    return await record(tmp_path / "data", some_batches(STEPS), queued=[a_group("waiting", version=STEPS)])


@pytest.fixture
async def store(leased: list[list[bytes]], tmp_path: Path) -> AsyncIterator[ReplayStore]:
    store = await ReplayStore.open(tmp_path / "data")
    yield store
    await store.close()


def forget_payload_of_step(folder: Path, step: int) -> None:
    """As if retention had deleted the segment file that held it."""
    with closing(sqlite3.connect(folder / "current" / "run.sqlite")) as db, db:
        db.execute("UPDATE groups SET segment = 99999999 WHERE step = ?", (step,))


async def batch_of(store: ReplayStore, step: int, session: int, shard: Shard | None = None) -> list[bytes]:
    outcome = await store.lease(step, session, shard or Shard())
    assert isinstance(outcome, Batch)
    return [bytes(blob) for blob in outcome.blobs]


async def test_every_batch_comes_back_with_the_same_bytes_in_the_same_order(
    store: ReplayStore, leased: list[list[bytes]]
) -> None:
    run = await store.open_run(a_replay())

    replayed = [await batch_of(store, step, run.session) for step in range(STEPS)]

    assert replayed == leased


async def test_a_trainer_over_http_sees_the_recorded_run(leased: list[list[bytes]], tmp_path: Path) -> None:
    config = ServerConfig(port=0)
    listener = listen(config)
    app = create_app(config, open_store=lambda _: ReplayStore.open(tmp_path / "data"))
    server = make_server(app, config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))

    async with RolloutClient(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline_s=10) as client:
        run = await client.open_run(a_replay())
        replayed = []
        for step in range(STEPS):
            groups = await client.lease(step, session=run.session, deadline_s=5)
            replayed.append([group.group_id for group in groups])
            await client.ack(step, session=run.session, policy_version=step + 1)
        status = await client.status()
        with pytest.raises(ReplayError, match="takes no groups"):
            await client.post_groups([a_group()])
    server.should_exit = True
    async with asyncio.timeout(15):
        await serving

    assert replayed == [[f"s{step}-0", f"s{step}-1"] for step in range(STEPS)]
    assert (status.step, status.policy_version, status.run_name) == (STEPS, STEPS, "again")


async def test_shards_make_up_the_batch(store: ReplayStore, leased: list[list[bytes]]) -> None:
    run = await store.open_run(a_replay())

    parts = [await batch_of(store, 0, run.session, Shard(index, 2)) for index in range(2)]

    assert sorted(parts[0] + parts[1]) == sorted(leased[0])
    assert all(parts)


async def test_what_the_trainer_says_is_kept_in_memory_only(store: ReplayStore, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.seg")}
    run = await store.open_run(a_replay())
    await store.lease(0, run.session)
    await store.ack(0, run.session, 1)
    await store.commit(1, run.session)
    await store.set_policy(7, run.session)
    status = await store.status()

    again = await SQLiteStore.open(tmp_path / "data", StoreLimits(), synchronous="normal")
    recorded = await again.run_info()
    await again.close()

    assert (status.step, status.committed_step, status.policy_version) == (1, 1, 7)
    assert (recorded.run_name, recorded.session, recorded.committed_step) == ("recorded", 1, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before


async def test_a_trainer_that_starts_again_takes_over(store: ReplayStore, leased: list[list[bytes]]) -> None:
    first = await store.open_run(a_replay())
    second = await store.open_run(a_replay(start_step=1))

    with pytest.raises(FencedError, match="taken over"):
        await store.lease(0, first.session)
    assert second.acknowledged_step == 1
    assert await batch_of(store, 1, second.session) == leased[1]


async def test_another_batch_size_is_refused_with_the_recorded_one(store: ReplayStore) -> None:
    with pytest.raises(ConfigError, match="set batch_size=4"):
        await store.open_run(a_replay(batch_size=8))


async def test_steps_beyond_the_recording_are_refused_with_the_range(store: ReplayStore) -> None:
    with pytest.raises(StepError, match=r"steps 0 to 2; set num_steps=3"):
        await store.open_run(a_replay(num_steps=4))
    run = await store.open_run(a_replay(num_steps=2))
    with pytest.raises(StepError, match="num_steps=2"):
        await store.lease(2, run.session)


async def test_a_recording_whose_first_batches_are_gone_starts_later(tmp_path: Path, leased: list[list[bytes]]) -> None:
    forget_payload_of_step(tmp_path / "data", 0)
    store = await ReplayStore.open(tmp_path / "data")

    with pytest.raises(StepError, match=r"steps 1 to 2; resume from a checkpoint of step 1 or later"):
        await store.open_run(a_replay())
    run = await store.open_run(a_replay(start_step=1))

    assert await batch_of(store, 1, run.session) == leased[1]
    await store.close()


async def test_a_recording_without_any_payload_is_refused(tmp_path: Path, leased: list[list[bytes]]) -> None:
    for segment in (tmp_path / "data" / "current" / "segments").iterdir():
        segment.unlink()

    with pytest.raises(ConfigError, match="nothing to replay"):
        await ReplayStore.open(tmp_path / "data")


async def test_nothing_is_taken_in(store: ReplayStore) -> None:
    run = await store.open_run(a_replay())
    blobs = list(read_blobs(encode_group(a_group())))

    with pytest.raises(ReplayError, match="takes no groups; for a live run start run-api"):
        await store.append(blobs)
    with pytest.raises(ReplayError, match="environments"):
        await store.register_env(EnvRequest(name="env", group_size=2))
    with pytest.raises(ReplayError, match="tickets"):
        await store.grant_tickets(TicketRequest(env_id=0, session=1, sequences=2))
    with pytest.raises(AtroposError, match="dissolves no batch"):
        await store.nack(0, NackRequest(session=run.session, reason="broken"))


async def test_a_step_that_was_not_leased_is_not_acknowledged(store: ReplayStore) -> None:
    run = await store.open_run(a_replay())

    with pytest.raises(StepError, match="step 0 was not leased"):
        await store.ack(0, run.session, None)
    with pytest.raises(StepError, match="0 steps are acknowledged"):
        await store.commit(1, run.session)


async def test_a_paced_replay_waits_for_its_time_and_then_wakes_the_trainer(
    leased: list[list[bytes]], tmp_path: Path
) -> None:
    store = await ReplayStore.open(tmp_path / "data", seconds_per_step=0.3)
    woken = asyncio.Event()
    store.on_queue = woken.set
    run = await store.open_run(a_replay())

    assert await batch_of(store, 0, run.session) == leased[0]
    early = await store.lease(1, run.session)
    async with asyncio.timeout(10):
        await woken.wait()

    assert isinstance(early, NotReady)
    assert "a step every 0.3 s" in early.waiting_for
    assert await batch_of(store, 1, run.session) == leased[1]
    await store.close()


async def test_the_ledger_of_the_recorded_run_is_paged(store: ReplayStore) -> None:
    first = await store.records(limit=4)
    assert first.next is not None
    rest = await store.records(after=first.next)

    assert len(first.records) + len(rest.records) == STEPS * 2 + 1
    assert rest.next is None
    assert rest.records[-1].group_id == "waiting"
