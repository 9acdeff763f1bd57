"""When an evaluation is due, and how much of training goes on beside it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.envs.eval_handling import EvalHandlingEnum, last_crossed, training_limit
from atroposlib.envs.serving.run_status import derived_batch_size, offpolicy_limit, status_dict
from atroposlib.wire.models import EnvStatus, Status


@given(jumps=st.lists(st.integers(1, 7), max_size=30), every=st.integers(1, 6))
def test_no_multiple_is_passed_without_notice_and_none_is_noticed_twice(jumps: list[int], every: int) -> None:
    step, noticed = 0, []
    for jump in jumps:
        if (crossed := last_crossed(step, step + jump, every)) is not None:
            noticed.append(crossed)
            assert step < crossed <= step + jump
        else:
            assert all(middle % every for middle in range(step + 1, step + jump + 1))
        step += jump

    assert noticed == sorted(set(noticed))
    assert all(crossed % every == 0 for crossed in noticed)


@pytest.mark.parametrize(("before", "after", "every"), [(0, 5, 0), (0, 5, -1), (4, 4, 2), (4, 3, 2), (9, 1, 2)])
def test_nothing_is_due_where_nothing_was_crossed(before: int, after: int, every: int) -> None:
    assert last_crossed(before, after, every) is None


@pytest.mark.parametrize(
    ("handling", "is_evaluating", "limit"),
    [("STOP_TRAIN", True, 0), ("LIMIT_TRAIN", True, 3), ("NONE", True, 7), ("STOP_TRAIN", False, 7)],
)
def test_how_many_groups_may_be_in_flight(handling: str, is_evaluating: bool, limit: int) -> None:
    made = training_limit(EvalHandlingEnum(handling), max_in_flight=7, ratio=0.5, is_evaluating=is_evaluating)

    assert made == limit


def an_env(env_id: int, *, queued: int, minimum: float | None, weight: float = 1.0, length: int = 100) -> EnvStatus:
    return EnvStatus(
        env_id=env_id, name=f"e{env_id}", group_size=4, max_token_len=length, weight=weight,
        min_batch_allocation=minimum, is_connected=True, last_seen_s=0.0, tickets=0, queued_groups=0,
        queued_sequences=queued, groups_accepted=0, trained_tokens=0,
    )  # fmt: skip


def test_the_six_figures() -> None:
    status = Status(
        step=3, queued_sequences=24, largest_queued_group=8,
        envs=[an_env(0, queued=8, minimum=0.25, length=300), an_env(1, queued=16, minimum=None)],
    )  # fmt: skip

    assert status_dict(status, env_id=0, group_size=4) == {
        "current_step": 3,
        "queue_size": 6,
        "unallocated_fraction": 0.75,
        "self_queue_size": 2,
        "max_group_size": 8,
        "env_weight": 0.75,
    }


def test_an_environment_without_weight_divides_by_nothing() -> None:
    status = Status(envs=[an_env(0, queued=0, minimum=None, weight=0.0)])

    assert status_dict(status, env_id=0, group_size=4)["env_weight"] == 0.01


@pytest.mark.parametrize(
    ("batch", "figures", "minimum", "expected"),
    [(-1, {"unallocated_fraction": 0.5}, 0.5, -1), (64, None, 0.5, 64), (64, {"unallocated_fraction": 0.5}, 0.25, 48)],
)
def test_derived_batch_size(batch: int, figures: dict[str, int | float] | None, minimum: float, expected: int) -> None:
    assert derived_batch_size(batch, figures, minimum) == expected


@pytest.mark.parametrize(("max_batches", "queued", "limit"), [(3, 0, 24), (3, 20, 4), (3, 99, 0), (0, 0, None)])
def test_the_off_policy_bound_counts_what_is_queued(max_batches: int, queued: int, limit: int | None) -> None:
    assert offpolicy_limit(max_batches, 64, 8, {"queue_size": queued}) == limit
