from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.batching import EnvShare, QueuedGroup, Wait, plan_batch, shard_groups


def a_queued(key: int, n: int = 2, *, env: int = 0, version: int | None = 0, tokens: int = 10) -> QueuedGroup:
    return QueuedGroup(key, env, n, tokens, version, version or 0)


def queue_of(sizes: list[int]) -> list[QueuedGroup]:
    return [a_queued(key, size) for key, size in enumerate(sizes)]


def keys(plan: list[QueuedGroup] | Wait) -> list[int]:
    assert isinstance(plan, list), plan
    return [group.key for group in plan]


def test_groups_of_one_size_leave_first_in_first_out() -> None:
    assert keys(plan_batch(queue_of([2, 2, 2, 2]), 4)) == [0, 1]


def test_one_odd_group_does_not_block_the_others() -> None:
    assert keys(plan_batch(queue_of([3, 2, 2]), 4)) == [1, 2]


def test_sizes_that_cannot_sum_up_are_named() -> None:
    plan = plan_batch(queue_of([3, 3, 3]), 4)

    assert isinstance(plan, Wait)
    assert "batch_size=4" in plan.waiting_for
    assert "[3]" in plan.waiting_for


def test_within_a_version_the_environment_with_fewer_trained_tokens_goes_first() -> None:
    queue = [a_queued(key, env=0) for key in range(4)] + [a_queued(key, env=1) for key in range(4, 8)]
    shares = {0: EnvShare(trained_tokens=100), 1: EnvShare(trained_tokens=0)}

    assert keys(plan_batch(queue, 6, shares=shares)) == [4, 5, 6]


def test_weights_are_shares_of_the_trained_tokens() -> None:
    queue = [a_queued(key, env=key % 2) for key in range(40)]
    shares = {0: EnvShare(weight=3.0), 1: EnvShare(weight=1.0)}

    batch = keys(plan_batch(queue, 32, shares=shares))

    assert sum(key % 2 == 0 for key in batch) == 12


def test_long_groups_count_for_more_than_short_ones() -> None:
    queue = [a_queued(key, env=key % 2, tokens=30 if key % 2 else 10) for key in range(32)]

    batch = keys(plan_batch(queue, 16, shares={0: EnvShare(), 1: EnvShare()}))

    assert sum(key % 2 == 0 for key in batch) == 6, "six short groups of 10 tokens for two long ones of 30"


def test_an_older_version_goes_before_a_fairer_share() -> None:
    queue = [a_queued(0, env=0, version=1), a_queued(1, env=0, version=1), a_queued(2, env=1, version=2)]

    assert keys(plan_batch(queue, 4, shares={0: EnvShare(trained_tokens=10**6), 1: EnvShare()})) == [0, 1]


def test_a_minimum_is_served_before_older_groups_of_others() -> None:
    queue = [a_queued(key, env=0, version=0) for key in range(8)] + [a_queued(8, env=1, version=3)]

    assert 8 in keys(plan_batch(queue, 8, shares={1: EnvShare(minimum=0.25)}))


def test_a_live_environment_with_a_minimum_is_waited_for_and_a_dead_one_is_not() -> None:
    queue = queue_of([2, 2, 2, 2])

    waiting = plan_batch(queue, 4, shares={1: EnvShare(minimum=0.5)})

    assert isinstance(waiting, Wait)
    assert waiting.is_for_minimum
    assert keys(plan_batch(queue, 4, shares={1: EnvShare(minimum=0.5, is_live=False)})) == [0, 1]


def test_minimums_that_promise_more_than_a_batch_are_scaled() -> None:
    queue = [a_queued(key, 1, env=key % 2) for key in range(16)]

    batch = keys(plan_batch(queue, 8, shares={0: EnvShare(minimum=1.0), 1: EnvShare(minimum=1.0)}))

    assert sum(key % 2 for key in batch) == 4


def test_what_would_go_stale_goes_before_a_minimum() -> None:
    queue = [a_queued(0, env=0, version=0), a_queued(1, env=0, version=0), a_queued(2, env=1, version=3)]

    assert keys(plan_batch(queue, 4, must_leave=4, shares={1: EnvShare(minimum=0.5)})) == [0, 1]


@given(
    sizes=st.lists(st.integers(1, 6), max_size=8),
    envs=st.lists(st.integers(0, 2), min_size=8, max_size=8),
    batch_size=st.integers(1, 12),
    must_leave=st.integers(0, 6),
)
def test_a_batch_is_found_exactly_when_some_groups_sum_up(
    sizes: list[int], envs: list[int], batch_size: int, must_leave: int
) -> None:
    queue = [a_queued(key, size, env=envs[key]) for key, size in enumerate(sizes)]
    shares = {1: EnvShare(weight=2.0), 2: EnvShare(minimum=0.3, is_live=False)}

    batch = plan_batch(queue, batch_size, must_leave=must_leave, shares=shares)

    possible = any(sum(pick) == batch_size for count in range(1, len(sizes) + 1) for pick in combinations(sizes, count))
    assert isinstance(batch, list) == possible
    if isinstance(batch, list):
        assert sum(group.n_sequences for group in batch) == batch_size
        assert keys(batch) == sorted(set(keys(batch))), "in queue order, each once"


@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=40), n_shards=st.integers(1, 8))
def test_shards_cover_a_batch_exactly_and_balance(costs: list[int], n_shards: int) -> None:
    parts = shard_groups(costs, n_shards)
    loads = [sum(costs[index] for index in part) for part in parts]

    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    assert max(loads) <= sum(costs) / n_shards + max(costs)
