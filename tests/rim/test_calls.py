"""RIM called outside an event loop: the documented shapes, and the registry of reward functions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from atroposlib.envs.reward_fns import registry
from atroposlib.errors import ConfigError, RolloutError
from atroposlib.rim import RIMReward
from atroposlib.rim.reward_function import RIMRewardFunction
from tests.rim.judges import Asked, ScriptedJudge, verdict

START_S = 10.0


def by_answer(asked: Asked) -> Any:
    if "unjudgeable" in asked.prompt:
        return 400
    return verdict(0.9 if "good" in asked.prompt else 0.2)


@pytest.fixture
def judge() -> Iterator[ScriptedJudge]:
    """On a loop of its own, since these callers block theirs."""
    server = ScriptedJudge(by_answer)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(START_S)
        yield server
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(START_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(START_S)
        loop.close()


def test_a_call_returns_a_reward_for_each_completion(judge: ScriptedJudge) -> None:
    reward = RIMReward(judge.config(active_judges={"accuracy": True}))

    rewards = reward(["q", "q", "q"], ["good", "bad", "unjudgeable"], ground_truths=["g", "g", "g"])

    assert rewards == [0.9, 0.2, None]


def test_the_information_of_a_call(judge: ScriptedJudge) -> None:
    reward = RIMReward(judge.config(active_judges={"accuracy": True}))

    rewards, info = reward(["q"], ["good"], return_info_dict=True, ground_truth="g")
    rewards_again, info_again, tensors = reward(
        ["q"], ["good"], return_info_dict=True, return_raw_tensors=True, ground_truths=["g"]
    )

    assert (rewards, info) == (rewards_again, info_again)
    assert tensors == [{}]
    assert reward(["q"], ["good"], return_raw_tensors=True, ground_truths=["g"]) == rewards
    assert info[0]["rewards"] == {"accuracy": 0.9}
    assert info[0]["explanations"] == {"accuracy": "because of 0.9"}
    assert info[0]["structured_reward"]["score"] == 0.9


def test_a_reward_is_called_again_and_again_from_several_threads(judge: ScriptedJudge) -> None:
    reward = RIMReward(judge.config(temperatures=[0.2]))
    found: list[Any] = []

    def call(i: int) -> None:
        found.extend(
            reward(["q", "q"], [f"good {i}", f"bad {i}"], teacher_traces=["t", "t"], student_traces=["good", "bad"])
        )

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(START_S)

    # Helpfulness reads the answer, process the work: both say the same.
    assert found == pytest.approx([0.9, 0.2] * 4)


def test_one_sample_in_full(judge: ScriptedJudge) -> None:
    found = RIMReward(judge.config(active_judges={"accuracy": True})).evaluate("q", "good", ground_truth="g")

    assert found["score"] == found["reward"] == 0.9
    assert found["judge_scores"] == {"accuracy": 0.9}
    assert found["judge_explanations"] == {"accuracy": "because of 0.9"}
    assert found["rationale"] == "accuracy: because of 0.9"
    assert found["extra"]["structured_reward"]["judges"][0]["identifier"] == "accuracy"
    assert (found["extra"]["escalations"], found["extra"]["failures"], found["extra"]["reasons"]) == (0, 0, [])


async def test_a_call_in_an_event_loop_says_what_to_await() -> None:
    async with ScriptedJudge(by_answer) as judge:
        reward = RIMReward(judge.config())
        with pytest.raises(ConfigError, match=r"await its score\(\)"):
            reward(["q"], ["good"])
        with pytest.raises(ConfigError, match=r"await its score\(\)"):
            reward.evaluate("q", "good")


def test_the_registry_s_reward_pays_what_the_judges_say(judge: ScriptedJudge) -> None:
    models = {"small_model": f"{judge.url}#small"}
    reward = registry.create({"type": "rim", "weight": 2.0, "params": {"rim": {"models": models}, "preset": "runtime"}})

    assert isinstance(reward, RIMRewardFunction)
    assert reward.name == "interpretation_teaching"
    assert reward.reward.config.judges == ("accuracy", "helpfulness", "process", "diagnostic")
    paid = reward(["good", "good"], prompts="q", ground_truth="g", teacher_trace="think", student_plan="a good one")
    assert paid == pytest.approx([1.8, 1.8])


def test_a_completion_that_nobody_can_judge_is_no_zero(judge: ScriptedJudge) -> None:
    reward = RIMRewardFunction({"models": {"small_model": f"{judge.url}#small"}, "active_judges": {"accuracy": True}})

    with pytest.raises(RolloutError, match=r"no judge could score a completion: .*400"):
        reward(["good", "unjudgeable"], prompts=["q", "q"], ground_truth="g")


def test_a_reward_without_prompts_says_what_it_needs(judge: ScriptedJudge) -> None:
    reward = RIMRewardFunction(judge.config())

    with pytest.raises(ConfigError, match="prompts="):
        reward(["good"])


def test_why_nobody_was_asked_is_said(judge: ScriptedJudge) -> None:
    reward = RIMRewardFunction({"models": {"small_model": f"{judge.url}#small"}, "active_judges": {"accuracy": True}})

    with pytest.raises(RolloutError, match="accuracy: skipped, there is no ground truth"):
        reward(["good"], prompts="q")


def test_no_zero_is_paid_where_judges_fail(judge: ScriptedJudge) -> None:
    with pytest.raises(ConfigError, match="zero_on_error"):
        RIMRewardFunction(judge.config(), zero_on_error=True)


def test_the_figures_are_logged_where_there_is_a_logger(judge: ScriptedJudge) -> None:
    class Logger:
        def __init__(self) -> None:
            self.logged: dict[str, Any] = {}

        def log(self, metrics: dict[str, Any]) -> None:
            self.logged |= metrics

    reward = RIMRewardFunction(judge.config(active_judges={"accuracy": True}), weight=2.0)
    logger = Logger()
    reward.set_wandb_logger(logger)
    reward(["good"], prompts="q", ground_truth="g")

    assert logger.logged["rim_rewards/accuracy"] == 0.9
    assert logger.logged["rim_explanations/accuracy"] == "because of 0.9"
    assert logger.logged["reward/interpretation_teaching/mean_weighted"] == 1.8
    assert "rim_rewards/accuracy" not in reward.reward.take_metrics()
