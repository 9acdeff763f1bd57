"""The staleness bound, simulated: random durations, stragglers, failures, publications that lag."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.admission import Bound, fits
from rollout_server.stores.index import QueueEntry, RunIndex, TicketEntry


def test_admission_opens_k_plus_one_batches_at_the_start() -> None:
    bound = Bound(batch_size=4, max_staleness=2, next_step=0)

    assert fits(bound, {0: 11}, version=0, sequences=1)
    assert not fits(bound, {0: 12}, version=0, sequences=1)


def test_a_late_group_of_an_old_version_must_fit_before_newer_ones() -> None:
    bound = Bound(batch_size=4, max_staleness=1, next_step=5)

    assert fits(bound, {5: 4}, version=4, sequences=4)
    assert not fits(bound, {5: 8}, version=4, sequences=4), "the newer groups fill every batch until version 6"


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    max_staleness=st.integers(0, 3),
    group_size=st.sampled_from([1, 2, 4]),
    straggler_share=st.floats(0, 0.3),
    failure_share=st.floats(0, 0.3),
    publish_lag=st.integers(0, 2),
)
def test_no_sequence_is_ever_handed_out_over_the_bound(
    seed: int, max_staleness: int, group_size: int, straggler_share: float, failure_share: float, publish_lag: int
) -> None:
    rng = random.Random(seed)
    batch_size, index = 4, RunIndex()
    next_step, published, key = 0, 0, 0
    arrivals: dict[str, tuple[float, bool]] = {}
    generated: list[int] = []
    trained: list[int] = []
    for now in range(2000):
        bound = Bound(batch_size, max_staleness, next_step)
        while len(arrivals) < 6 and index.may_start(bound, version=published, sequences=group_size):
            duration = rng.uniform(1, 4) * (30 if rng.random() < straggler_share else 1)
            key += 1
            index.add_ticket(str(key), TicketEntry(0, group_size, published, deadline=1e9))
            arrivals[str(key)] = (now + duration, rng.random() < failure_share)
        for ticket, (due_at, fails) in list(arrivals.items()):
            if due_at <= now:
                del arrivals[ticket]
                entry = index.drop_ticket(ticket)
                assert entry is not None
                if not fails:
                    generated.append(int(ticket))
                    version = entry.policy_version
                    index.enqueue(QueueEntry(int(ticket), group_size, 1, version, version))
        assert index.stale(bound) == [], "admission let a group go stale in the queue"
        batch = index.next_batch(bound)
        if not isinstance(batch, str):
            assert sum(entry.n_sequences for entry in batch) == batch_size
            for entry in batch:
                assert entry.oldest_version is not None
                assert next_step - entry.oldest_version <= max_staleness
                trained.append(entry.key)
                index.dequeue(entry)
            next_step += 1
        published = max(published, next_step - rng.randint(0, publish_lag))
    assert next_step > 5, "the run stalled"
    assert len(trained) == len(set(trained))
    assert set(trained) | {entry.key for entry in index.in_order()} == set(generated), "finished work was thrown away"
