"""Servers that join and leave, engines that are watched, policy versions without an engine's help."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atroposlib.envs.server_handling.engines.engine_load import EngineLoad
from atroposlib.envs.server_handling.pool import engine_watch, server_recovery
from atroposlib.envs.server_handling.pool.seat import Split
from atroposlib.envs.server_handling.pool.server_pool import Lease, ServerPool
from atroposlib.envs.server_handling.pool.version_bounds import oldest
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.errors import ConfigError, ModelServerError
from tests.envs.fake_servers import a_pool, until


async def sample(manager: ServerManager, **kwargs: Any) -> Any:
    return await manager.sample_tokens(input_ids=[5, 6], **kwargs)


def urls(manager: ServerManager) -> list[str | None]:
    return [server.config.base_url for server in manager.servers]


async def test_a_server_that_joins_is_asked_for_its_health_before_it_serves() -> None:
    manager, [first] = a_pool("a", num_max_requests_at_once=1)
    await manager.update_weight(0.5)
    manager.train_only_on_published_versions()
    first.open.clear()
    first.token_versions = [(3, 2)]
    first.versions = [3]
    tasks = [asyncio.create_task(sample(manager)) for _ in range(2)]
    await until(lambda: first.calls)

    await manager.add_server(APIServerConfig(base_url="http://b/v1"))
    second: Any = manager.servers[1]
    second.token_versions = [(3, 2)]
    second.versions = [3]
    assert not second.calls
    await until(lambda: second.calls)

    assert second.checks == 1
    assert second.require_version
    assert second.sem.weight == 0.5
    first.open.set()
    await asyncio.gather(*tasks)
    await manager.close()


async def test_a_server_that_leaves_ends_what_it_has_and_gets_nothing_new() -> None:
    manager, (one, two) = a_pool("ab")
    one.open.clear()
    running = asyncio.create_task(sample(manager, prefer=one))
    await until(lambda: one.calls)

    leaving = asyncio.create_task(manager.remove_server("http://a/v1/"))
    await asyncio.sleep(0)
    await asyncio.gather(*(sample(manager, prefer=one) for _ in range(5)))

    assert (len(one.calls), len(two.calls)) == (1, 5)
    assert not leaving.done()
    assert manager.in_flight == 1
    one.open.set()
    await running
    await leaving
    assert one.is_closed
    assert urls(manager) == ["http://b/v1"]
    assert manager.sampled_tokens == 12, "what the gone server sampled still counts"
    await manager.close()


async def test_who_waits_for_a_server_that_leaves_is_served_by_another() -> None:
    manager, (one, two) = a_pool("ab", num_max_requests_at_once=1)
    one.open.clear()
    two.open.clear()
    running = [asyncio.create_task(sample(manager, prefer=server)) for server in (one, two)]
    waiting = asyncio.create_task(sample(manager, prefer=one))
    await until(lambda: manager._pool.waiting == 1)

    leaving = asyncio.create_task(manager.remove_server("http://a/v1"))
    await asyncio.sleep(0)
    two.open.set()
    await waiting

    assert len(two.calls) == 2
    one.open.set()
    await asyncio.gather(*running, leaving)
    await manager.close()


async def test_requests_wait_out_a_moment_without_any_server() -> None:
    manager, _ = a_pool("a")
    await manager.sync_servers([])
    waiting = asyncio.create_task(sample(manager))
    await asyncio.sleep(0.01)
    assert not waiting.done()

    await manager.sync_servers(["http://b/v1"])
    assert (await waiting).completions[0].token_ids == [7, 8]
    await manager.close()


async def test_servers_follow_a_registry() -> None:
    manager, servers = a_pool("ab", timeout=77)
    kept = servers[1]
    [gone] = [server for server in servers if server is not kept]
    gone.open.clear()
    running = asyncio.create_task(sample(manager, prefer=gone))
    await until(lambda: gone.calls)

    await manager.sync_servers(["http://b/v1/", "http://c/v1", "http://d/v1"])

    assert urls(manager) == ["http://b/v1", "http://c/v1", "http://d/v1"]
    assert manager.servers[0] is kept
    assert manager.servers[2].config.timeout == 77
    assert not gone.is_closed, "it leaves in the background"
    gone.open.set()
    await running
    await until(lambda: gone.is_closed)
    await manager.close()


async def test_joining_twice_and_leaving_without_being_there_are_errors() -> None:
    manager, _ = a_pool("a")

    with pytest.raises(ConfigError, match="in the pool already"):
        await manager.add_server(APIServerConfig(base_url="http://a/v1/"))
    with pytest.raises(ConfigError, match=r"http://x/v1 is not in the pool; it has http://a/v1"):
        await manager.remove_server("http://x/v1")
    await manager.close()


async def test_close_ends_the_background_work() -> None:
    manager, (one, two) = a_pool("ab")
    one.is_down = True
    await asyncio.gather(*(sample(manager) for _ in range(12)))
    work = set(manager._pool._tasks)
    assert work

    await manager.close()

    assert all(task.done() for task in work)
    assert one.is_closed
    assert two.is_closed


async def test_an_overloaded_engine_gets_less_at_once_and_more_when_it_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_watch, "LOOK_EVERY_S", 0.001)
    manager, [server] = a_pool("a", num_max_requests_at_once=20)
    server.metrics = EngineLoad(running=4, waiting=16, kv_cache_usage=0.5)
    server.open.clear()
    seat = manager._pool.seats[0]
    tasks = [asyncio.create_task(sample(manager)) for _ in range(40)]
    await until(lambda: seat.concurrency.limit == 1)

    server.metrics = EngineLoad(running=4, waiting=0, kv_cache_usage=0.5)
    await until(lambda: seat.concurrency.limit == 20)

    server.metrics = None
    server.open.set()
    await asyncio.gather(*tasks)
    await manager.close()


async def test_an_engine_without_metrics_gets_what_its_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "LOOK_EVERY_S", 0.001)
    manager, [server] = a_pool("a", num_max_requests_at_once=20)
    server.metrics = EngineLoad(running=4, waiting=16, kv_cache_usage=0.5)
    server.open.clear()
    seat = manager._pool.seats[0]
    tasks = [asyncio.create_task(sample(manager)) for _ in range(40)]
    await until(lambda: seat.concurrency.limit < 20)

    server.metrics = None
    await until(lambda: seat.concurrency.limit == 20)

    server.open.set()
    await asyncio.gather(*tasks)
    await manager.close()


@pytest.mark.parametrize("error", [ModelServerError("503"), TimeoutError()])
async def test_an_engine_that_does_not_say_its_load_this_time_keeps_its_limit(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(engine_watch, "LOOK_EVERY_S", 0.001)
    manager, [server] = a_pool("a", num_max_requests_at_once=20)
    server.metrics = EngineLoad(running=4, waiting=16, kv_cache_usage=0.5)
    server.open.clear()
    seat = manager._pool.seats[0]
    tasks = [asyncio.create_task(sample(manager)) for _ in range(40)]
    await until(lambda: seat.concurrency.limit == 1)
    looks = 0

    async def fail() -> None:
        nonlocal looks
        looks += 1
        raise error

    server.engine_load = fail
    await until(lambda: looks == 5)

    assert seat.concurrency.limit == 1
    server.open.set()
    await asyncio.gather(*tasks)
    await manager.close()


async def test_a_failed_direct_request_does_not_starve_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_recovery, "LOOK_EVERY_S", 0.001)
    manager, (one, _) = a_pool("ab")
    one.fail_next = [ModelServerError("a moment of weakness")]
    with pytest.raises(ModelServerError):
        await one.sample_tokens(input_ids=[1])
    one.load.retry_at = 0.0
    assert not one.server_healthy

    await sample(manager)

    await until(lambda: one.server_healthy)
    assert one.checks == 1
    await manager.close()


async def test_a_leaving_server_that_fails_is_not_brought_back() -> None:
    manager, [server] = a_pool("a")
    pool = manager._pool
    [seat] = pool.seats
    leases = [await pool.acquire(Split.TRAIN) for _ in range(3)]
    watch = seat.watch
    assert watch is not None

    pool.detach(seat)
    for lease in leases:
        pool.failed(lease, "boom")
        pool.release(lease)
    assert seat.recovery is None
    await pool.drain(seat)
    await asyncio.gather(watch, return_exceptions=True)

    assert watch.cancelled()
    assert server.is_closed
    assert pool.leaving == []
    await manager.close()


async def test_a_server_whose_connections_do_not_close_is_gone_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, [server] = a_pool("a")
    await sample(manager)

    async def close() -> None:
        raise OSError("stuck")

    with monkeypatch.context() as patch:
        patch.setattr(server, "close", close)
        with pytest.raises(OSError, match="stuck"):
            await manager.remove_server("http://a/v1")

    assert manager._pool.leaving == []
    assert manager.sampled_tokens == 2
    await manager.close()


async def test_an_idle_engine_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "LOOK_EVERY_S", 0.001)
    manager, _ = a_pool("a")
    await sample(manager)

    watch = manager._pool.seats[0].watch
    assert watch is not None
    await until(watch.done)
    await sample(manager)
    assert manager._pool.seats[0].watch is not watch
    await manager.close()


@pytest.mark.parametrize(
    ("looks", "runs"), [([4, 4], [(4, 2)]), ([4, 5], [(4, 2)]), ([5, 4], [(4, 2)])], ids=["same", "newer", "older"]
)
async def test_versions_are_bounded_by_looks_before_and_after(looks: list[int], runs: list[tuple[int, int]]) -> None:
    manager, [server] = a_pool("a")
    server.versions = looks
    manager.train_only_on_published_versions()

    assert (await sample(manager)).completions[0].versions == runs
    await manager.close()


async def test_without_training_nobody_asks_for_versions() -> None:
    manager, [server] = a_pool("a")
    server.versions = []

    assert (await sample(manager)).completions[0].versions == [(-1, 2)]
    await manager.close()


async def test_what_the_engine_says_itself_is_kept_and_ends_the_looks() -> None:
    manager, [server] = a_pool("a")
    server.versions = [9, 9, 9]
    server.token_versions = [(3, 1), (4, 1)]
    manager.train_only_on_published_versions()

    first, second = await sample(manager), await sample(manager)

    assert [answer.completions[0].versions for answer in (first, second)] == [[(3, 1), (4, 1)]] * 2
    assert len(server.versions) == 2, "one look before the first answer"
    server.token_versions = [(-1, 2)]
    server.versions = [6]
    assert (await sample(manager)).completions[0].versions == [(6, 2)], "an engine that stops saying is asked again"
    await manager.close()


async def test_tokens_of_weights_without_a_number_are_refused() -> None:
    manager, [server] = a_pool("a", timeout=1)
    server.config.timeout = 0.2
    server.versions = [None, 4, None]
    manager.train_only_on_published_versions()

    with pytest.raises(ModelServerError, match="published policy version"):
        await sample(manager)
    await manager.close()


@given(before=st.none() | st.integers(-1, 9), after=st.none() | st.integers(-1, 9))
def test_a_bound_is_never_newer_than_either_look(before: int | None, after: int | None) -> None:
    bound = oldest(before, after)

    assert bound == -1 if None in (before, after) or -1 in (before, after) else bound == min(before, after)  # type: ignore[type-var]


def test_a_failed_server_is_found_again_by_the_next_event_loop() -> None:
    manager, [server] = a_pool("a")
    server.is_down = True
    server.config.timeout = 0.5

    async def fail() -> None:
        with pytest.raises(ModelServerError):
            await manager.completion(prompt="x")

    asyncio.run(fail())
    server.is_down = False
    server.config.timeout = 10

    async def succeed() -> str:
        answer = await manager.completion(prompt="x")
        await manager.close()
        return answer.choices[0].text

    assert asyncio.run(succeed()) == "http://a/v1"


async def test_a_session_waits_out_a_moment_without_any_server(tokenizer: Any) -> None:
    manager, _ = a_pool("a")
    await manager.sync_servers([])

    async def converse() -> None:
        async with manager.managed_server(tokenizer=tokenizer) as session:
            await session.completion(prompt="x")

    waiting = asyncio.create_task(converse())
    await asyncio.sleep(0)
    await manager.sync_servers(["http://b/v1"])
    await waiting
    await manager.close()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "release", "release", "fail", "give_up", "weight", "leave", "join"]),
        st.integers(0, 7),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS)
def test_no_slot_is_lost_or_given_twice_whatever_happens(operations: list[tuple[str, int]]) -> None:
    async def scenario() -> None:
        manager, _ = a_pool("abc", num_max_requests_at_once=3)
        pool = manager._pool
        asking: list[asyncio.Task[Lease]] = []
        for operation, number in operations:
            await apply(pool, asking, operation, number)
            await asyncio.sleep(0)
            assert all(seat.in_flight[Split.TRAIN] <= 3 for seat in [*pool.seats, *pool.leaving])
        await drain(pool, asking)
        assert [seat.total_in_flight for seat in [*pool.seats, *pool.leaving]] == [0] * len(pool.seats + pool.leaving)
        assert pool.waiting == 0
        await manager.close()

    asyncio.run(scenario())


async def apply(pool: ServerPool, asking: list[asyncio.Task[Lease]], operation: str, number: int) -> None:
    seat = pool.seats[number % len(pool.seats)]
    served = [task for task in asking if task.done()]
    waiting = [task for task in asking if not task.done()]
    match operation:
        case "ask":
            asking.append(asyncio.create_task(pool.acquire(Split.TRAIN, home=seat if number < 4 else None)))
        case "release" | "fail" if served:
            task = served[number % len(served)]
            asking.remove(task)
            if operation == "fail":
                pool.failed(task.result(), "boom")
            pool.release(task.result())
        case "give_up" if waiting:
            task = waiting[number % len(waiting)]
            asking.remove(task)
            task.cancel()
        case "weight":
            pool.set_weight((number + 1) / 8)
        case "leave" if len(pool.seats) > 1:
            pool.detach(seat)
        case "join":
            pool.add(a_pool("d", num_max_requests_at_once=3)[1][0])


async def drain(pool: ServerPool, asking: list[asyncio.Task[Lease]]) -> None:
    """Everyone who still waits must be served while the others give their slots back."""
    pool.set_weight(1.0)
    async with asyncio.timeout(5):
        while asking:
            done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                asking.remove(task)
                pool.succeeded(task.result())
                pool.release(task.result())
