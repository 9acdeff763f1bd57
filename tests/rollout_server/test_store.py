"""What every store promises. One specification; each store runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from atroposlib.errors import ConfigError, FencedError, NoRunError, QueueFullError, StepError, UnknownEnvError
from atroposlib.wire.columns import Blob, Group, decode_groups, encode_group, read_blobs
from atroposlib.wire.models import EnvRequest, TicketRequest, TicketUpdate
from rollout_server.stores.base import Batch, NotReady, Store
from rollout_server.stores.sqlite import SQLiteStore
from tests.builders import a_group, a_run

Reopen = Callable[[], Store]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def store(data_dir: Path) -> AsyncIterator[Store]:
    store = SQLiteStore(data_dir, ticket_ttl_s=0.05)
    yield store
    await store.close()


def blobs(*groups: Group) -> list[Blob]:
    return list(read_blobs(b"".join(encode_group(group) for group in groups)))


async def started(store: Store, **run: int) -> tuple[int, int]:
    """Open a run at version 0 with one environment; returns trainer session and environment session."""
    info = await store.open_run(a_run(**run))
    env = await store.register_env(EnvRequest(name="env", group_size=2))
    await store.set_policy(0, info.session)
    return info.session, env.session


async def tickets(store: Store, session: int, count: int = 1) -> list[str]:
    grant = await store.grant_tickets(TicketRequest(env_id=0, session=session, sequences=2, count=count))
    return [ticket.ticket for ticket in grant.tickets]


def ids(batch: Batch | NotReady) -> list[str]:
    assert isinstance(batch, Batch), batch
    return [decode_groups(blob)[0].group_id for blob in batch.blobs]


async def test_a_group_reaches_the_trainer_as_the_bytes_that_came_in(store: Store) -> None:
    trainer, env = await started(store)
    groups = [a_group(ticket=ticket) for ticket in await tickets(store, env, 2)]

    await store.append(blobs(*groups))
    batch = await store.lease(0, trainer)

    assert isinstance(batch, Batch)
    assert list(batch.blobs) == [encode_group(group) for group in groups]


async def test_a_repeated_group_is_a_duplicate_and_counts_once(store: Store) -> None:
    trainer, env = await started(store)
    group = a_group("g1", ticket=(await tickets(store, env))[0])

    first, second = await store.append(blobs(group)), await store.append(blobs(group))

    assert [first[0].status, second[0].status] == ["accepted", "duplicate"]
    assert (await store.status()).queued_groups == 1
    assert isinstance(await store.lease(0, trainer), NotReady)


async def test_the_batch_of_a_step_is_the_same_whenever_it_is_asked_for(store: Store) -> None:
    trainer, env = await started(store)
    await store.append(blobs(*[a_group(ticket=ticket) for ticket in await tickets(store, env, 4)]))

    first = ids(await store.lease(0, trainer))
    second = ids(await store.lease(1, trainer))

    assert ids(await store.lease(0, trainer)) == first
    assert not set(first) & set(second)


async def test_a_resumed_trainer_gets_the_same_batches_again_before_new_ones(store: Store, data_dir: Path) -> None:
    trainer, env = await started(store)
    await store.append(blobs(*[a_group(ticket=ticket) for ticket in await tickets(store, env, 4)]))
    before = [ids(await store.lease(step, trainer)) for step in (0, 1)]
    await store.ack(0, trainer, 1)

    resumed = (await store.open_run(a_run())).session

    assert [ids(await store.lease(step, resumed)) for step in (0, 1)] == before


async def test_an_older_trainer_is_fenced_off(store: Store) -> None:
    trainer, _ = await started(store)
    await store.open_run(a_run())

    with pytest.raises(FencedError, match="taken over"):
        await store.lease(0, trainer)


async def test_everything_survives_a_restart_of_the_server(store: Store, data_dir: Path) -> None:
    trainer, env = await started(store)
    granted = await tickets(store, env, 4)
    await store.append(blobs(*[a_group(f"g{i}", ticket=ticket) for i, ticket in enumerate(granted[:3])]))
    batch = ids(await store.lease(0, trainer))
    await store.close()

    again = SQLiteStore(data_dir)
    try:
        assert ids(await again.lease(0, trainer)) == batch
        status = await again.status()
        assert (status.queued_groups, status.tickets_outstanding, status.groups_accepted) == (1, 1, 3)
        assert await again.return_tickets(TicketUpdate(env_id=0, session=env, tickets=granted)) == [granted[3]]
    finally:
        await again.close()


async def test_committed_steps_cannot_be_leased_again_and_later_ones_can(store: Store) -> None:
    trainer, env = await started(store)
    await store.append(blobs(*[a_group(ticket=ticket) for ticket in await tickets(store, env, 4)]))
    await store.lease(0, trainer)
    await store.ack(0, trainer, 1)
    await store.lease(1, trainer)

    await store.commit(1, trainer)

    with pytest.raises(StepError, match="steps 1 to 2"):
        await store.lease(0, trainer)
    assert len(ids(await store.lease(1, trainer))) == 2


async def test_a_commit_before_its_acknowledgement_is_refused(store: Store) -> None:
    trainer, _ = await started(store)

    with pytest.raises(StepError, match="before its acknowledgement"):
        await store.commit(1, trainer)


async def test_tickets_stop_at_the_staleness_bound_and_go_on_with_the_next_version(store: Store) -> None:
    trainer, env = await started(store, batch_size=4, max_staleness=1)

    first = await tickets(store, env, 100)
    await store.append(blobs(*[a_group(ticket=ticket) for ticket in first[:2]]))
    await store.lease(0, trainer)
    full = await tickets(store, env, 100)
    await store.ack(0, trainer, 1)

    assert len(first) == 4, "two batches of two groups of two"
    assert full == []
    assert len(await tickets(store, env, 100)) == 2


async def test_no_group_starts_before_the_servers_run_a_known_version(store: Store) -> None:
    await store.open_run(a_run())
    env = await store.register_env(EnvRequest(name="env", group_size=2))

    assert await tickets(store, env.session) == []


async def test_a_batch_waits_for_a_straggler_that_must_be_in_it(store: Store) -> None:
    trainer, env = await started(store, batch_size=4, max_staleness=0)
    granted = await tickets(store, env, 2)
    await store.append(blobs(a_group(ticket=granted[0])))

    waiting = await store.lease(0, trainer)
    await store.append(blobs(a_group(ticket=granted[1])))

    assert isinstance(waiting, NotReady)
    assert "in flight" in waiting.waiting_for
    assert isinstance(await store.lease(0, trainer), Batch)


async def test_an_expired_ticket_gives_its_place_back(store: Store) -> None:
    import asyncio

    _, env = await started(store, max_staleness=0)
    await tickets(store, env, 2)
    assert await tickets(store, env) == []

    await asyncio.sleep(0.1)
    assert await store.expire_tickets() == 2

    assert len(await tickets(store, env, 9)) == 2
    assert (await store.status()).tickets_returned == {"expired": 2}


async def test_a_late_group_takes_a_free_place_or_is_retired_and_counted(store: Store) -> None:
    _, env = await started(store, max_staleness=0)
    lost = await tickets(store, env, 2)
    await store.return_tickets(TicketUpdate(env_id=0, session=env, tickets=lost, reason="shutdown"))

    found_place = await store.append(blobs(a_group(ticket=lost[0])))
    replacement = await tickets(store, env, 2)
    no_place = await store.append(blobs(a_group(ticket=lost[1])))

    assert found_place[0].status == "accepted"
    assert len(replacement) == 1
    assert (no_place[0].status, no_place[0].reason) == ("retired", "late")
    assert (await store.status()).groups_retired == {"late": 1}


async def test_a_restarted_environment_keeps_its_id_and_voids_its_old_tickets(store: Store) -> None:
    _, env = await started(store, max_staleness=0)
    await tickets(store, env, 2)

    again = await store.register_env(EnvRequest(name="env", group_size=2))

    assert again.env_id == 0
    assert len(await tickets(store, again.session, 9)) == 2
    with pytest.raises(UnknownEnvError):
        await tickets(store, env)


async def test_another_run_name_starts_clean_and_keeps_the_old_run_in_the_archive(store: Store, data_dir: Path) -> None:
    _trainer, env = await started(store)
    await store.append(blobs(a_group("g1", ticket=(await tickets(store, env))[0])))

    await store.open_run(a_run("other"))

    assert (await store.status()).queued_groups == 0
    assert await store.records() == []
    assert len(list((data_dir / "archive").glob("run-*.sqlite"))) == 1


async def test_tickets_end_with_the_last_step(store: Store) -> None:
    trainer, env = await started(store, batch_size=4, max_staleness=3, num_steps=1)

    granted = await tickets(store, env, 9)
    await store.append(blobs(*[a_group(ticket=ticket) for ticket in granted]))
    await store.lease(0, trainer)
    await store.ack(0, trainer, 1)
    grant = await store.grant_tickets(TicketRequest(env_id=0, session=env, sequences=2))

    assert len(granted) == 2, "one step is left, so one batch is enough"
    assert grant.is_finished
    with pytest.raises(StepError, match="num_steps"):
        await store.lease(1, trainer)


async def test_the_records_say_where_each_group_is(store: Store) -> None:
    trainer, env = await started(store)
    granted = await tickets(store, env, 3)
    await store.append(blobs(*[a_group(f"g{i}", ticket=ticket) for i, ticket in enumerate(granted)]))
    await store.lease(0, trainer)

    assert [(record.group_id, record.state, record.step) for record in await store.records()] == [
        ("g0", "batched", 0),
        ("g1", "batched", 0),
        ("g2", "queued", None),
    ]


async def test_refusals_name_the_fix_and_change_nothing(store: Store, data_dir: Path) -> None:
    with pytest.raises(NoRunError, match="atropos-trainer"):
        await store.run_info()
    trainer, _env = await started(store)
    with pytest.raises(ConfigError, match="use one of"):
        await store.register_env(EnvRequest(name="odd", group_size=3))
    with pytest.raises(UnknownEnvError, match="not registered"):
        await store.append(blobs(a_group(), a_group(env_id=7)))
    with pytest.raises(StepError, match="cannot be leased"):
        await store.lease(5, trainer)
    with pytest.raises(StepError, match="never handed out"):
        await store.ack(0, trainer, None)

    status = await store.status()
    assert (status.queued_groups, len(status.envs)) == (0, 1)


async def test_a_full_queue_refuses_and_stays_up(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "small", max_queued_bytes=2000)
    try:
        await started(store)
        with pytest.raises(QueueFullError, match="limit is 2000"):
            await store.append(blobs(*[a_group() for _ in range(5)]))
        assert (await store.status()).queued_groups == 0
    finally:
        await store.close()


async def test_a_request_that_cannot_be_committed_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "broken")
    try:
        _, env = await started(store)
        granted = await tickets(store, env, 2)
        store._tables.db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON payloads BEGIN SELECT RAISE(FAIL, 'disk full'); END"
        )
        with pytest.raises(Exception, match="disk full"):
            await store.append(blobs(a_group("g1", ticket=granted[0])))
        store._tables.db.execute("DROP TRIGGER full")

        results = await store.append(blobs(a_group("g1", ticket=granted[0])))

        assert results[0].status == "accepted"
    finally:
        await store.close()
