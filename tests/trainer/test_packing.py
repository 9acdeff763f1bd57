"""What packing promises, for any lengths."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from trainer.packing import pack, pack_for_ranks, sequence_cost

LENGTHS = st.lists(st.integers(1, 20), max_size=12)  # small ranges: boundaries come up often
CAPACITY = st.integers(8, 16)


@given(lengths=LENGTHS, capacity=CAPACITY)
def test_packing_loses_nothing_overfills_nothing_wastes_nothing(lengths: list[int], capacity: int) -> None:
    plans = pack(lengths, capacity=capacity)
    fill = [sum(lengths[i] for i in plan) for plan in plans]

    assert sorted(i for plan in plans for i in plan) == list(range(len(lengths)))
    assert all(tokens <= capacity or len(plan) == 1 for tokens, plan in zip(fill, plans, strict=True))
    assert all(a + b > capacity for a, b in combinations(fill, 2))


@given(lengths=LENGTHS, capacity=CAPACITY, ranks=st.integers(1, 4))
def test_every_rank_runs_the_same_number_of_passes(lengths: list[int], capacity: int, ranks: int) -> None:
    shares = pack_for_ranks(lengths, capacity=capacity, ranks=ranks, hidden_size=16)

    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) >= 1
    assert sorted(i for share in shares for plan in share for i in plan) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in plan) <= capacity or len(plan) == 1 for share in shares for plan in share)


@given(lengths=st.lists(st.integers(1, 8), min_size=4, max_size=12), ranks=st.integers(2, 4))
def test_no_rank_idles_while_another_could_split_its_work(lengths: list[int], ranks: int) -> None:
    shares = pack_for_ranks(lengths, capacity=16, ranks=ranks, hidden_size=16)
    sizes = [len(plan) for share in shares for plan in share]

    assert 0 not in sizes or max(sizes) == 1


def test_equal_sequences_are_balanced() -> None:
    shares = pack_for_ranks([10] * 8, capacity=20, ranks=2, hidden_size=64)

    assert [sum(len(plan) for plan in share) for share in shares] == [4, 4]


def test_attention_makes_long_sequences_dearer_than_their_length() -> None:
    assert sequence_cost(600, hidden_size=100) == 2 * 600
    assert sequence_cost(100, hidden_size=100) < 2 * 100
