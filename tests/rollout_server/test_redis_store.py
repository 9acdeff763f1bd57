"""What only the Redis store has to promise: lost answers, restarts, full memory, several servers on one run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis")

from redis.exceptions import ConnectionError as RedisConnectionError

from atroposlib.errors import ConfigError, QueueFullError, StoreUnavailableError
from atroposlib.wire.models import EnvRequest, NackRequest, TicketRequest, TicketUpdate
from rollout_server.stores.base import Batch, NotReady, StoreLimits
from rollout_server.stores.redis_server import durability_warnings
from rollout_server.stores.redis_store import PayloadLostError, RedisStore
from tests.builders import a_group
from tests.processes import free_port
from tests.rollout_server.conftest import Stores
from tests.rollout_server.test_store import blobs, held, places, post, started, tickets
from tests.valkey import ValkeyProcess

pytestmark = pytest.mark.redis


@pytest.fixture
async def stores(valkey: ValkeyProcess, tmp_path: Path) -> AsyncIterator[Stores]:
    stores = Stores("redis", tmp_path, valkey.url)
    yield stores
    await stores.close_all()


async def opened(stores: Stores, **limits: Any) -> RedisStore:
    store = await stores.open(**limits)
    assert isinstance(store, RedisStore)
    return store


async def command(store: RedisStore, *words: str | bytes | int) -> Any:
    return await store._link.command(*words)


async def payloads_in(store: RedisStore) -> list[bytes]:
    found: list[bytes] = await command(store, "KEYS", f"{store._link.namespace}:p:*")
    return found


def lose_answers(store: RedisStore, monkeypatch: pytest.MonkeyPatch, *, times: int = 1) -> None:
    """The next scripts run, but the connection breaks before their answer arrives."""
    run, left = store._link.command, times

    def command(*words: Any) -> Awaitable[Any]:
        async def run_and_break() -> Any:
            nonlocal left
            answer = await run(*words)
            if words[0].startswith("EVAL") and left > 0:
                left -= 1
                raise RedisConnectionError("connection reset")
            return answer

        return run_and_break()

    monkeypatch.setattr(store._link, "command", command)


def before_binding(
    store: RedisStore, interfere: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something happens between the first plan and its binding."""
    run, has_happened = store._run, False

    async def interrupted(script: str, answer: type[Any], **facts: object) -> Any:
        nonlocal has_happened
        if script == "bind" and not has_happened:
            has_happened = True
            await interfere()
        return await run(script, answer, **facts)

    monkeypatch.setattr(store, "_run", interrupted)


