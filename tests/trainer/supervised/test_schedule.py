"""Which examples make which step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.supervised.schedule import Schedule


@given(examples=st.integers(1, 20), batch_size=st.integers(1, 8), seed=st.integers(0, 3))
def test_an_epoch_is_every_example_once(examples: int, batch_size: int, seed: int) -> None:
    schedule = Schedule(examples, batch_size=batch_size, seed=seed)

    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        batches = [schedule.batch(step) for step in steps]
        assert sorted(i for batch in batches for i in batch) == list(range(examples))
        assert all(0 < len(batch) <= batch_size for batch in batches)


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    one, other = (Schedule(50, batch_size=4, seed=7) for _ in range(2))
    expected = [one.batch(step) for step in range(40)]

    assert [other.batch(step) for step in reversed(range(40))] == expected[::-1]


def test_epochs_have_different_orders() -> None:
    schedule = Schedule(50, batch_size=50, seed=0)

    assert schedule.batch(0) != schedule.batch(1)


def test_steps_follow_from_epochs_where_max_steps_says_nothing() -> None:
    schedule = Schedule(10, batch_size=4, seed=0)

    assert schedule.total_steps(epochs=2.5, max_steps=-1) == 8
    assert schedule.total_steps(epochs=2.5, max_steps=5) == 5
