"""What BaseEnv gives to old environments and how it treats what they give back."""

from __future__ import annotations

import inspect
import logging
import pickle
from typing import Any

import pytest

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ServerBaseline
from atroposlib.envs.server_handling.server_harness import ServerHarness
from tests.compat.sdk.old_env import NOWHERE, OldConfig, OldEnv, a_group

# Construction

ATTRIBUTES: dict[str, Any] = {
    "workers": set(), "eval_workers": set(), "backlog": [], "running_items": {}, "rollouts_for_wandb": [],
    "completion_lengths": [], "wandb_project": None, "wandb_group": None, "wandb_prepend": None, "curr_step": 0,
    "max_token_len": -1, "max_num_workers": 8, "checkpoint_dir": "", "checkpoint_interval": -1,
    "items_sent_this_step": 0, "eval_runner": None, "last_completed_item": None, "jsonl_writer": None,
}  # fmt: skip
WINDOWS = (
    "task_duration", "succeeded_task_duration", "failed_task_duration", "task_successful", "mainloop_timings",
    "workers_added_list",
)  # fmt: skip
SET_LATER = ("env_id", "status_dict", "last_loop_time", "n_groups_to_process", "group_size_to_process")


@pytest.mark.parametrize(("name", "value"), ATTRIBUTES.items())
def test_an_attribute_at_construction(name: str, value: Any) -> None:
    found = getattr(OldEnv.make(), name)

    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", WINDOWS)
def test_a_list_of_figures_is_empty_and_takes_more(name: str) -> None:
    figures = getattr(OldEnv.make(), name)
    figures.append(1.0)

    assert list(figures) == [1.0]


@pytest.mark.parametrize("name", SET_LATER)
def test_what_is_set_later_can_be_asked_for_before(name: str) -> None:
    assert getattr(OldEnv.make(), name) is None


def test_config_tokenizer_and_servers_are_there_when_the_constructor_returns(tokenizer_name: str) -> None:
    env = OldEnv.make(tokenizer_name=tokenizer_name)

    assert isinstance(env.config, OldConfig)
    assert env.tokenizer.decode(env.tokenizer.encode("hi")) == "hi"
    assert [server.config.base_url for server in env.server.servers] == [NOWHERE]
    assert env.server.reasoning_config is not None


def test_the_tokenizer_renders_chats_to_plain_ids_as_before_transformers_5(tokenizer_name: str) -> None:
    tokenizer = OldEnv.make(tokenizer_name=tokenizer_name).tokenizer
    chat = [{"role": "user", "content": "a"}]

    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)

    assert ids == tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    assert tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] == tokenizer.apply_chat_template(chat)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a") == tokenizer.encode("a")


def test_slurm_and_testing_are_taken_by_position() -> None:
    env = OldEnv(OldConfig(), [APIServerConfig(base_url=NOWHERE)], False, True)

    assert [type(server) for server in env.server.servers] == [ServerHarness]


def test_slurm_outside_of_a_job_leaves_the_servers_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)

    assert [one.config.base_url for one in OldEnv.make().server.servers] == [NOWHERE], "its default is slurm=True"


@pytest.mark.parametrize(("asked", "servers", "workers"), [(-1, 1, 8), (-1, 3, 24), (5, 3, 5)])
def test_workers_are_per_server_unless_said_otherwise(asked: int, servers: int, workers: int) -> None:
    configs = [APIServerConfig(base_url=f"http://127.0.0.1:{port}/v1") for port in range(1, servers + 1)]

    assert OldEnv(OldConfig(max_num_workers=asked), configs, False).max_num_workers == workers


def test_the_default_configuration_is_that_of_the_class_and_a_baseline() -> None:
    config, servers = OldEnv.config_init()

    assert type(config) is OldConfig
    assert servers == ServerBaseline()


def test_an_effort_that_does_not_exist_ends_the_construction() -> None:
    with pytest.raises(ValueError, match="Invalid reasoning_effort"):
        OldEnv.make(reasoning_effort="very high")


# Hooks that do nothing by themselves


class Bare(BaseEnv):
    async def get_next_item(self) -> Any:
        return None


def bare() -> Bare:
    return Bare(OldConfig(), [APIServerConfig(base_url=NOWHERE)])


async def test_an_environment_without_a_setup_has_nothing_to_set_up() -> None:
    assert inspect.iscoroutinefunction(Bare.setup)
    await bare().setup()


async def test_an_environment_that_collects_nothing_is_told_what_to_write() -> None:
    with pytest.raises(NotImplementedError, match="collect_trajectories"):
        await bare().collect_trajectory("item")


async def test_histories_pass_unchanged() -> None:
    group = a_group(0.0, 1.0)

    assert await bare().postprocess_histories(group) is group


async def test_cleanup_and_evaluate_may_be_left_out() -> None:
    await bare().cleanup()
    assert await bare().evaluate() is None


# Sending


