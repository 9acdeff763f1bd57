from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.batching import QueuedGroup, choose_batch


def queue_of(sizes: list[int]) -> list[QueuedGroup]:
    return [QueuedGroup(key, size) for key, size in enumerate(sizes)]


def test_groups_of_one_size_leave_first_in_first_out() -> None:
    batch = choose_batch(queue_of([2, 2, 2, 2]), 4)

    assert batch is not None
    assert [group.key for group in batch] == [0, 1]


def test_one_odd_group_does_not_block_the_others() -> None:
    batch = choose_batch(queue_of([3, 2, 2]), 4)

    assert batch is not None
    assert [group.n_sequences for group in batch] == [2, 2]


@given(sizes=st.lists(st.integers(1, 6), max_size=8), batch_size=st.integers(1, 12))
def test_a_batch_is_found_exactly_when_some_groups_sum_up(sizes: list[int], batch_size: int) -> None:
    batch = choose_batch(queue_of(sizes), batch_size)
    possible = any(sum(pick) == batch_size for count in range(1, len(sizes) + 1) for pick in combinations(sizes, count))

    assert (batch is not None) == possible
    if batch is not None:
        assert sum(group.n_sequences for group in batch) == batch_size
        assert len({group.key for group in batch}) == len(batch)
