"""Regression tests of the pitfalls of environments and trainer; the table is in test_pitfalls.py."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from atroposlib import client as client_module
from atroposlib.client import RolloutClient
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, OpenaiConfig, ServerBaseline
from atroposlib.envs.command_line.options import resolve
from atroposlib.envs.eval_handling import last_crossed
from atroposlib.envs.metrics import length_metrics, server_metrics
from atroposlib.envs.reward_fns import CombinedReward, registry
from atroposlib.envs.server_handling.server_manager import server_list
from atroposlib.envs.server_pools import build_env
from atroposlib.envs.serving import membership, runner
from atroposlib.envs.serving.delivery import wire_group
from atroposlib.envs.serving.records import RunRecords
from atroposlib.envs.serving.runner import EnvRunner
from atroposlib.envs.teacher_distillation_env import TeacherDistillationConfig, TeacherDistillationEnv
from atroposlib.testing import MockInferenceServer
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer
from atroposlib.wire.columns import decode_groups, encode_group
from tests.compat.sdk.old_env import NOWHERE, OldConfig, OldEnv, a_group
from tests.envs.engine_fakes import FakeEngine
from tests.envs.fake_servers import a_pool
from tests.envs.fakes import CountingEnv, FakeRolloutServer, a_scored_group


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(runner, "NO_ITEM_PAUSE_S", 0.01)
    monkeypatch.setattr(runner, "STATUS_PERIOD_S", 0.01)


def counting(make: Any = None, **config: Any) -> Any:
    """An environment whose items are numbers; make(item) is its group."""
    cls: Any = type("Counting", (CountingEnv,), {} if make is None else {"make": staticmethod(make)})
    settings = {"group_size": 2, "tokenizer_name": None, "steps_per_eval": 0, "use_wandb": False, **config}
    return cls(BaseEnvConfig(**settings), [APIServerConfig(base_url=NOWHERE, server_type="vllm")])


async def run(env: BaseEnv, server: FakeRolloutServer, **options: Any) -> EnvRunner:
    made = EnvRunner(env, server, RunRecords(None, env.display_name), **options)
    async with asyncio.timeout(15):
        await made.run()
    return made


# The command line


class FromBaseline(OldEnv):
    @classmethod
    def config_init(cls) -> Any:
        return OldConfig(), ServerBaseline(timeout=7)


class FromTwo(OldEnv):
    @classmethod
    def config_init(cls) -> Any:
        return OldConfig(), [APIServerConfig(base_url=f"http://{host}/v1") for host in "ab"]


def test_pitfall_02_options_of_the_servers_reach_them_whatever_the_default_is(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text(yaml.safe_dump({"openai": {"model_name": "from-file"}}))

    named = resolve(FromBaseline, ["--openai.base_url", "http://x/v1", "--openai.model_name", "m"], mode_defaults={})
    two = resolve(FromTwo, ["--config", str(file)], mode_defaults={})

    assert [(s.base_url, s.model_name, s.timeout) for s in server_list(named.servers)] == [("http://x/v1", "m", 7)]
    assert [s.model_name for s in server_list(two.servers)] == ["from-file", "from-file"]


class ListConfig(OldConfig):
    words: list[str] = ["a"]  # noqa: RUF012
    bias: float = 0.0


class Listing(OldEnv):
    env_config_cls = ListConfig

    @classmethod
    def config_init(cls) -> Any:
        return ListConfig(), [APIServerConfig(base_url=NOWHERE)]


def test_pitfall_03_negative_numbers_and_lists_keep_their_meaning() -> None:
    config: Any = resolve(
        Listing, ["--total_steps", "-1", "--env.bias", "-0.5", "--words", "x", "y"], mode_defaults={}
    ).env

    assert (config.total_steps, config.bias, config.words) == (-1, -0.5, ["x", "y"])


# What environments call


def test_pitfall_04_tokens_are_ids_on_every_transformers(tokenizer: Any) -> None:
    made = tokenize_for_trainer(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    assert isinstance(made["tokens"], list)
    assert {type(token) for token in made["tokens"]} == {int}
    assert len(made["masks"]) == len(made["tokens"]) > 2


class Nameless(CountingEnv):
    name = None


async def test_pitfall_05_an_environment_without_a_name_registers_under_its_class() -> None:
    named, nameless = FakeRolloutServer(), FakeRolloutServer()

    await run(counting(), named)
    await run(Nameless(counting().config, [APIServerConfig(base_url=NOWHERE)]), nameless)

    assert [server.registrations[0].name for server in (named, nameless)] == ["counting", "Nameless"]


async def test_pitfall_06_a_server_that_forgot_everything_gets_the_environment_again() -> None:
    env, server = counting(), FakeRolloutServer(batch=2, steps=4)

    def forget_once(group: Any) -> None:
        server.on_post = lambda group: None
        server.restart_without_memory()

    server.on_post = forget_once

    await run(env, server)

    assert len(server.registrations) == 2
    assert server.step == 4
    assert env.env_id == server.session


@pytest.mark.parametrize(
    ("jumps", "every", "crossed"), [((0, 2, 4, 6), 2, [2, 4, 6]), ((0, 3, 5, 9), 4, [4, 8]), ((7, 8), 0, [])]
)
def test_pitfall_15_no_evaluation_or_checkpoint_is_jumped_over(jumps: Any, every: int, crossed: list[int]) -> None:
    found = [last_crossed(before, after, every) for before, after in pairwise(jumps)]

    assert [step for step in found if step is not None] == crossed


async def test_pitfall_22_a_server_that_fails_for_a_while_costs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_PAUSE_S", 0.01)
    answers = iter([503, 500, 503, 502, 500, 503, 500])
    taken = {"results": [{"group_id": "g", "status": "accepted"}]}

    def groups(body: Any) -> Any:
        status = next(answers, 200)
        return (status, taken) if status == 200 else (status, "busy")

    async with FakeEngine({"POST /v1/groups": groups}) as engine:
        monkeypatch.setattr(json, "loads", lambda raw: None)  # the fake reads JSON; groups are columns
        async with RolloutClient(engine.url.removesuffix("/v1")) as client:
            columns = wire_group(
                a_scored_group(), group_id="g", env_id=0, run_id="r", ticket=None, origins={}, fallback_version=0
            )
            [result] = await client.post_groups([columns])

    assert result.status == "accepted"
    assert len(engine.asked) == 8


async def test_pitfall_22_a_group_counts_once_it_was_taken() -> None:
    env, server = counting(min_items_sent_before_logging=1000), FakeRolloutServer(batch=2, steps=2)
    seen: Counter[str] = Counter()

    def status_of(group: Any) -> str:
        seen[group.group_id] += 1
        return "retired" if len(seen) <= 2 else "accepted"

    server.status_of = status_of
    await run(env, server)

    assert env.items_sent_this_step == len(server.groups)


@pytest.mark.parametrize("handling", ["STOP_TRAIN", "LIMIT_TRAIN"])
async def test_pitfall_23_what_runs_is_let_finish(handling: str) -> None:
    cancelled: list[int] = []

    async def roll(item: int) -> Any:
        try:
            await asyncio.sleep(0.005 * (item % 3))
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        return a_scored_group()

    env = counting(roll, steps_per_eval=1, eval_handling=handling, max_num_workers=4, max_batches_offpolicy=1)
    server = FakeRolloutServer(batch=2, steps=8, in_flight=8)
    during: list[int] = []
    server.on_post = lambda group: during.append(len(cancelled))

    await run(env, server)

    assert env.evaluated_at != []
    assert set(during) == {0}, "only the end of the run ends what is in flight"


async def test_pitfall_24_exceptions_of_the_author_are_shown_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    def make(item: int) -> Any:
        if item == 0:
            raise KeyError("answer")
        return a_scored_group()

    async def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("no items")

    env = counting(make, steps_per_eval=1)
    env.evaluate = broken
    made = await run(env, FakeRolloutServer(batch=2, steps=4))

    shown = {type(record.exc_info[1]) for record in caplog.records if record.exc_info}
    assert shown == {KeyError, ZeroDivisionError}
    assert made.stats.groups_dropped["env_error"] == 1


async def test_pitfall_24_a_group_that_took_too_long_is_tried_again() -> None:
    tries: Counter[int] = Counter()

    async def make(item: int) -> Any:
        tries[item] += 1
        if item == 0 and tries[0] == 1:
            await asyncio.Event().wait()
        return a_scored_group()

    await run(counting(make, worker_timeout=0.05, max_num_workers=1), FakeRolloutServer(batch=2, steps=2))

    assert tries[0] >= 2


# Groups


class Single(OldEnv):
    collect_trajectories = BaseEnv.collect_trajectories
    made: Any = None

    async def collect_trajectory(self, item: Any) -> Any:
        return next(self.made), []


async def test_pitfall_35_the_merge_carries_logprobs_and_drops_only_the_member_that_failed() -> None:
    env = Single.make(group_size=3)
    member = {"tokens": [1, 2], "masks": [-100, 2], "scores": 1.0, "inference_logprobs": [1.0, -0.5]}
    env.made = iter([member, None, {**member, "scores": 0.0}])  # type: ignore[attr-defined]

    group, _ = await env.collect_trajectories("item")

    assert group["inference_logprobs"] == [[1.0, -0.5]] * 2
    assert group["scores"] == [1.0, 0.0]


async def test_pitfall_36_overrides_that_are_null_are_none() -> None:
    env = OldEnv.make()

    await env.handle_send_to_api(a_group(0.0, 1.0, group_overrides=None, overrides=None))

    assert len(env.sent) == 1


async def test_pitfall_37_the_groups_file_is_opened_for_the_first_group_and_flushed_for_each(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    env = OldEnv.make(data_path_to_save_groups=str(path))
    assert not path.exists()

    sizes = []
    for _ in range(2):
        await env.handle_send_to_api(a_group(0.0, 1.0))
        sizes.append(len(path.read_text().splitlines()))

    assert sizes == [1, 2]
    await env.aclose()


async def test_pitfall_38_metrics_are_of_all_servers_true_and_bounded() -> None:
    manager, servers = a_pool("ab", rolling_buffer_length=3)
    for server in servers:
        for _ in range(5):
            await server.chat_completion(messages=[])

    metrics = await server_metrics(servers)
    await manager.close()

    assert {name.split("/")[1].split("_request")[0] for name in metrics if "request_time" in name} == {
        "server_0",
        "server_1",
    }
    assert [len(server.request_timings) for server in servers] == [3, 3]
    lengths = length_metrics(list(range(1, 101)), max_token_len=1000)
    assert lengths["train/completion_lengths_percentile_95_tokens"] == pytest.approx(95.05)


def test_pitfall_39_rewards_are_found_by_name_in_a_fresh_interpreter() -> None:
    code = "from atroposlib.envs.reward_fns import registry; print(type(registry.create('r1')).__name__)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert (done.stdout.strip(), done.returncode) == ("R1Reward", 0), done.stderr


def test_pitfall_39_weights_count_in_a_combination_unless_told_otherwise() -> None:
    parts = [{"type": "format", "weight": 3.0}, {"type": "format", "weight": 1.0}]
    text = ["<think>a</think>"]

    assert CombinedReward(parts)(text) == [4.0]
    assert CombinedReward(parts, ignore_weights=True)(text) == [2.0]
    assert registry.create({"type": "combined", "rewards": parts})(text) == [4.0]


def test_pitfall_40_a_restarted_environment_finds_its_newest_state(tmp_path: Path) -> None:
    def at(step: int, prepend: str) -> Any:
        env = OldEnv.make()
        env.checkpoint_dir, env.curr_step, env.wandb_prepend = str(tmp_path), step, prepend
        return env

    for step in (10, 20, 30):
        at(step, "old_0").save_checkpoint(step, {"position": step})
    env = at(25, "old_1")

    env.load_checkpoint()

    assert env.position == 20


async def test_pitfall_41_an_environment_says_goodbye() -> None:
    env, server, left = counting(), FakeRolloutServer(batch=2, steps=1), []

    async def farewell(info: Any) -> None:
        left.append(info.env_id)

    await run(env, server, farewell=farewell)

    assert left == [env.env_id]
    assert server.tickets == set(), "and gives its places back"


# Distillation


class Teacher(OldEnv, TeacherDistillationEnv):
    """First parent with four arguments, as the bundled GSM8K environment."""

    env_config_cls = TeacherDistillationConfig  # type: ignore[assignment]


async def test_pitfall_42_an_environment_with_a_teacher_starts_and_its_columns_reach_the_wire(
    tokenizer_name: str,
) -> None:
    async with MockInferenceServer() as teacher:
        config = TeacherDistillationConfig(
            teacher_enabled=True, teacher_top_k=2, tokenizer_name=tokenizer_name, group_size=2, use_wandb=False
        )
        servers = [APIServerConfig(base_url=teacher.url, server_type="vllm", tokenizer_name=tokenizer_name)]
        env = build_env(Teacher, config, [APIServerConfig(base_url=NOWHERE)], {"teacher": servers})
        await env.handle_send_to_api(a_group(0.0, 1.0))
        await env.aclose()

    [group] = env.sent
    assert [len(row) for row in group["distill_token_ids"]] == [4, 4]
    columns = wire_group(group, group_id="g", env_id=0, run_id="r", ticket=None, origins={}, fallback_version=0)
    [arrived] = decode_groups(encode_group(columns))
    assert arrived.distill_logprobs is not None
    assert arrived.distill_logprobs.shape[0] == 8


# The trainer


def test_pitfall_43_groups_without_logprobs_train_with_their_own_advantages_and_no_padding() -> None:
    pytest.importorskip("torch")
    from trainer.batches.micro_batch import share_of_rank
    from trainer.batches.step_batch import build_step_batch

    group = a_group(0.0, 1.0, length=4, advantages=[[0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 5.0, 6.0]])
    columns = wire_group(group, group_id="g", env_id=0, run_id="r", ticket=None, origins={}, fallback_version=0)
    batch = build_step_batch(0, [columns], advantage_scale="none", overlong="mask", temperature=1.0)
    share = share_of_rank(
        batch, rank=0, ranks=1, max_tokens=64, hidden_size=16, aggregation="token_mean", max_completion_length=None,
        shares_prompts=False,
    )  # fmt: skip

    [micro] = share.micro_batches
    assert not micro.has_inference_logprobs_M.any()
    assert sorted(micro.advantages_M.tolist()) == [3.0, 4.0, 5.0, 6.0]
    assert micro.input_ids_1T.shape[1] == 8, "two sequences of four, and nothing between"
    assert sorted(set(micro.segments_1T[0].tolist())) == [0, 1], "which do not see each other"


# Supervised data, graders


async def test_pitfall_44_supervised_groups_of_any_size_pass_with_flat_advantages() -> None:
    env = OldEnv.make(group_size=8, inference_weight=-1.0)
    group = a_group(0.0, advantages=[1.0], overrides=[{"sft": True}])

    await env.handle_send_to_api(group)
    columns = wire_group(group, group_id="g", env_id=0, run_id="r", ticket=None, origins={}, fallback_version=0)

    assert OpenaiConfig is APIServerConfig
    assert len(env.sent) == 1
    assert columns.advantages is not None
    assert columns.advantages.tolist() == [1.0] * 4


async def test_pitfall_44_a_weight_of_minus_one_registers() -> None:
    server = FakeRolloutServer(batch=2, steps=1)

    await run(counting(inference_weight=-1.0), server)

    assert server.registrations[0].weight == 0.0


async def test_pitfall_46_a_grader_that_blocks_holds_up_nobody() -> None:
    env, loop_ran = OldEnv.make(), threading.Event()
    grading = asyncio.create_task(env.run_blocking(loop_ran.wait, 5.0))

    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.01, loop_ran.set)

    assert await grading is True, "the loop set it while the grader waited"
    await env.aclose()