class TestLostAnswers:
    async def test_a_group_is_accepted_once_and_answered_as_such(
        self, stores: Stores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = await opened(stores)
        trainer, env = await started(store)
        granted = await tickets(store, env, 2)
        lose_answers(store, monkeypatch, times=2)

        assert await post(store, granted) == ["accepted", "accepted"]

        status = await store.status()
        assert (status.groups_accepted, status.groups_duplicate, status.tickets_outstanding) == (2, 0, 0)
        assert len(await held(store, 0, trainer)) == 2
        assert [await command(store, "TTL", key) for key in await payloads_in(store)] == [-1, -1]

    async def test_payload_that_was_accepted_survives_a_refusal_of_the_repetition(
        self, stores: Stores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        group = a_group("g1")
        store = await opened(stores, max_queued_bytes=int(1.5 * len(blobs(group)[0].data)))
        trainer, _ = await started(store, batch_size=2)
        lose_answers(store, monkeypatch)

        with pytest.raises(QueueFullError):
            await store.append(blobs(group))

        assert await held(store, 0, trainer) == ["g1"]

    async def test_tickets_are_granted_once(self, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
        store = await opened(stores)
        _, env = await started(store)
        lose_answers(store, monkeypatch)

        granted = await tickets(store, env, 3)

        assert (len(granted), (await store.status()).tickets_outstanding) == (3, 3)
        update = TicketUpdate(env_id=0, session=env, tickets=granted)
        assert await store.renew_tickets(update) == granted

    async def test_batches_are_formed_and_dissolved_once(self, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
        store = await opened(stores)
        trainer, _ = await started(store)
        await store.append(blobs(*[a_group(f"g{i}") for i in range(4)]))
        lose_answers(store, monkeypatch, times=2)
        first = await held(store, 0, trainer)
        lose_answers(store, monkeypatch)

        result = await store.nack(0, NackRequest(session=trainer, reason="x"))

        assert first == ["g0", "g1"]
        assert (result.requeued, (await store.status()).formed_steps) == (2, 0)

    async def test_closing_again_does_not_close_the_run_that_was_opened_in_between(self, stores: Stores) -> None:
        store = await opened(stores)
        await started(store)
        closed = (await store.run_info()).run_id
        await store.close_run()
        await started(store)

        await store._run("close_run", type(None), run_id=closed)

        assert (await store.run_info()).run_name == "run"


class TestRetention:
    async def trained(self, store: RedisStore) -> None:
        """A run with one committed batch."""
        trainer, _ = await started(store)
        await store.append(blobs(a_group(), a_group()))
        await store.lease(0, trainer)
        await store.ack(0, trainer, 1)
        await store.commit(1, trainer)

    @pytest.mark.parametrize(("retain_bytes", "kept"), [(0, 0), (1000, 1), (1 << 20, 2), (-1, 2)])
    async def test_committed_payload_is_kept_as_long_as_there_is_room(
        self, stores: Stores, retain_bytes: int, kept: int
    ) -> None:
        store = await opened(stores, retain_bytes=retain_bytes)

        await self.trained(store)

        assert len(await payloads_in(store)) == kept

    async def test_an_archived_run_is_deleted_when_there_is_no_room_for_it(self, stores: Stores) -> None:
        store = await opened(stores, retain_bytes=4000)
        await self.trained(store)
        await store.append(blobs(a_group()))

        await store.close_run()
        kept = len(await payloads_in(store))
        await store.expire_tickets()
        await self.trained(store)
        await store.close_run()
        await store.expire_tickets()

        assert kept == 3
        assert len(await payloads_in(store)) == 2
        generations = {key.split(b":")[1] for key in await command(store, "KEYS", f"{store._link.namespace}:*:ledger")}
        assert generations == {b"1"}

    async def test_nothing_of_a_refused_request_stays(self, stores: Stores) -> None:
        store = await opened(stores, max_queued_bytes=2000)
        await started(store)

        with pytest.raises(QueueFullError):
            await store.append(blobs(*[a_group() for _ in range(5)]))

        assert await payloads_in(store) == []

    async def test_payload_that_no_script_adopted_has_an_end(self, stores: Stores) -> None:
        store = await opened(stores)

        await store._link._put([("orphan", b"x" * 100)])

        (key,) = await payloads_in(store)
        assert 0 < await command(store, "TTL", key) <= 3600


class TestSeveralServers:
    async def test_each_sees_what_the_other_did_and_is_woken_by_it(self, stores: Stores) -> None:
        first, second = await opened(stores), await opened(stores)
        is_woken, events = asyncio.Event(), asyncio.Queue[str]()
        second.on_queue = is_woken.set
        second.on_event = lambda kind, text: events.put_nowait(kind)

        trainer, _ = await started(first)
        assert isinstance(await second.lease(0, trainer), NotReady)
        is_woken.clear()
        await first.append(blobs(a_group("g1"), a_group("g2")))

        async with asyncio.timeout(10):
            await is_woken.wait()
            assert await events.get() == "run_opened"
        assert await held(second, 0, trainer) == ["g1", "g2"]
        assert await held(first, 0, trainer) == ["g1", "g2"]

    async def test_one_step_has_one_batch_whoever_is_asked_at_the_same_time(self, stores: Stores) -> None:
        servers = [await opened(stores) for _ in range(4)]
        trainer, _ = await started(servers[0], batch_size=8)
        await servers[0].append(blobs(*[a_group() for _ in range(8)]))

        batches = await asyncio.gather(*[held(server, 0, trainer) for server in servers])

        assert batches == [batches[0]] * 4
        assert (await servers[0].status()).formed_steps == 1

    async def test_a_plan_whose_groups_are_gone_is_made_anew(
        self, stores: Stores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = await opened(stores), await opened(stores)
        trainer, _ = await started(first)
        await first.append(blobs(*[a_group(f"g{i}") for i in range(4)]))

        async def other_server_forms_and_dissolves() -> None:
            await second.lease(0, trainer)
            await second.nack(0, NackRequest(session=trainer, reason="x", retire=["g0"]))

        before_binding(first, other_server_forms_and_dissolves, monkeypatch)

        assert await held(first, 0, trainer) == ["g1", "g2"]

    async def test_a_plan_that_would_strand_a_group_that_started_meanwhile_is_made_anew(
        self, stores: Stores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = await opened(stores)
        trainer, env = await started(store, max_staleness=0)
        await store.append(blobs(a_group("old"), a_group("u1", version=None), a_group("u2", version=None)))

        async def a_group_starts() -> None:
            assert len(await tickets(store, env)) == 1

        before_binding(store, a_group_starts, monkeypatch)
        waiting = await store.lease(0, trainer)

        assert isinstance(waiting, NotReady)
        assert "1 older groups in flight" in waiting.waiting_for

    async def test_runs_in_other_namespaces_are_apart(self, stores: Stores, valkey: ValkeyProcess) -> None:
        other = await RedisStore.open(valkey.url, StoreLimits(), namespace=f"{stores.namespace}-b")
        await started(await opened(stores))

        assert (await other.status()).run_name is None

        await other.close()


class TestRestartsOfRedis:
    @pytest.fixture
    async def server(self, tmp_path: Path) -> AsyncIterator[ValkeyProcess]:
        server = ValkeyProcess(tmp_path / "durable", is_durable=True)
        server.start()
        yield server
        server.stop()

    async def test_calls_wait_for_it_and_find_everything(self, server: ValkeyProcess) -> None:
        store = await RedisStore.open(server.url, StoreLimits())
        trainer, env = await started(store)
        granted = await tickets(store, env, 3)
        await store.append(blobs(*[a_group(f"g{i}", ticket=ticket) for i, ticket in enumerate(granted[:2])]))
        batch = await held(store, 0, trainer)

        server.kill()
        waiting = asyncio.create_task(store.append(blobs(a_group("g2", ticket=granted[2]))))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.start)

        assert [result.status for result in await waiting] == ["accepted"]
        assert await held(store, 0, trainer) == batch
        assert (await places(store))["g2"] == ("queued", None, None)
        await store.close()

    async def test_waiters_are_woken_when_it_is_back(self, server: ValkeyProcess) -> None:
        store = await RedisStore.open(server.url, StoreLimits())
        is_woken = asyncio.Event()
        store.on_capacity = is_woken.set

        server.kill()
        await asyncio.to_thread(server.start)

        async with asyncio.timeout(20):
            await is_woken.wait()
        await store.close()

    async def test_tickets_that_nobody_could_renew_meanwhile_are_not_held_against_anyone(
        self, server: ValkeyProcess
    ) -> None:
        stores = Stores("redis", Path(), server.url)
        store = await stores.open(ticket_ttl_s=10)
        _, env = await started(store)
        await tickets(store, env, 2)
        await store.expire_tickets()

        server.kill()
        stores.clock.advance(60)
        await asyncio.to_thread(server.start)

        assert await store.expire_tickets() == 0
        stores.clock.advance(11)
        assert await store.expire_tickets() == 2
        await stores.close_all()

    async def test_a_redis_that_stays_away_is_named_when_the_deadline_is_over(self, server: ValkeyProcess) -> None:
        store = await RedisStore.open(server.url, StoreLimits(), deadline_s=0.3)
        server.kill()

        with pytest.raises(StoreUnavailableError, match=f"127.0.0.1:{server.port} did not answer within"):
            await store.status()

        await store.close()

    async def test_scripts_that_redis_forgot_are_sent_again(self, stores: Stores) -> None:
        store = await opened(stores)
        await started(store)

        await command(store, "SCRIPT", "FLUSH")

        assert (await store.status()).run_name == "run"


class TestRefusals:
    async def test_no_server_at_the_address(self) -> None:
        port = free_port()

        with pytest.raises(ConfigError, match=f"redis_url does not work: Redis at 127.0.0.1:{port}"):
            await RedisStore.open(f"redis://127.0.0.1:{port}", StoreLimits(), deadline_s=0.2)

    async def test_an_address_that_cannot_be_read(self) -> None:
        with pytest.raises(ConfigError, match=r"expected e\.g\. redis://"):
            await RedisStore.open("localhost:6379", StoreLimits())

    async def test_keys_of_a_newer_server(self, stores: Stores, valkey: ValkeyProcess) -> None:
        store = await opened(stores)
        await command(store, "SET", f"{store._link.namespace}:format", 99)

        with pytest.raises(ConfigError, match="have format 99"):
            await opened(stores)

    async def test_a_payload_that_redis_lost_is_named_with_the_way_out(self, stores: Stores) -> None:
        store = await opened(stores)
        trainer, _ = await started(store)
        await store.append(blobs(a_group("g1"), a_group("g2")))
        for key in await payloads_in(store):
            await command(store, "DEL", key)

        with pytest.raises(PayloadLostError, match=r"'g1'.*in retire"):
            await store.lease(0, trainer)

        result = await store.nack(0, NackRequest(session=trainer, reason="lost", retire=["g1", "g2"]))
        assert (result.requeued, result.retired) == (0, 2)

    async def test_a_full_redis_takes_no_groups_but_lets_the_trainer_go_on(self, tmp_path: Path) -> None:
        server = ValkeyProcess(tmp_path / "small")
        server.start()
        try:
            store = await RedisStore.open(server.url, StoreLimits())
            trainer, _ = await started(store)
            await store.append(blobs(a_group("g1"), a_group("g2")))
            await command(store, "CONFIG", "SET", "maxmemory", 1)

            with pytest.raises(QueueFullError, match="over its maxmemory"):
                await store.append(blobs(a_group()))
            assert await held(store, 0, trainer) == ["g1", "g2"]
            await store.ack(0, trainer, 1)
            await store.commit(1, trainer)
            with pytest.raises(QueueFullError):
                await store.append(blobs(a_group()))

            assert await payloads_in(store) == [], "what is only retained makes room"
            await command(store, "CONFIG", "SET", "maxmemory", 0)
            assert await post(store, [""]) == ["accepted"]
            await store.close()
        finally:
            server.stop()


@pytest.mark.parametrize(
    ("settings", "fixes"),
    [
        ({"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}, []),
        ({"appendonly": "no"}, ["set appendonly yes"]),
        ({"appendonly": "yes", "appendfsync": "no"}, ["set appendfsync everysec"]),
        ({"maxmemory-policy": "allkeys-lru", "maxmemory": "1000"}, ["set maxmemory-policy noeviction"]),
        ({}, []),
    ],
)
def test_settings_that_could_lose_groups_are_named_with_their_fix(settings: dict[str, str], fixes: list[str]) -> None:
    warnings = durability_warnings(settings)

    assert [fix in warning for fix, warning in zip(fixes, warnings, strict=True)] == [True] * len(fixes)


async def test_the_cost_of_a_call_does_not_depend_on_the_queue(stores: Stores) -> None:
    """Counted in commands that the scripts run, so that the machine's mood does not matter."""
    store = await opened(stores)
    trainer, _ = await started(store, batch_size=2, max_staleness=9, num_steps=10_000)
    env = await store.register_env(EnvRequest(name="second", group_size=2))

    async def cost() -> int:
        before = await _commands(store)
        await store.append(blobs(a_group(version=None)))
        await store.grant_tickets(TicketRequest(env_id=1, session=env.session, sequences=2))
        await store.status()
        return await _commands(store) - before

    small = await cost()
    await store.append(blobs(*[a_group(version=None) for _ in range(2000)]))
    large = await cost()

    assert large <= small + 2
    assert isinstance(await store.lease(0, trainer), Batch)


async def _commands(store: RedisStore) -> int:
    stats = await store._link.redis.info("commandstats")
    return sum(int(entry["calls"]) for entry in stats.values())
