"""Which server a request goes to, what happens when it fails, and who waits for whom."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from atroposlib.envs.server_handling.pool import circuit_breaker, retry_budget, routing, server_recovery
from atroposlib.envs.server_handling.pool.seat import Split
from atroposlib.envs.server_handling.pool.waiting_line import Line, Waiter
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.errors import ModelServerError, RolloutError
from tests.envs.fake_servers import FAILED, TextServer, a_pool, until

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def counts(servers: Any) -> list[int]:
    return [len(server.calls) for server in servers]


async def sample(manager: ServerManager, **kwargs: Any) -> Any:
    return await manager.sample_tokens(input_ids=[5, 6], **kwargs)


async def start(manager: ServerManager, n: int, **kwargs: Any) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(manager.chat_completion(**CHAT, **kwargs)) for _ in range(n)]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


async def test_a_slow_server_gets_no_more_than_it_can_take_and_holds_up_nobody_else() -> None:
    manager, (slow, fast) = a_pool("ab", num_max_requests_at_once=2)
    slow.open.clear()

    tasks = await start(manager, 20)
    await until(lambda: sum(task.done() for task in tasks) == 18)

    assert (len(slow.calls), len(fast.calls)) == (2, 18)
    slow.open.set()
    await asyncio.gather(*tasks)
    await manager.close()


async def test_a_server_with_more_slots_gets_more() -> None:
    manager, servers = a_pool("ab", num_max_requests_at_once=30)
    servers[0].config.num_max_requests_at_once = 10
    for server in servers:
        server.open.clear()

    tasks = await start(manager, 20)

    assert counts(servers) == [5, 15]
    for server in servers:
        server.open.set()
    await asyncio.gather(*tasks)
    await manager.close()


async def test_evaluation_keeps_its_split_has_its_own_slots_and_is_spread() -> None:
    manager, servers = a_pool("ab", num_max_requests_at_once=1, num_requests_for_eval=2)
    for server in servers:
        server.open.clear()

    tasks = await start(manager, 2) + await start(manager, 5, split="eval")

    assert counts(servers) == [3, 3], "one for training and two for evaluation each; the seventh waits"
    assert [server.load.eval_in_flight for server in servers] == [2, 2]
    assert manager.in_flight == 7
    for server in servers:
        server.open.set()
    await asyncio.gather(*tasks)
    assert manager.in_flight == 0
    await manager.close()


async def test_slots_shrink_with_the_weight_and_waiting_requests_start_when_it_grows() -> None:
    manager, [server] = a_pool("a", num_max_requests_at_once=8)
    server.open.clear()
    await manager.update_weight(0.5)

    tasks = await start(manager, 8)
    assert len(server.calls) == 4
    await manager.update_weight(0.01)
    await manager.update_weight(1.0)
    await until(lambda: len(server.calls) == 8)

    server.open.set()
    await asyncio.gather(*tasks)
    await manager.close()


async def test_a_failed_request_goes_to_another_server_at_once() -> None:
    manager, (one, two) = a_pool("ab")
    one.is_down = True

    answer = await manager.chat_completion(**CHAT)

    assert answer.choices[0].message.content == "http://b/v1"
    assert (len(one.calls), len(two.calls)) == (1, 1)
    await manager.close()


async def test_three_failures_and_a_server_is_left_alone_until_its_health_check_passes() -> None:
    manager, (one, _) = a_pool("ab")
    one.is_down = True
    await asyncio.gather(*(sample(manager) for _ in range(40)))
    tried = len(one.calls)
    await asyncio.gather(*(sample(manager) for _ in range(10)))

    assert len(one.calls) == tried
    assert not one.server_healthy
    await until(lambda: one.checks > 0)
    assert len(one.calls) == tried, "a check costs no completion"
    one.is_down = False
    await until(lambda: one.server_healthy)
    await sample(manager)
    await sample(manager)
    assert len(one.calls) > tried
    await manager.close()


async def test_a_healthy_pool_is_never_asked_for_its_health() -> None:
    manager, servers = a_pool("ab")
    await asyncio.gather(*(sample(manager) for _ in range(10)))

    assert [server.checks for server in servers] == [0, 0]
    await manager.close()


async def test_the_error_lists_what_each_server_said_and_keeps_the_last_cause() -> None:
    manager, servers = a_pool("ab", timeout=1)
    for server in servers:
        server.is_down = True

    with pytest.raises(ModelServerError, match=r"chat_completion: gave up after .* http://") as caught:
        await manager.chat_completion(**CHAT)

    assert all(f"http://{name}/v1: {FAILED}" in str(caught.value) for name in "ab")
    assert isinstance(caught.value.__cause__, ModelServerError)
    await manager.close()


async def test_a_request_that_kills_whatever_serves_it_is_given_up_after_eight_tries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(circuit_breaker, "FIRST_PAUSE_S", 0.0)
    manager, [server] = a_pool("a")
    server.fail_next = [ModelServerError("poison")] * 100

    with pytest.raises(ModelServerError, match="8 tries"):
        await manager.chat_completion(**CHAT)

    assert len(server.calls) == 8
    await manager.close()


async def test_a_request_that_a_server_refuses_is_not_tried_again() -> None:
    manager, servers = a_pool("ab")
    servers[0].fail_next = [RolloutError("prompt too long")] * 5

    for _ in range(5):
        with pytest.raises(RolloutError, match="too long"):
            await manager.chat_completion(**CHAT)

    assert counts(servers) == [5, 0]
    assert servers[0].server_healthy
    await manager.close()


async def test_a_request_that_is_given_up_leaves_its_slot_to_the_next() -> None:
    manager, [server] = a_pool("a", num_max_requests_at_once=1)
    server.open.clear()
    [running, waiting, last] = await start(manager, 3)

    waiting.cancel()
    running.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    server.open.set()
    await last

    assert len(server.calls) == 2
    assert manager.in_flight == 0
    await manager.close()


async def test_the_deadline_holds_at_the_server() -> None:
    manager, [server] = a_pool("a")
    server.config.timeout = 0.05
    server.open.clear()

    with pytest.raises(ModelServerError, match="no answer in time"):
        await manager.chat_completion(**CHAT)

    assert manager.in_flight == 0
    await manager.close()


async def test_the_deadline_holds_while_waiting_and_says_that_the_servers_were_full() -> None:
    manager, [server] = a_pool("a", num_max_requests_at_once=1)
    server.open.clear()
    [running] = await start(manager, 1)
    server.config.timeout = 0.02

    with pytest.raises(ModelServerError, match=r"0 tries .*http://a/v1: well, 1 of 1 slots in use"):
        await manager.chat_completion(**CHAT)

    server.open.set()
    await running
    await manager.close()


async def test_time_spent_in_the_line_is_not_held_against_the_server() -> None:
    manager, [server] = a_pool("a", num_max_requests_at_once=1)
    server.config.timeout = 0.06
    for _ in range(3):
        lease = await manager._pool.acquire(Split.TRAIN)
        waiting = asyncio.create_task(manager.chat_completion(**CHAT))
        await asyncio.sleep(0.04)
        server.open.clear()
        manager._pool.release(lease)
        with pytest.raises(ModelServerError):
            await waiting

    assert server.server_healthy
    await manager.close()


async def test_a_slot_that_comes_in_the_moment_of_giving_up_is_not_lost() -> None:
    manager, _ = a_pool("a", num_max_requests_at_once=1)
    pool = manager._pool
    lease = await pool.acquire(Split.TRAIN)
    waiting = asyncio.create_task(pool.acquire(Split.TRAIN))
    await asyncio.sleep(0)

    pool.release(lease)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    assert waiting.cancelled()
    assert pool.seats[0].total_in_flight == 0
    await manager.close()


async def test_retries_beyond_the_budget_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_budget, "RETRIES_PER_S", 0.01)
    manager, [server] = a_pool("a", num_max_requests_at_once=1)
    server.fail_next = [ModelServerError("boom"), ModelServerError("boom")]

    with pytest.raises(ModelServerError, match="2 tries"):
        await manager.chat_completion(**CHAT)
    await manager.close()


@pytest.mark.parametrize("is_session_first", [True, False])
async def test_sessions_and_other_requests_stand_in_one_line(is_session_first: bool) -> None:
    manager, [server] = a_pool("a", num_max_requests_at_once=1)
    server.open.clear()
    running = await start(manager, 1)
    waiting = []
    for is_session in (is_session_first, not is_session_first):
        request = sample(manager, prefer=server) if is_session else manager.completion(prompt="x")
        waiting.append(asyncio.create_task(request))
        await asyncio.sleep(0)
    server.open.set()
    await asyncio.gather(*running, *waiting)

    kinds = [kind for kind, _ in server.calls]
    assert kinds == ["chat", "tokens", "text"] if is_session_first else kinds == ["chat", "text", "tokens"]
    await manager.close()


async def test_who_waits_for_a_server_that_fails_is_served_by_another_at_once() -> None:
    manager, _ = a_pool("ab", num_max_requests_at_once=10)
    pool = manager._pool
    home, other = pool.seats
    leases = [await pool.acquire(Split.TRAIN, home=home) for _ in range(10)]
    for _ in range(9):
        await pool.acquire(Split.TRAIN, home=other)
    waiting = asyncio.create_task(pool.acquire(Split.TRAIN, home=home))
    await asyncio.sleep(0)
    assert not waiting.done(), "the other has one slot, but no room to spare"

    for lease in leases[:3]:
        pool.failed(lease, "boom")

    async with asyncio.timeout(5):
        assert (await waiting).seat is other
    await manager.close()


async def test_a_server_on_probation_gets_few_requests_and_then_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_breaker, "PROBATION_S", 1.0)
    monkeypatch.setattr(server_recovery, "PROBATION_S", 1.0)
    manager, [server] = a_pool("a", num_max_requests_at_once=16)
    server.open.clear()
    seat = manager._pool.seats[0]
    seat.breaker.await_check()
    manager._pool._bring_back(seat)

    tasks = await start(manager, 16)
    await until(lambda: server.now)
    for _ in range(20):
        await asyncio.sleep(0)
    assert server.now == 2
    await until(lambda: server.now == 16)

    server.open.set()
    await asyncio.gather(*tasks)
    await manager.close()


def test_those_who_change_lines_keep_their_place() -> None:
    loop = asyncio.new_event_loop()
    waiters = [Waiter(order, False, loop.create_future()) for order in range(5)]
    one, two = Line(), Line()
    for waiter in waiters:
        (one if waiter.order % 2 else two).join(waiter)
    waiters[2].seat.cancel()

    two.merge(one.take_all())

    assert one.first() is None
    assert [waiter.order for waiter in two.take_all()] == [0, 1, 3, 4]
    loop.close()


async def test_wait_for_sem_waits_for_a_slot_and_takes_none() -> None:
    manager, [server] = a_pool("a", num_max_requests_at_once=1)
    server.open.clear()
    [running] = await start(manager, 1)
    waiting = asyncio.create_task(manager.wait_for_sem(is_training=True))
    await manager.wait_for_sem(is_training=False)
    assert not waiting.done()

    server.open.set()
    await running
    await waiting
    assert manager.in_flight == 0
    await manager.close()


async def test_a_dedicated_server_takes_no_slot_and_the_next_one_is_another() -> None:
    manager, servers = a_pool("ab", num_max_requests_at_once=1)
    async with (
        manager.dedicated_server() as one,
        manager.dedicated_server() as two,
        manager.dedicated_server() as three,
    ):
        assert {one, two} == set(servers)
        async with asyncio.timeout(5):
            for server in (one, two, three):
                await server.chat_completion(**CHAT)
    await manager.close()


async def test_many_choices_are_asked_in_parts_numbered_through_and_counted_together() -> None:
    manager, servers = a_pool("ab")

    answer = await manager.chat_completion(**CHAT, n=20)
    text = await manager.completion(prompt="x", n=9)

    assert [choice.index for choice in answer.choices] == list(range(20))
    assert sorted(call["n"] for server in servers for kind, call in server.calls if kind == "chat") == [4, 8, 8]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    assert [choice.index for choice in text.choices] == list(range(9))
    await manager.close()


async def test_one_failed_part_ends_the_others_and_is_raised_as_it_is() -> None:
    manager, (one, two) = a_pool("ab")
    one.fail_next = [RolloutError("refused")]
    two.open.clear()

    with pytest.raises(RolloutError, match="refused"):
        await manager.chat_completion(**CHAT, n=16)

    assert (one.now, two.now, manager.in_flight) == (0, 0, 0)
    await manager.close()


async def test_token_requests_go_only_where_token_ids_come_from() -> None:
    manager, servers = a_pool("ab")
    text = TextServer(servers[0].config)
    manager.servers[0] = text

    for _ in range(4):
        await sample(manager)
    await manager.get_logprobs(input_ids=[1])
    lists = await manager.tokens_and_logprobs_completion(input_ids=[1])

    assert (len(text.calls), len(servers[1].calls)) == (0, 6)
    assert lists == ([1], [[7, 8]], [[-0.5, -0.5]], ["stop"])
    await manager.close()


async def test_a_preferred_server_is_waited_for_while_the_others_are_full_too() -> None:
    manager, (home, other) = a_pool("ab", num_max_requests_at_once=1)
    home.open.clear()
    other.open.clear()
    busy = await start(manager, 2)
    preferring = asyncio.create_task(sample(manager, prefer=home))
    await asyncio.sleep(0)

    home.open.set()
    await preferring

    assert [kind for kind, _ in home.calls] == ["chat", "tokens"]
    other.open.set()
    await asyncio.gather(*busy)
    await manager.close()


async def test_a_preferred_server_that_is_full_is_left_for_an_idle_one() -> None:
    manager, (home, other) = a_pool("ab", num_max_requests_at_once=2)
    home.open.clear()
    busy = [asyncio.create_task(sample(manager, prefer=home)) for _ in range(2)]
    await until(lambda: len(home.calls) == 2)

    await sample(manager, prefer=home)

    assert len(other.calls) == 1
    home.open.set()
    await asyncio.gather(*busy)
    await manager.close()


async def test_who_waits_for_a_server_is_served_elsewhere_when_that_server_fails_or_others_become_idle() -> None:
    manager, (home, other) = a_pool("ab", num_max_requests_at_once=3)
    home.open.clear()
    other.open.clear()
    busy = await start(manager, 6)
    waiting = [asyncio.create_task(sample(manager, prefer=home)) for _ in range(2)]
    await until(lambda: manager._pool.waiting == 2)

    other.open.set()
    await asyncio.gather(*waiting)

    assert [kind for kind, _ in other.calls].count("tokens") == 2
    home.open.set()
    await asyncio.gather(*busy)
    await manager.close()


async def test_a_manager_made_without_its_constructor_answers() -> None:
    _, servers = a_pool("a")
    manager = object.__new__(ServerManager)
    manager.servers = list(servers)
    manager.max_n_completions = 8
    manager.reasoning_config = None

    assert len((await manager.chat_completion(**CHAT, n=9)).choices) == 9
    assert (await manager.completion(prompt="x")).choices[0].text == "http://a/v1"
    await manager.close()


async def test_a_thousand_waiting_requests_are_served_in_order_of_arrival() -> None:
    manager, [server] = a_pool("a", num_max_requests_at_once=1)

    await asyncio.gather(*(manager.completion(prompt=str(i)) for i in range(1000)))

    assert [call["prompt"] for _, call in server.calls] == [str(i) for i in range(1000)]
    assert server.peak == 1
    await manager.close()


async def test_the_clock_runs_while_a_request_is_at_a_server() -> None:
    manager, [server] = a_pool("a")
    server.open.clear()
    [task] = await start(manager, 1)
    since = time.monotonic()
    await asyncio.sleep(0.02)
    held_s = time.monotonic() - since
    server.open.set()
    await task

    assert manager.busy.seconds >= held_s > 0
    await manager.close()


async def test_a_callers_own_short_limit_is_kept_and_does_not_count_against_the_server() -> None:
    manager, [server] = a_pool("a")
    server.open.clear()

    for _ in range(circuit_breaker.FAILURES_TO_OPEN):
        with pytest.raises(ModelServerError, match=r"the request's own timeout is 0\.02 s"):
            await manager.chat_completion(**CHAT, timeout=0.02)

    [seat] = manager._pool.seats
    assert seat.breaker.circuit is circuit_breaker.Circuit.CLOSED
    assert seat.breaker.last_error == ""
    server.open.set()
    await manager.chat_completion(**CHAT, timeout=3600)
    await manager.close()


async def test_a_client_that_measures_the_callers_limit_itself_does_not_count_either() -> None:
    manager, [server] = a_pool("a")
    failure = ModelServerError("no answer (limit 0.5 s)")
    failure.__cause__ = TimeoutError()
    server.fail_next = [failure]

    await manager.chat_completion(**CHAT, timeout=0.5)

    assert manager._pool.seats[0].breaker.last_error == ""
    await manager.close()
