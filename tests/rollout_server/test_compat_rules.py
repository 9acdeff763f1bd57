"""The decisions behind the old routes, one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from atroposlib.wire.columns import Group
from atroposlib.wire.json_codec import group_from_json, read_scored_data
from atroposlib.wire.models import OLD_RUN_PREFIX, RunInfo
from rollout_server.compat.batch_pieces import PIECE_BYTES, slices
from rollout_server.compat.dedupe import Deduplication, content_digest
from rollout_server.compat.messages import UNLIMITED_STEPS, Registration
from rollout_server.compat.runs import carried_over, continues, numbered_name, run_request
from tests.rollout_server.test_compat_status_env import an_env_status

REGISTRATION = Registration(
    wandb_group="g", wandb_project="p", batch_size=4, max_token_len=64, checkpoint_dir="/c", save_checkpoint_interval=10,
    starting_step=0, num_steps=5,
)  # fmt: skip


def a_run(
    registration: Registration = REGISTRATION, *, name: str = f"{OLD_RUN_PREFIX}1", acknowledged: int = 0
) -> RunInfo:
    return RunInfo(
        run_name=name, run_id="id", session=1, policy_version=0, committed_step=acknowledged,
        acknowledged_step=acknowledged, request=run_request(name, registration, start_step=None),
    )  # fmt: skip


def other(**changes: Any) -> Registration:
    return REGISTRATION.model_copy(update=changes)


@pytest.mark.parametrize(
    "registration",
    [REGISTRATION, other(batch_size=8), other(num_steps=9), other(starting_step=3), other(max_token_len=128)],
)
def test_the_same_names_mean_the_same_run(registration: Registration) -> None:
    assert continues(a_run(), registration)


@pytest.mark.parametrize(
    "registration", [other(wandb_project="q"), other(wandb_group=None), other(checkpoint_dir="/d")]
)
def test_another_name_means_another_run(registration: Registration) -> None:
    assert not continues(a_run(), registration)


def test_null_and_empty_names_are_the_same() -> None:
    assert continues(a_run(other(wandb_group=None, wandb_project="")), other(wandb_group="", wandb_project=None))


def test_a_finished_run_is_not_continued() -> None:
    assert continues(a_run(acknowledged=4), REGISTRATION)
    assert not continues(a_run(acknowledged=5), REGISTRATION)


def test_a_run_of_the_native_routes_is_not_continued() -> None:
    assert not continues(a_run(name="mine"), REGISTRATION)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_no_number_of_steps_means_no_end(num_steps: int) -> None:
    assert run_request("r", other(num_steps=num_steps), start_step=None).num_steps == UNLIMITED_STEPS


def test_names_are_numbered_in_order_of_arrival() -> None:
    taken: set[str] = set()
    for _ in range(3):
        taken.add(numbered_name("a", taken))
    taken.add(numbered_name("a_1", taken))

    assert taken == {"a_0", "a_1", "a_2", "a_1_0"}


def test_a_number_that_is_taken_is_left_out() -> None:
    assert numbered_name("a", {"a_1"}) == "a_2"


def test_the_living_keep_their_env_ids_and_the_dead_after_them_are_forgotten() -> None:
    dead = {"is_connected": False}
    envs = [an_env_status(2), an_env_status(0, **dead), an_env_status(1), an_env_status(3, last_seen_s=11.0)]

    assert [env.env_id for env in carried_over(envs)] == [0, 1, 2]
    assert carried_over([an_env_status(0, **dead)]) == []


def an_old_group(**fields: Any) -> Group:
    body = {"tokens": [[1, 2, 3], [4, 5, 6]], "masks": [[-100, 2, 3], [-100, 5, 6]], "scores": [1.0, 0.0], "env_id": 0}
    return group_from_json(read_scored_data(json.dumps(body | fields).encode()), group_id="")


CHANGES: list[dict[str, Any]] = [
    {"tokens": [[1, 2, 3], [4, 5, 7]]},
    {"tokens": [[1, 2], [3, 4, 5, 6]], "masks": [[-100, 2], [3, -100, 5, 6]]},
    {"masks": [[1, 2, 3], [-100, 5, 6]]},
    {"scores": [1.0, 0.5]},
    {"env_id": 1},
    {"env_id": None},
    {"inference_logprobs": [[1.0, -0.5, -0.5], [1.0, -0.5, -0.5]]},
    {"advantages": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]},
    {"overrides": [{}, {}]},
    {"group_overrides": {"task_id": 1}},
    {"messages": [["a"], ["b"]]},
    {"images": ["x"]},
    {"generation_params": {"temperature": 1}},
]


@pytest.mark.parametrize("change", CHANGES)
def test_groups_that_differ_in_anything_have_different_digests(change: dict[str, Any]) -> None:
    assert content_digest(an_old_group(**change), sender="a") != content_digest(an_old_group(), sender="a")


def test_the_digest_knows_the_sender_and_not_the_id() -> None:
    group = an_old_group()

    assert content_digest(group, sender="a") == content_digest(replace(group, group_id="x"), sender="a")
    assert content_digest(group, sender="a") != content_digest(group, sender="b")


def test_ids_repeat_within_a_window_and_are_known_in_the_next() -> None:
    now = 1000.0
    dedupe = Deduplication(100.0, clock=lambda: now)
    first = dedupe.ids("d", ordinal=0)

    now = 1099.0
    same = dedupe.ids("d", ordinal=0)
    now = 1101.0
    later = dedupe.ids("d", ordinal=0)

    assert same == first
    assert later.current != first.current
    assert later.previous == first.current


def test_equal_groups_of_one_request_are_different_groups() -> None:
    dedupe = Deduplication(100.0)

    assert dedupe.ids("d", ordinal=0) != dedupe.ids("d", ordinal=1)


def test_without_a_window_every_group_is_new() -> None:
    dedupe = Deduplication(0.0)

    assert dedupe.ids("d", ordinal=0) != dedupe.ids("d", ordinal=0)
    assert dedupe.ids("d", ordinal=0).previous is None


def test_a_batch_is_cut_between_groups() -> None:
    small, large = bytes(10), bytes(PIECE_BYTES)

    assert [len(part) for part in slices([small, large, small, small])] == [2, 2]
    assert [len(part) for part in slices([large, large])] == [1, 1]
