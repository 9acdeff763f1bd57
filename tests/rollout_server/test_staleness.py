"""The staleness bound: no consumed sequence over it, ever, and nothing thrown away to keep it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.admission import Bound, Claim, fits, may_take, must_leave, must_wait_for
from tests.rollout_server.simulation import Simulation

TICKS = 1500


def test_admission_opens_k_plus_one_batches_at_the_start() -> None:
    bound = Bound(batch_size=4, max_staleness=2, next_step=0)

    assert fits(bound, {0: 11}, version=0, sequences=1)
    assert not fits(bound, {0: 12}, version=0, sequences=1)


def test_a_late_group_of_an_old_version_must_fit_before_newer_ones() -> None:
    bound = Bound(batch_size=4, max_staleness=1, next_step=5)

    assert fits(bound, {5: 4}, version=4, sequences=4)
    assert not fits(bound, {5: 8}, version=4, sequences=4), "the newer groups fill every batch until version 6"


def test_the_next_batch_must_take_what_later_ones_cannot() -> None:
    bound = Bound(batch_size=4, max_staleness=1, next_step=5)

    assert must_leave(bound, {4: 3, 5: 2}) == 3, "version 4 has no later batch"
    assert must_leave(bound, {5: 6}) == 2, "one later batch is open to version 5"
    assert must_leave(bound, {6: 8}) == 0


def test_groups_in_flight_are_waited_for_when_no_choice_of_batch_leaves_them_room() -> None:
    bound = Bound(batch_size=4, max_staleness=0, next_step=3)

    assert must_wait_for(bound, {3: 4}, {3: 2}) == 3, "two of version 3 are in flight and this is their last batch"
    assert must_wait_for(bound, {3: 4}, {3: 4}) is None


def test_an_environment_alone_may_take_everything_and_beside_a_waiting_one_its_share() -> None:
    mine, other = Claim(weight=3, tokens_per_sequence=1, sequences_held=5), Claim(1, 1, 0)

    assert may_take(mine, [], sequences=2, capacity=8)
    assert not may_take(mine, [other], sequences=2, capacity=8), "5 + 2 is over 3/4 of 8"
    assert may_take(mine, [other], sequences=1, capacity=8)


def test_shares_are_counted_in_tokens() -> None:
    short, long = Claim(1, 100, 2), Claim(1, 300, 2)

    assert may_take(short, [long], sequences=4, capacity=8), "three times shorter: six of eight sequences"
    assert not may_take(long, [short], sequences=1, capacity=8)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    late_policy=st.sampled_from(["wait", "requeue", "drop"]),
    max_staleness=st.integers(0, 3),
    group_size=st.sampled_from([1, 2, 4]),
    straggler_share=st.floats(0, 0.3),
    straggler_factor=st.floats(10, 100),
    failure_share=st.floats(0, 0.3),
    crash_share=st.sampled_from([0.0, 0.01]),
    publish_lag=st.integers(0, 2),
)
def test_no_sequence_is_ever_trained_over_the_bound_and_none_twice(seed: int, **conditions: Any) -> None:
    run = Simulation(random.Random(seed), **conditions)

    for _ in range(TICKS):
        run.tick()

    assert run.excess == []
    assert len(run.trained) > 1, "the run stalled"
    assert len(run.trained_ids) == len(set(run.trained_ids))
    assert set(run.trained_ids) | run.queued_ids == set(run.generated), "an accepted group is lost"
    if conditions["late_policy"] == "wait":
        assert run.state.counters["retired:stale"] == 0, "admission let a group go stale in the queue"


@pytest.mark.parametrize("factor", [10, 100])
def test_waiting_trains_the_lengths_that_were_generated(factor: float) -> None:
    run = Simulation(random.Random(1), straggler_share=0.05, straggler_factor=factor, workers=12, batch_size=8)

    for _ in range(20_000):
        run.tick()

    assert run.lengths == run.generated, "a finished group was refused"
    assert set(run.lengths) == set(run.trained_ids) | run.queued_ids
    assert len(run.queued_ids) <= 8 * 3, "what is not trained yet is at most the open batches"
    assert max(run.lengths[group_id] for group_id in run.trained_ids) == max(run.lengths.values())


def test_dropping_keeps_the_bound_at_the_price_of_the_long_ones() -> None:
    run = Simulation(random.Random(1), straggler_share=0.05, straggler_factor=100, late_policy="drop", workers=12)

    for _ in range(5_000):
        run.tick()

    assert run.excess == []
    assert run.state.counters["ticket:drop"] > 0
    refused = len(run.lengths) - len(run.generated)
    assert refused > 0
    assert run.state.counters["retired:late"] + run.state.counters["retired:stale"] == refused, "each is counted once"
    assert len(run.trained) > 1000, "nobody waits for a straggler"


def test_an_item_to_requeue_is_told_apart_from_one_to_drop() -> None:
    run = Simulation(random.Random(1), straggler_share=0.1, straggler_factor=100, late_policy="requeue", workers=12)

    for _ in range(3_000):
        run.tick()

    assert run.state.counters["retired:requeue"] > 0
    assert run.state.counters["retired:late"] + run.state.counters["retired:stale"] == 0
