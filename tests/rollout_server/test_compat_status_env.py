"""The figures of /status-env, worked out by hand from the rules of the old server."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from atroposlib.wire.models import EnvStatus
from rollout_server.compat.status_env import EnvFigures, QueueFigures, env_figures, env_status

ENV = EnvFigures(group_size=4, max_token_len=1000, weight=1.0, minimum=None, queued_sequences=0, is_present=True)
QUEUE = QueueFigures(step=7, batch_size=32, queued_groups=0, queued_sequences=0, largest_group=0)


def an_env_status(
    env_id: int = 0, *, group_size: int = 4, last_seen_s: float = 1.0, is_connected: bool = True
) -> EnvStatus:
    return EnvStatus(
        env_id=env_id, name=f"env_{env_id}", group_size=group_size, max_token_len=1000, weight=1.0, min_batch_allocation=None,
        is_connected=is_connected, last_seen_s=last_seen_s, tickets=0, queued_groups=0, queued_sequences=0, groups_accepted=0,
        trained_tokens=0,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    envs: dict[int, EnvFigures]
    queue: QueueFigures
    expected: dict[str, float]
    env_id: int = 0


CASES = {
    "alone with an empty queue": Case(
        {0: ENV}, QUEUE, {"queue_size": 0, "self_queue_size": 0, "max_group_size": 1, "env_weight": 1.0,
         "unallocated_fraction": 1.0, "current_step": 7},
    ),
    "own groups count in groups of its size": Case(
        {0: replace(ENV, queued_sequences=14)},
        replace(QUEUE, queued_groups=4, queued_sequences=14, largest_group=4),
        {"queue_size": 3, "self_queue_size": 3, "max_group_size": 4},  # 14 // 4
    ),
    "others are rounded up to the largest group": Case(
        {0: replace(ENV, queued_sequences=8), 1: replace(ENV, queued_sequences=9)},
        replace(QUEUE, queued_sequences=17, largest_group=8),
        {"queue_size": 6, "self_queue_size": 2, "max_group_size": 8},  # (8 + ceil(9 / 8) * 8) // 4
    ),
    "others count only beyond their minimum": Case(
        {0: replace(ENV, queued_sequences=8), 1: replace(ENV, queued_sequences=24, minimum=0.5)},
        replace(QUEUE, queued_sequences=32, largest_group=8),
        {"queue_size": 4, "unallocated_fraction": 0.5},  # (8 + max(0, 24 - int(32 * 0.5))) // 4
    ),
    "a minimum that is not used up takes nothing away": Case(
        {0: replace(ENV, queued_sequences=8), 1: replace(ENV, queued_sequences=8, minimum=0.5)},
        replace(QUEUE, queued_sequences=16, largest_group=8),
        {"queue_size": 2},  # (8 + max(0, 8 - 16)) // 4
    ),
    "the own minimum is not taken off": Case(
        {0: replace(ENV, queued_sequences=16, minimum=0.25)},
        replace(QUEUE, queued_sequences=16, largest_group=4),
        {"queue_size": 4, "unallocated_fraction": 0.75},
    ),
    "groups of nobody who is registered are one environment more": Case(
        {0: replace(ENV, queued_sequences=8), 1: replace(ENV, queued_sequences=0)},
        replace(QUEUE, queued_sequences=13, largest_group=4),
        {"queue_size": 4},  # (8 + ceil(5 / 4) * 4) // 4
    ),
    "single sequences of others count as none": Case(
        {0: replace(ENV, group_size=1, queued_sequences=2), 1: replace(ENV, queued_sequences=5)},
        replace(QUEUE, queued_sequences=7, largest_group=1),
        {"queue_size": 2, "max_group_size": 1},
    ),
    "weight goes by length and weight": Case(
        {0: replace(ENV, max_token_len=1000, weight=3.0), 1: replace(ENV, max_token_len=2000, weight=0.5)},
        QUEUE,
        {"env_weight": 0.75},  # 3000 / (3000 + 1000)
    ),
    "no weight is answered below one in a hundred": Case(
        {0: replace(ENV, weight=0.02), 1: replace(ENV, weight=100.0)}, QUEUE, {"env_weight": 0.01}
    ),
    "alone with a weight of nothing": Case({0: replace(ENV, weight=0.01)}, QUEUE, {"env_weight": 0.01}),
    "a weight of nothing takes nothing from others": Case(
        {0: ENV, 1: replace(ENV, weight=0.01)}, QUEUE, {"env_weight": 1.0}
    ),
    "the absent weigh nothing and hold no minimum": Case(
        {0: ENV, 1: replace(ENV, minimum=0.5, is_present=False)}, QUEUE, {"env_weight": 1.0, "unallocated_fraction": 1.0}
    ),
    "alone and absent": Case({0: replace(ENV, is_present=False)}, QUEUE, {"env_weight": 0.01}),
    "minimums beyond everything leave nothing": Case(
        {0: replace(ENV, minimum=0.7), 1: replace(ENV, minimum=0.7)}, QUEUE, {"unallocated_fraction": 0.0}
    ),
    "one that is not known may go on": Case(
        {0: replace(ENV, queued_sequences=8)},
        replace(QUEUE, queued_groups=2, queued_sequences=8, largest_group=4),
        {"current_step": 7, "queue_size": 2, "self_queue_size": 0, "max_group_size": 4, "env_weight": 1.0, "unallocated_fraction": 1.0},
        env_id=5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_status_env_arithmetic(name: str) -> None:
    case = CASES[name]

    answer = env_status(case.env_id, case.envs, case.queue)

    assert {key: answer[key] for key in case.expected} == pytest.approx(case.expected)
    assert set(answer) == {
        "current_step", "queue_size", "unallocated_fraction", "self_queue_size", "max_group_size", "env_weight",
    }  # fmt: skip


def test_the_group_size_is_that_of_the_largest_group_sent() -> None:
    figures = env_figures(
        [an_env_status(group_size=4), an_env_status(env_id=1, group_size=4)], {0: 6, 1: 2}, env_timeout_s=60
    )

    assert (figures[0].group_size, figures[1].group_size) == (6, 4)


def test_an_environment_that_is_silent_or_gone_is_not_present() -> None:
    statuses = [
        an_env_status(), an_env_status(env_id=1, last_seen_s=61), an_env_status(env_id=2, is_connected=False),
    ]  # fmt: skip

    figures = env_figures(statuses, {}, env_timeout_s=60)

    assert [figures[env_id].is_present for env_id in range(3)] == [True, False, False]
