"""What BaseEnv promises to environments: its surface, its hooks, and when they are called."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

import pytest

from atroposlib.envs import base, rollouts
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, EvalHandlingEnum
from atroposlib.envs.server_handling.managed_server import SequenceNode
from atroposlib.envs.serving import group_work, grouping, membership, runner
from atroposlib.envs.serving.records import RunRecords
from atroposlib.envs.serving.runner import EnvRunner
from atroposlib.errors import ConfigError, RolloutDeadlineError, RolloutError
from atroposlib.wire.models import InferenceServer, InferenceServerStatus, Status
from tests.envs.fakes import CountingEnv, FakeRolloutServer, a_scored_group

MakeEnv = Callable[..., CountingEnv]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(runner, "NO_ITEM_PAUSE_S", 0.01)


async def run(env: BaseEnv, server: FakeRolloutServer) -> EnvRunner:
    records = RunRecords(env.config.run_dir, env.display_name)
    made = EnvRunner(env, server, records)
    try:
        async with asyncio.timeout(15):
            await made.run()
    finally:
        records.close()
    return made


def start_item(env: BaseEnv, item: Any) -> str:
    env.running_items["u"] = {"item": item, "start_time": 0.0}
    return "u"


# Surface


def test_config_has_upstreams_fields_and_defaults() -> None:
    expected = {
        "group_size": 4, "max_num_workers": -1, "max_eval_workers": 16, "max_num_workers_per_node": 8,
        "steps_per_eval": 100, "max_token_length": 2048, "eval_handling": EvalHandlingEnum.STOP_TRAIN,
        "eval_limit_ratio": 0.5, "inference_weight": 1.0, "batch_size": -1, "max_batches_offpolicy": 3,
        "tokenizer_name": "NousResearch/DeepHermes-3-Llama-3-3B-Preview", "use_wandb": True,
        "rollout_server_url": "http://localhost:8000", "total_steps": 1000, "wandb_name": None,
        "num_rollouts_to_keep": 32, "num_rollouts_per_group_for_logging": 1, "ensure_scores_are_not_same": True,
        "data_path_to_save_groups": None, "data_dir_to_save_evals": None, "min_items_sent_before_logging": 2,
        "include_messages": False, "min_batch_allocation": None, "worker_timeout": 600, "thinking_mode": False,
        "reasoning_effort": None, "max_reasoning_tokens": None, "custom_thinking_prompt": None,
    }  # fmt: skip

    config = BaseEnvConfig(score_buffer_size=3)  # type: ignore[call-arg]

    assert {name: getattr(config, name) for name in expected} == expected
    assert BaseEnvConfig(**config.model_dump()) == config
    assert BaseEnvConfig(eval_handling="LIMIT_TRAIN").eval_handling is EvalHandlingEnum.LIMIT_TRAIN  # type: ignore[arg-type]


def test_instance_attributes_at_construction(make_env: MakeEnv) -> None:
    env = make_env(max_num_workers_per_node=5)
    env.rollouts_for_wandb.append([("text", 1.0)])
    env.rollouts_for_wandb.pop(0)

    assert (env.workers, env.eval_workers, env.backlog, env.running_items) == (set(), set(), [], {})
    assert (env.curr_step, env.max_token_len, env.items_sent_this_step) == (0, -1, 0)
    assert (env.checkpoint_dir, env.checkpoint_interval, env.max_num_workers) == ("", -1, 5)
    assert (env.wandb_project, env.wandb_group, env.wandb_prepend, env.eval_runner) == (None, None, None, None)
    assert (env.last_completed_item, env.status_dict, env.jsonl_writer) == (None, None, None)


def test_the_older_alias_and_the_names_that_environments_import() -> None:
    assert base.OpenaiConfig is APIServerConfig
    for name in base.__all__:
        assert hasattr(base, name)


def test_reasoning_options_reach_the_servers_and_are_checked_at_construction(make_env: MakeEnv) -> None:
    assert make_env(max_reasoning_tokens=2048).server.reasoning_config.max_tokens == 2048

    with pytest.raises(ValueError, match="Invalid reasoning_effort"):
        make_env(reasoning_effort="enormous")


def test_derived_batch_size_follows_the_allocations(make_env: MakeEnv) -> None:
    env = make_env(batch_size=64, min_batch_allocation=0.25)
    assert env.derived_batch_size == 64

    env.status_dict = {"unallocated_fraction": 0.5}
    assert env.derived_batch_size == 48


@pytest.mark.parametrize("mode", ["serve", "process", "evaluate"])
def test_every_mode_has_its_command_class(mode: str) -> None:
    command = getattr(CountingEnv, f"get_cli_{mode}_config_cls")()

    assert callable(command.run)
    assert "env.group_size" in command.model_fields


# Collecting


class SingleEnv(CountingEnv):
    """Only collect_trajectory: results come from `results`, exceptions are raised."""

    results: ClassVar[list[Any]] = []

    async def collect_trajectories(self, item: Any) -> Any:
        return await BaseEnv.collect_trajectories(self, item)

    async def collect_trajectory(self, item: Any) -> Any:
        result = type(self).results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def a_member(score: float, **more: Any) -> dict[str, Any]:
    group: Any = a_scored_group((score,))
    return {
        "tokens": group["tokens"][0], "masks": group["masks"][0], "scores": score,
        "inference_logprobs": group["inference_logprobs"][0], **more,
    }  # fmt: skip


def single(results: list[Any], **config: Any) -> SingleEnv:
    cls: Any = type("AnEnv", (SingleEnv,), {"results": results})
    settings = {"group_size": len(results), "tokenizer_name": None, **config}
    env: SingleEnv = cls(BaseEnvConfig(**settings), [APIServerConfig(base_url="http://localhost:1/v1")])
    return env


async def test_members_merge_with_every_column_and_their_backlogs(make_env: MakeEnv) -> None:
    env = single([
        (a_member(0.0, overrides={"a": 1}, group_overrides={"x": 1}), ["later"]),
        (a_member(1.0, group_overrides={"y": 2}), []),
        a_member(0.5),
    ])  # fmt: skip

    group, backlog = await env.collect_trajectories("item")

    assert group["scores"] == [0.0, 1.0, 0.5]
    assert group["inference_logprobs"] == [[1.0, 1.0, -0.5, -0.5, -0.5]] * 3
    assert (group["overrides"], group["group_overrides"]) == ([{"a": 1}, {}, {}], {"x": 1, "y": 2})
    assert group.get("messages") is None
    assert backlog == ["later"]


async def test_a_member_that_is_none_is_left_out_not_the_group() -> None:
    group, backlog = await single([(a_member(0.0), []), (None, ["again"]), (a_member(1.0), [])]).collect_trajectories(1)

    assert group["scores"] == [0.0, 1.0]
    assert backlog == ["again"]
    assert await single([(None, []), None]).collect_trajectories(1) == (None, [])


async def test_a_member_whose_infrastructure_fails_is_tried_again_and_then_left_out_if_allowed() -> None:
    down = [RolloutError("down")] * 3
    group, _ = await single([a_member(0.0), *down[:2], a_member(1.0)], group_size=2).collect_trajectories(1)
    assert group["scores"] == [0.0, 1.0]

    group, _ = await single([a_member(0.0), *down], group_size=2, min_valid_per_group=1).collect_trajectories(1)
    assert group["scores"] == [0.0]

    with pytest.raises(RolloutError, match="1 of 2 trajectories succeeded, 2 are needed; last failure: down"):
        await single([a_member(0.0), *down], group_size=2).collect_trajectories(1)


async def test_a_member_whose_own_task_group_met_only_infrastructure_failures_is_tried_again() -> None:
    down = ExceptionGroup("of a TaskGroup", [RolloutError("down")])
    group, _ = await single([a_member(0.0), down, a_member(1.0)], group_size=2).collect_trajectories(1)
    assert group["scores"] == [0.0, 1.0]


async def test_a_bug_in_one_member_ends_the_others_before_the_group_is_given_up() -> None:
    ended: list[bool] = []

    async def collect(item: int) -> Any:
        if not started:
            started.append(item)
            await asyncio.sleep(0)
            raise KeyError("answer")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    started: list[int] = []
    with pytest.raises(KeyError, match="answer"):
        await grouping.collect_group(collect, 1, group_size=3, min_valid=3)
    assert ended == [True, True]


async def sampled_texts(*args: Any, **sampling: Any) -> list[tuple[str, SequenceNode]]:
    node = SequenceNode(full_text="", tokens=[1, 2], masked_tokens=[-100, 2], logprobs=[1.0, -0.5])
    return [(text, node) for text in ("first", "second", "third")]


async def test_a_reward_whose_own_task_group_met_only_infrastructure_failures_excludes_its_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollouts, "sample_texts", sampled_texts)

    def reward(text: str) -> float:
        if text == "first":
            raise ExceptionGroup("of a TaskGroup", [RolloutError("no grader"), RolloutError("no grader")])
        return 1.0

    group = await rollouts.rollout_group(Any, None, [], reward=reward, group_size=3, min_valid=2)  # type: ignore[arg-type]

    assert group["scores"] == [1.0, 1.0]


async def test_a_bug_in_a_reward_ends_the_other_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "sample_texts", sampled_texts)
    ended: list[str] = []

    async def reward(text: str) -> float:
        try:
            await asyncio.sleep(0 if text == "first" else 60)
        finally:
            ended.append(text)
        return float(text)

    with pytest.raises(ValueError, match="first"):
        await rollouts.rollout_group(Any, None, [], reward=reward, group_size=3, min_valid=2)  # type: ignore[arg-type]
    assert sorted(ended) == ["first", "second", "third"]


async def test_a_result_that_is_no_trajectory_is_named() -> None:
    with pytest.raises(ValueError, match="first element is str"):
        await single([("text", [])]).collect_trajectories(1)


@pytest.mark.parametrize(
    ("returned", "scores", "backlog"),
    [
        (a_scored_group(), [[0.0, 1.0]], []),
        ((a_scored_group(), ["b"]), [[0.0, 1.0]], ["b"]),
        ((a_scored_group(), None), [[0.0, 1.0]], []),
        (([a_scored_group(), None], ["b"]), [[0.0, 1.0]], ["b"]),
        ((a_scored_group(), [a_scored_group((1.0, 0.5))], ["b"]), [[0.0, 1.0], [1.0, 0.5]], ["b"]),
        ((None, ["b"]), [], ["b"]),
        (None, [], []),
    ],
)
async def test_every_form_that_collect_trajectories_may_return(
    make_env: MakeEnv, returned: Any, scores: Any, backlog: list[Any]
) -> None:
    env = make_env()
    env.process_mode = True

    async def collect(item: Any) -> Any:
        return returned

    env.collect_trajectories = collect  # type: ignore[method-assign]
    data = await env.handle_env(start_item(env, 1))

    groups = [group for group in (data if isinstance(data, list) else [data]) if group]
    assert [group["scores"] for group in groups] == scores
    assert env.backlog == backlog


async def test_handle_env_collects_postprocesses_sends_and_cleans_up_in_this_order(make_env: MakeEnv) -> None:
    env = make_env()
    calls: list[Any] = []

    async def postprocess(trajectories: Any) -> Any:
        calls.append("postprocess")
        return [trajectories, None]

    async def send(scored_data: Any, item: Any = None, do_send_to_api: bool = True, **_: Any) -> None:
        calls.append(("send", len(scored_data), item, do_send_to_api))

    async def cleanup() -> None:
        calls.append("cleanup")

    env.postprocess_histories, env.handle_send_to_api, env.cleanup = postprocess, send, cleanup  # type: ignore[method-assign,assignment]

    await env.handle_env(start_item(env, 5))

    assert calls == ["postprocess", ("send", 2, 5, True), "cleanup"]
    assert (env.last_completed_item, env.running_items) == (5, {})
    assert list(env.task_successful) == [1]
    assert len(env.succeeded_task_duration) == 1


async def test_a_group_over_its_deadline_is_an_infrastructure_failure_and_is_cleaned_up(make_env: MakeEnv) -> None:
    async def hang(item: int) -> Any:
        await asyncio.sleep(30)

    env = make_env(hang, group_deadline_s=0.01)

    with pytest.raises(RolloutDeadlineError, match=r"longer than 0\.01 s"):
        await env.handle_env(start_item(env, 1))

    assert env.running_items == {}
    assert list(env.task_successful) == [0]
    assert len(env.failed_task_duration) == 1


async def test_run_blocking_and_evaluate_items(make_env: MakeEnv) -> None:
    env = make_env(max_eval_workers=2)
    running = peak = 0

    async def judge(item: int) -> int:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        squared = await env.run_blocking(pow, item, 2)
        running -= 1
        return squared

    assert await env.evaluate_items(range(5), judge) == [0, 1, 4, 9, 16]
    assert peak == 2
    await env.aclose()


# Hooks under the loop


async def test_the_loop_goes_through_every_hook(make_env: MakeEnv) -> None:
    calls: Counter[str] = Counter()
    names = (
        "setup", "register_env", "get_server_info", "setup_wandb", "get_status", "add_train_workers", "env_step_checks",
        "handle_env", "collect_trajectories", "postprocess_histories", "handle_send_to_api", "cleanup", "wandb_log",
    )  # fmt: skip
    env = make_env(min_items_sent_before_logging=0)

    def counted(name: str) -> Any:
        inner = getattr(env, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return await inner(*args, **kwargs)

        return call

    for name in names:
        setattr(env, name, counted(name))
    server = FakeRolloutServer(batch=2, steps=3)

    await run(env, server)

    assert set(calls) == set(names)
    assert calls["setup"] == calls["register_env"] == calls["get_server_info"] == 1
    assert calls["handle_send_to_api"] >= len(server.groups)


async def test_a_sender_that_adds_to_groups_and_calls_super_works(make_env: MakeEnv) -> None:
    env = make_env()
    send = env.handle_send_to_api

    async def enriched(scored_data: Any, item: Any = None, *args: Any, **more: Any) -> None:
        group: Any = {**scored_data, "group_overrides": {"task_id": item}}
        await send(group, item, *args, **more)

    env.handle_send_to_api = enriched  # type: ignore[method-assign]
    server = FakeRolloutServer()

    await run(env, server)

    sent = [group.group_overrides for group in server.groups.values()]
    assert len(sent) == len(server.groups)
    assert {(overrides or {})["task_id"] for overrides in sent} <= set(env.collected)


async def test_a_sender_that_swallows_exceptions_does_not_hide_the_end_of_the_run(make_env: MakeEnv) -> None:
    env = make_env()
    send = env.handle_send_to_api

    async def careless(*args: Any, **kwargs: Any) -> None:
        try:
            await send(*args, **kwargs)
        except Exception:
            return

    env.handle_send_to_api = careless  # type: ignore[method-assign]
    server = FakeRolloutServer()
    server.refuse_with = [ConfigError("no token")]

    with pytest.raises(ExceptionGroup) as raised:
        await run(env, server)

    assert raised.group_contains(ConfigError, match="no token")


async def test_an_environment_that_sends_while_it_collects_gets_a_ticket_for_each_group(make_env: MakeEnv) -> None:
    env = make_env(max_num_workers=1)

    async def collect(item: int) -> Any:
        await env.handle_send_to_api(a_scored_group((0.0, 0.5)), item)
        await asyncio.create_task(env.handle_send_to_api(a_scored_group((0.25, 0.5)), item))
        return a_scored_group((0.75, 1.0)), []

    env.collect_trajectories = collect  # type: ignore[method-assign]
    server = FakeRolloutServer(batch=3, steps=2, in_flight=1)
    tickets: list[str | None] = []
    server.on_post = lambda group: tickets.append(group.ticket)

    await run(env, server)

    assert len(set(tickets)) == len(tickets) == len(server.groups) >= 6
    assert server.tickets == set()


async def test_the_backlog_comes_before_new_items_the_newest_first(make_env: MakeEnv) -> None:
    env = make_env(max_num_workers=1)
    env.items = itertools.count()
    collected: list[Any] = []

    async def collect(item: Any) -> Any:
        collected.append(item)
        return a_scored_group(), (["first", "second"] if item == 0 else [])

    env.collect_trajectories = collect  # type: ignore[method-assign]

    await run(env, FakeRolloutServer(batch=2, steps=2, in_flight=1))

    # Item 1 was taken from the environment while item 0 was still on its way.
    assert [item for item in collected if item in (0, "first", "second")] == [0, "second", "first"]


async def test_an_admission_hook_that_holds_back_does_not_spin(make_env: MakeEnv) -> None:
    env = make_env()
    admit, calls, may_start = env.add_train_workers, 0, asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, may_start.set)

    async def hesitant() -> None:
        nonlocal calls
        if may_start.is_set():
            await admit()
        else:
            calls += 1

    env.add_train_workers = hesitant  # type: ignore[method-assign]
    server = FakeRolloutServer()

    await run(env, server)

    # A pause of 0.01 s each.
    assert 0 < calls <= 11
    assert len(server.groups) >= server.batch * server.request.num_steps


async def test_an_answer_older_than_the_last_grant_does_not_take_the_step_back(
    make_env: MakeEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(FakeRolloutServer):
        async def status(self) -> Status:
            return (await super().status()).model_copy(update={"step": 0})

    monkeypatch.setattr(runner, "STATUS_PERIOD_S", 0.005)
    env, steps = make_env(max_num_workers=1), []
    check = env.env_step_checks

    async def noted() -> None:
        await check()
        steps.append(env.curr_step)

    async def brief(item: int) -> Any:
        await asyncio.sleep(0.004)
        return a_scored_group()

    env.env_step_checks = noted  # type: ignore[method-assign]
    type(env).make = staticmethod(brief)

    await run(env, Forgetful(batch=1, steps=8, in_flight=1))

    assert steps == sorted(steps)
    assert steps[-1] == 8


async def test_a_broken_log_of_the_authors_costs_no_rollout(
    make_env: MakeEnv, caplog: pytest.LogCaptureFixture
) -> None:
    env = make_env(min_items_sent_before_logging=0)

    async def broken(wandb_metrics: Any = None) -> None:
        raise KeyError("train/percent_correct")

    env.wandb_log = broken  # type: ignore[method-assign]

    made = await run(env, FakeRolloutServer(batch=2, steps=3))

    assert made.stats.groups_sent >= 6
    assert "train/percent_correct" in caplog.text


async def test_metrics_are_logged_when_enough_groups_were_taken(make_env: MakeEnv) -> None:
    logged: list[int] = []
    env = make_env(min_items_sent_before_logging=5, max_num_workers=1)

    async def log(wandb_metrics: Any = None) -> None:
        logged.append(env.curr_step)

    env.wandb_log = log  # type: ignore[method-assign]

    await run(env, FakeRolloutServer(batch=2, steps=8, in_flight=1))

    assert logged == [3, 6]


# Checkpoints and other life cycle


async def test_state_is_saved_at_crossings_and_found_again_after_a_restart(make_env: MakeEnv, tmp_path: Path) -> None:
    def with_state(server: FakeRolloutServer) -> CountingEnv:
        env = make_env(max_num_workers=1)
        save = env.save_checkpoint
        env.save_checkpoint = lambda step, data=None: save(step, {"seen": len(env.collected)})  # type: ignore[method-assign]
        more = {"checkpoint_dir": str(tmp_path), "save_checkpoint_interval": 2}
        server.request = server.request.model_copy(update=more)
        return env

    server = FakeRolloutServer(batch=2, steps=5, in_flight=1)
    await run(with_state(server), server)
    files = sorted(path.name for path in (tmp_path / "env_checkpoints" / "counting").iterdir())
    assert files == ["step-2.json", "step-4.json"]

    server.request = server.request.model_copy(update={"num_steps": 6})
    again = with_state(server)
    await run(again, server)

    assert again.seen > 0  # type: ignore[attr-defined]


async def test_batch_size_and_longest_sequence_come_from_the_trainer(make_env: MakeEnv) -> None:
    env = make_env()
    server = FakeRolloutServer(batch=3, max_token_len=77)

    await run(env, server)

    assert (env.config.batch_size, env.max_token_len) == (server.request.batch_size, 77)


async def test_a_group_that_fits_in_no_batch_ends_the_run_with_the_fix(make_env: MakeEnv) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        await run(make_env(group_size=16), FakeRolloutServer(batch=1))

    assert raised.group_contains(ConfigError, match="group_size=16 is larger.*batch_size=8.*--group_size")


async def test_tries_of_one_item_end(make_env: MakeEnv) -> None:
    def flaky(item: int) -> Any:
        if item == 0:
            raise RolloutError("grader is down")
        return a_scored_group()

    env = make_env(flaky, max_num_workers=1)

    await run(env, FakeRolloutServer())

    assert env.collected.count(0) == group_work.ITEM_TRIES


async def test_servers_come_from_the_registry_where_the_config_says_so(make_env: MakeEnv) -> None:
    class WithRegistry(FakeRolloutServer):
        async def status(self) -> Status:
            servers = [InferenceServer(url="http://a", policy_version=0), InferenceServer(url="http://b")]
            entries = [InferenceServerStatus(server=server, last_seen_s=0.0) for server in servers]
            return (await super().status()).model_copy(update={"inference_servers": entries, "policy_version": 0})

    async def noted(urls: Collection[str]) -> None:
        synced.append(urls)

    synced: list[Collection[str]] = []
    for wanted in (False, True):
        env = make_env(servers_from_registry=wanted)
        env.server.sync_servers = noted  # type: ignore[method-assign]
        await run(env, WithRegistry())
        assert bool(synced) is wanted

    assert synced[0] == ["http://a/v1"]