@pytest.mark.parametrize(
    ("group", "config", "is_sent"),
    [
        (a_group(0.0, 1.0), {}, True),
        (a_group(0.0, 1.0, 2.0), {}, False),
        (a_group(0.0, 1.0, 2.0, group_overrides={"group_size": 3}), {}, True),
        (a_group(0.0, 1.0, group_overrides=None), {}, True),
        (a_group(1.0, 1.0), {}, False),
        (a_group(1.0, 1.0), {"ensure_scores_are_not_same": False}, True),
        (a_group(1.0), {"group_size": 1}, False),
    ],
    ids=["whole", "wrong-size", "own-size", "null-overrides", "equal", "equal-allowed", "group-of-one"],
)
async def test_which_groups_are_sent(group: Any, config: dict[str, Any], is_sent: bool) -> None:
    env = OldEnv.make(**config)

    await env.handle_send_to_api(group, item="item")

    assert len(env.sent) == is_sent


@pytest.mark.parametrize(("max_token_len", "is_sent"), [(5, True), (4, True), (3, False), (0, True), (-1, True)])
async def test_a_sequence_beyond_the_limit_drops_its_group(max_token_len: int, is_sent: bool) -> None:
    """Atropos 0.4.0 drops a sequence of exactly max_token_len too, although the trainer can take it."""
    env = OldEnv.make()
    env.max_token_len = max_token_len

    await env.handle_send_to_api(a_group(0.0, 1.0, length=4))

    assert len(env.sent) == is_sent
    assert env.completion_lengths == [2, 2], "also of a group that is dropped for its length"


async def test_an_overlong_group_is_sent_where_the_caller_says_so() -> None:
    env = OldEnv.make()
    env.max_token_len = 2

    await env.handle_send_to_api(a_group(0.0, 1.0), None, True, False)

    assert len(env.sent) == 1


@pytest.mark.parametrize("outcome", [None, [], [None], {}])
async def test_nothing_is_sent_for_nothing(outcome: Any) -> None:
    env = OldEnv.make()

    await env.handle_send_to_api(outcome)

    assert env.sent == []


async def test_a_list_is_sent_without_its_empty_places() -> None:
    env = OldEnv.make()

    await env.handle_send_to_api([a_group(0.0, 1.0), None, a_group(1.0, 0.0)])

    assert [group["scores"] for group in env.sent] == [[0.0, 1.0], [1.0, 0.0]]


async def test_columns_that_are_missing_are_null_in_what_is_sent() -> None:
    env = OldEnv.make()

    await env.handle_send_to_api(a_group(0.0, 1.0))

    names = ("ref_logprobs", "overrides", "group_overrides", "distill_token_ids", "distill_logprobs")
    assert {name: env.sent[0][name] for name in names} == dict.fromkeys(names)


@pytest.mark.parametrize(("given", "expected"), [(None, "hi"), ([[{"role": "user", "content": "own"}]] * 2, "own")])
async def test_messages_are_filled_with_the_decoded_text(given: Any, expected: str, tokenizer_name: str) -> None:
    env = OldEnv.make(tokenizer_name=tokenizer_name, include_messages=True)
    row = env.tokenizer.encode("hi")
    group: Any = {"tokens": [row, row], "masks": [row, row], "scores": [0.0, 1.0], "messages": given}

    await env.handle_send_to_api(group)

    assert env.sent[0]["messages"][0][0]["content"] == expected
    assert env.sent[0]["messages"][1][0]["role"] == "user"


async def test_a_group_that_is_not_to_be_sent_is_kept_for_the_table_and_the_file_only(tokenizer_name: str) -> None:
    env = OldEnv.make(tokenizer_name=tokenizer_name, use_wandb=True)

    await env.handle_send_to_api(a_group(0.0, 1.0), None, do_send_to_api=False)

    assert env.sent == []
    assert len(env.rollouts_for_wandb) == 1


# The default merge


class Single(OldEnv):
    """Collects one trajectory at a time."""

    collect_trajectories = BaseEnv.collect_trajectories
    made: Any = None

    async def collect_trajectory(self, item: Any) -> Any:
        return self.made(item), [f"later {item}"]


FULL = {
    "tokens": [1, 2], "masks": [-100, 2], "scores": 1.0, "advantages": [0.0, 1.0], "ref_logprobs": [0.0, -1.0],
    "messages": [{"role": "user", "content": "x"}], "overrides": {"set_advantage_to_zero": True}, "images": "png",
    "inference_logprobs": [1.0, -0.5], "distill_token_ids": [[1], [2]], "distill_logprobs": [[-1.0], [-2.0]],
}  # fmt: skip


async def test_members_are_merged_column_by_column_and_their_backlogs_joined() -> None:
    env = Single.make()
    env.made = lambda item: {**FULL, "generation_params": {"temperature": 0.7}, "group_overrides": {"group_size": 2}}  # type: ignore[attr-defined]

    group, backlog = await env.collect_trajectories("i")

    assert {name: group[name] for name in FULL} == {name: [value, value] for name, value in FULL.items()}
    assert group["group_overrides"] == {"group_size": 2}
    assert group["generation_params"] == {"temperature": 0.7}
    assert backlog == ["later i", "later i"]


