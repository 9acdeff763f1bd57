"""The environment of local mode, against a mock engine."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.errors import RolloutError
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from atroposlib.testing.mock_inference import MockInferenceServer
from atroposlib.type_definitions import MASKED
from trainer.errors import RewardFunctionError
from trainer.local.environment import FunctionEnv, FunctionEnvConfig
from trainer.local.rewards import RewardFunctions

TOKENIZER = byte_tokenizer()
QUESTION = [{"role": "user", "content": "2 + 3"}]


@pytest.fixture
async def engine() -> AsyncIterator[MockInferenceServer]:
    """Says 0, 1, 2, ... to one request for several completions."""
    async with MockInferenceServer(lambda prompt, index: TOKENIZER.encode(f"{index}<|im_end|>")) as server:
        yield server


def make_env(engine: MockInferenceServer, reward: Any, rows: list[dict[str, Any]], **options: Any) -> FunctionEnv:
    return FunctionEnv(
        FunctionEnvConfig(group_size=4, tokenizer_name=None, use_wandb=False, blocking_workers=1, **options),
        [APIServerConfig(base_url=engine.url, model_name="mock", server_type="vllm")],
        tokenizer=TOKENIZER,
        rows=rows,
        eval_rows=rows,
        rewards=RewardFunctions(reward),
    )


def as_number(completions: list[Any], **_: Any) -> list[float]:
    return [float(text if isinstance(text, str) else text[0]["content"]) for text in completions]


@pytest.mark.parametrize("prompt", ["2 + 3 =", QUESTION, [*QUESTION, {"role": "assistant", "content": "The sum is "}]])
async def test_a_group_has_the_tokens_that_were_sampled_and_the_rewards_of_their_text(
    engine: MockInferenceServer, prompt: Any
) -> None:
    env = make_env(engine, as_number, [{"prompt": prompt}])

    group, _ = await env.collect_trajectories(await env.get_next_item())
    await env.aclose()

    assert group is not None
    assert group["scores"] == [0.0, 1.0, 2.0, 3.0]
    sampled = [[token for token in row if token != MASKED] for row in group["masks"]]
    assert [TOKENIZER.decode(ids) for ids in sampled] == [f"{i}<|im_end|>" for i in range(4)]
    text = TOKENIZER.decode(group["tokens"][1])
    if isinstance(prompt, str):
        assert text == "2 + 3 =1<|im_end|>"
    else:
        begun = prompt[1]["content"] if len(prompt) > 1 else ""
        assert text.endswith(f"<|im_start|>assistant\n{begun}1<|im_end|>")
        assert group["messages"] is not None
        assert group["messages"][1][-1] == {"role": "assistant", "content": f"{begun}1"}


@pytest.mark.parametrize("prompt", ["2 + 3 =", QUESTION])
async def test_reward_functions_see_the_shapes_that_they_know(engine: MockInferenceServer, prompt: Any) -> None:
    seen: dict[str, Any] = {}

    def reward(**columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * 4

    env = make_env(engine, reward, [{"prompt": prompt, "answer": 5}])
    await env.collect_trajectories(await env.get_next_item())
    await env.aclose()

    assert seen["prompts"] == [prompt] * 4
    assert seen["answer"] == [5] * 4
    assert seen["completion_ids"] == [TOKENIZER.encode(f"{i}<|im_end|>") for i in range(4)]
    texts = [str(i) for i in range(4)]
    assert seen["completions"] == (
        texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]
    )


async def test_a_completion_that_cannot_be_judged_is_replaced(engine: MockInferenceServer) -> None:
    def only_small(completions: list[str], **_: Any) -> list[float | None]:
        return [None if int(text) > 1 else float(text) for text in completions]

    env = make_env(engine, only_small, [{"prompt": "?"}])
    group, _ = await env.collect_trajectories(await env.get_next_item())
    await env.aclose()

    assert group is not None
    assert group["scores"] == [0.0, 1.0, 0.0, 1.0]
    assert [request["sampling_params"]["n"] for request in engine.requests] == [4, 2]


async def test_a_row_that_cannot_be_judged_makes_no_group(engine: MockInferenceServer) -> None:
    env = make_env(engine, lambda completions: [None] * len(completions), [{"prompt": "?"}])
    group, _ = await env.collect_trajectories(await env.get_next_item())
    evaluation = await env.evaluate()
    await env.aclose()

    assert group is None
    assert evaluation == {"heldout_size": 0}


async def test_a_buggy_reward_function_is_an_error_and_no_reward(engine: MockInferenceServer) -> None:
    env = make_env(engine, lambda completions: [1.0], [{"prompt": "?"}])
    with pytest.raises(RewardFunctionError, match="1 rewards for 4"):
        await env.collect_trajectories(await env.get_next_item())
    await env.aclose()


async def test_a_function_that_takes_too_long_is_named_without_the_prompts(engine: MockInferenceServer) -> None:
    release = threading.Event()

    def hangs(completions: list[str]) -> list[float]:
        release.wait(10.0)
        return [0.0] * len(completions)

    env = make_env(engine, hangs, [{"prompt": "a secret"}], reward_timeout_s=0.01)
    with pytest.raises(RolloutError, match=r"hangs took longer than 0\.01 s; raise reward_timeout_s") as failure:
        await env.collect_trajectories(await env.get_next_item())
    release.set()
    await env.aclose()

    assert "secret" not in str(failure.value)


async def test_evaluation_takes_one_greedy_answer_a_row(engine: MockInferenceServer, tmp_path: Any) -> None:
    rows = [{"prompt": "a", "worth": 1.0}, {"prompt": "b", "worth": 0.5}]
    env = make_env(engine, lambda completions, worth: worth, rows, data_dir_to_save_evals=str(tmp_path), max_tokens=7)

    metrics = await env.evaluate()
    await env.aclose()

    assert metrics == {"heldout_size": 2, "heldout_reward": 0.75}
    asked = [request["sampling_params"] for request in engine.requests]
    assert [(one["n"], one["temperature"], one["max_tokens"]) for one in asked] == [(1, 0.0, 7)] * 2
    assert (tmp_path / "metrics.json").exists()


async def test_the_place_in_the_data_set_survives_a_checkpoint(engine: MockInferenceServer, tmp_path: Any) -> None:
    rows = [{"prompt": str(i)} for i in range(20)]
    env, resumed = (make_env(engine, as_number, rows, run_dir=tmp_path) for _ in range(2))
    taken = [await env.get_next_item() for _ in range(5)]
    env.save_checkpoint(1)
    following = await env.get_next_item()

    resumed.curr_step = 1
    resumed.load_checkpoint()

    assert await resumed.get_next_item() == following
    assert following not in taken
    await env.aclose()
    await resumed.aclose()


async def test_each_reward_function_has_its_mean(engine: MockInferenceServer) -> None:
    logged: list[dict[str, Any]] = []
    env = make_env(engine, [as_number, as_number, lambda completions: [None, None, 4.0, 6.0]], [{"prompt": "?"}])
    env.metrics_sink = logged.append

    await env.collect_trajectories(await env.get_next_item())
    await env.wandb_log()
    await env.aclose()

    means = {name: mean for name, mean in logged[0].items() if name.startswith("reward/")}
    assert means == {"reward/as_number": 1.5, "reward/as_number-2": 1.5, "reward/<lambda>": 5.0}