async def test_a_column_that_nobody_supplied_is_null_not_empty() -> None:
    env = Single.make()
    env.made = lambda item: {"tokens": [1, 2], "masks": [-100, 2], "scores": 1.0}  # type: ignore[attr-defined]

    group, _ = await env.collect_trajectories("i")

    assert all(group.get(name) is None for name in ("messages", "advantages", "overrides", "group_overrides", "images"))


@pytest.mark.parametrize("wrong", ["text", 3, ["tokens"]])
async def test_a_member_that_is_no_trajectory_is_an_error_for_the_group(wrong: Any) -> None:
    env = Single.make()
    env.made = lambda item: wrong  # type: ignore[attr-defined]

    with pytest.raises(ValueError, match="collect_trajectory must return"):
        await env.collect_trajectories("i")


# One worker


async def test_handle_env_returns_what_was_made_and_remembers_the_item() -> None:
    env = OldEnv.make()
    env.outcome = a_group(0.0, 1.0)
    env.running_items["u"] = {"item": "it", "start_time": 0.0}

    made = await env.handle_env("u")

    assert made is env.outcome
    assert (env.last_completed_item, env.running_items, len(env.task_duration)) == ("it", {}, 1)


async def test_handle_env_without_a_result_is_none() -> None:
    env = OldEnv.make()
    env.running_items["u"] = {"item": "it", "start_time": 0.0}

    assert await env.handle_env("u") is None
    assert (env.last_completed_item, list(env.task_successful)) == (None, [0])


# Tables and metrics


async def test_the_first_sequences_of_a_group_are_kept_and_the_oldest_groups_dropped(tokenizer_name: str) -> None:
    env = OldEnv.make(tokenizer_name=tokenizer_name, num_rollouts_to_keep=2, num_rollouts_per_group_for_logging=1)

    for score in (1.0, 2.0, 3.0):
        await env.add_rollouts_for_wandb(a_group(score, 0.0), "item")

    assert [[score for _, score in rows] for rows in env.rollouts_for_wandb] == [[2.0], [3.0]]
    assert all(isinstance(text, str) for rows in env.rollouts_for_wandb for text, _ in rows)


@pytest.mark.parametrize("asked", [-1, 2, 9])
async def test_minus_one_keeps_the_group_and_a_number_beyond_it_is_no_error(asked: int, tokenizer_name: str) -> None:
    env = OldEnv.make(tokenizer_name=tokenizer_name, num_rollouts_per_group_for_logging=asked)

    await env.add_rollouts_for_wandb([a_group(1.0, 0.0)])

    assert len(env.rollouts_for_wandb[0]) == 2


def test_durations_have_four_figures_from_the_second_sample_on() -> None:
    env = OldEnv.make()
    env.task_duration.extend([1.0, 3.0])
    env.mainloop_timings.append(1.0)
    env.task_successful.extend([1, 0, 1])

    metrics = env.perf_stats({"own": 1})

    durations = {
        f"train_perf/task_duration_{k}": v for k, v in (("mean", 2.0), ("std", 1.0), ("max", 3.0), ("min", 1.0))
    }
    counts = {"train/items_sent_to_api": 2, "train/items_rejected": 1}
    assert metrics == {"own": 1, **durations, **counts}
    assert (len(env.task_duration), len(env.task_successful), len(env.mainloop_timings)) == (0, 0, 1)


async def test_wandb_log_takes_own_metrics_or_none_and_clears_the_lengths() -> None:
    env = OldEnv.make()
    seen: dict[str, Any] = {}
    env.metrics_sink = seen.update
    env.max_token_len, env.completion_lengths = 10, [2, 10]

    await env.wandb_log({"eval/own": 1.0})
    await env.wandb_log()

    lengths = {"": 6.0, "_std": 4.0, "_max": 10.0, "_min": 2.0, "_p95": 0.5}
    assert {key: seen[f"train/completion_lengths{key}"] for key in lengths} == lengths
    assert seen["eval/own"] == 1.0
    assert env.completion_lengths == []


@pytest.mark.parametrize(
    ("batch_size", "status", "minimum", "expected"),
    [
        (64, None, None, 64),
        (-1, {"unallocated_fraction": 0.5}, None, -1),
        (64, {"unallocated_fraction": 0.5}, None, 32),
        (64, {"unallocated_fraction": 0.5}, 0.25, 48),
    ],
)
def test_derived_batch_size(batch_size: int, status: Any, minimum: float | None, expected: int) -> None:
    env = OldEnv.make(batch_size=batch_size, min_batch_allocation=minimum)
    env.status_dict = status

    assert env.derived_batch_size == expected


async def test_evaluate_log_without_a_folder_writes_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await OldEnv.make().evaluate_log({"accuracy": 0.5}, verbose=False)

    assert "data_dir_to_save_evals" in caplog.text


def test_the_class_of_the_config_is_what_env_config_cls_says() -> None:
    assert issubclass(OldEnv.env_config_cls, BaseEnvConfig)
