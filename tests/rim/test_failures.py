"""What goes wrong with judges: it is repaired, retried, then left out; it is never paid 0."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import pytest

from atroposlib.errors import JudgesFailingError
from atroposlib.rim import RIMConfig, RIMReward
from atroposlib.rim.asking import JudgeCall, JudgeReply
from atroposlib.rim.questions import backoff_s
from tests.rim.judges import Asked, ScriptedJudge, a_trajectory, verdict

ACCURACY = {"active_judges": {"accuracy": True}}
GUIDED = a_trajectory()


async def scored(judge: ScriptedJudge, *trajectories: Any, **over: Any) -> tuple[list[Any], dict[str, float]]:
    async with RIMReward(judge.config(**over)) as reward:
        results = await reward.score(trajectories or [GUIDED])
        return results, reward.take_metrics()


async def test_an_unreadable_answer_is_repaired_once() -> None:
    def at_second_try(asked: Asked) -> Any:
        return verdict(0.7) if asked.is_repair else "I like it: 7/10"

    async with ScriptedJudge(at_second_try) as judge:
        [result], metrics = await scored(judge, **ACCURACY)

    assert result.score == 0.7
    assert metrics["rim/repairs"] == 3
    repair = next(asked for asked in judge.calls if asked.is_repair)
    assert [message["role"] for message in repair.body["messages"]] == ["user", "assistant", "user"]
    assert repair.body["messages"][1]["content"] == "I like it: 7/10"
    assert 'no JSON object with a "score"' in repair.body["messages"][2]["content"]


async def test_a_sample_that_stays_unreadable_is_left_out() -> None:
    def one_babbles(asked: Asked) -> Any:
        return "no" if asked.temperature == 0.5 else verdict(0.8)

    async with ScriptedJudge(one_babbles) as judge:
        [result], _ = await scored(judge, **ACCURACY)

    assert (result.score, result.escalations, result.failures) == (0.8, 0, 0)
    assert [sample["temperature"] for sample in result.structured_reward["judges"][0]["samples"]] == [0.2, 0.8]
    assert len([asked for asked in judge.calls if asked.temperature == 0.5]) == 2


@pytest.mark.parametrize("answer", ["no", {"score": 0.0, "uncertainty": 1.0, "fallback": True}, 500])
async def test_where_the_small_model_says_nothing_the_large_one_decides(answer: Any) -> None:
    async with ScriptedJudge(lambda asked: verdict(0.6) if asked.is_large else answer) as judge:
        [result], _ = await scored(judge, **ACCURACY)

    assert (result.score, result.escalations, result.failures) == (0.6, 1, 0)
    assert result.structured_reward["judges"][0]["escalation_reason"] == "tier1_no_valid_samples"


async def test_a_judge_that_fails_on_both_models_abstains_and_the_mean_is_over_the_others() -> None:
    async with ScriptedJudge(lambda asked: 500 if asked.judge == "process" else verdict(0.8)) as judge:
        [result], metrics = await scored(judge)

    assert result.judge_scores == {"helpfulness": 0.8}
    assert (result.score, result.failures) == (0.8, 1)
    assert result.reasons[0].startswith("process: tier1_no_valid_samples, then the large model: no answer in 4 tries")
    failed = result.structured_reward["judges"][1]
    assert (failed["identifier"], failed["score"], failed["principles"]) == ("process", None, [])
    assert metrics["rim/failed_rate"] == 0.5


async def test_where_no_judge_is_left_there_is_no_score() -> None:
    async with ScriptedJudge(lambda asked: 500) as judge:
        [result], metrics = await scored(judge, a_trajectory(teacher_trace="Dear judge, hello."))

    assert result.score is None
    assert result.failures == 2
    assert metrics["rim/no_score_rate"] == 1.0
    assert not any(name.startswith("rim_rewards") for name in metrics)


async def test_without_a_large_model_doubt_is_an_abstention() -> None:
    async with ScriptedJudge(lambda asked: verdict(0.8, uncertainty=0.9)) as judge:
        [result], _ = await scored(judge, **ACCURACY, models={"small_model": f"{judge.url}#small"})

    assert result.score is None
    assert result.reasons == ["accuracy: tier1_uncertain: 0.9 > 0.3, and there is no large_model"]
    assert not any(asked.is_large for asked in judge.calls)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_busy_or_broken_server_is_asked_again(status: int) -> None:
    async with ScriptedJudge(lambda asked: status if asked.nth < 3 else verdict(0.8)) as judge:
        [result], metrics = await scored(judge, **ACCURACY, temperatures=[0.2])

    assert result.score == 0.8
    assert (metrics["rim/calls"], metrics["rim/retries"], metrics["rim/failed_calls"]) == (4, 3, 3)


@pytest.mark.parametrize("status", [400, 401, 404])
async def test_a_request_that_is_refused_is_not_repeated(status: int) -> None:
    async with ScriptedJudge(lambda asked: status) as judge:
        [result], metrics = await scored(judge, **ACCURACY, temperatures=[0.2])

    assert result.score is None
    assert metrics["rim/retries"] == 0
    assert len(judge.calls) == 2  # the small and the large model


def test_pauses_between_tries_double() -> None:
    assert [backoff_s(0.5, attempt, jitter=1.0) for attempt in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert backoff_s(0.5, 1, jitter=0.75) == 0.375


async def test_a_judge_that_never_answers_costs_its_time_and_no_more() -> None:
    async with ScriptedJudge(lambda asked: None) as judge:
        over = ACCURACY | {"judge_timeout": 0.05, "judge_retries": 0}
        [result], metrics = await scored(judge, **over, models={"small_model": f"{judge.url}#small"})

    assert result.score is None
    assert "limit 0.05 s" in result.reasons[0] or "judge_timeout, 0.05 s" in result.reasons[0]
    assert metrics["rim/failed_calls"] == 3


async def test_a_way_to_ask_that_hangs_is_given_up_too() -> None:
    async def hang(call: JudgeCall) -> JudgeReply:
        await asyncio.Event().wait()
        raise AssertionError

    config = RIMConfig.read({"models": {"small_model": "any"}, **ACCURACY, "judge_timeout": 0.02, "judge_retries": 0})
    async with RIMReward(config, ask=hang) as reward:
        [result] = await reward.score([GUIDED])

    assert "no answer within judge_timeout, 0.02 s" in result.reasons[0]


async def test_numbers_outside_the_range_are_clamped_and_counted() -> None:
    async with ScriptedJudge(lambda asked: verdict(1.5)) as judge:
        [result], metrics = await scored(judge, **ACCURACY)

    assert result.score == 1.0
    assert metrics["rim/clamped"] == 3


async def test_an_answer_without_choices_is_a_failure_of_the_server() -> None:
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge:
        judge.routes = {"POST /v1/chat/completions": lambda body: (200, {"choices": []})}
        [result], _ = await scored(judge, **ACCURACY)

    assert "an answer without choices" in result.reasons[0]


@pytest.mark.parametrize("failure", ["babble", 500, 429])
async def test_ten_percent_failing_judges_change_no_score(failure: Any) -> None:
    trajectories = [a_trajectory(student_answer=f"<{i}>", student_trace=f"<{i}>") for i in range(20)]

    def by_number(asked: Asked) -> Any:
        number = next(i for i in range(20) if f"<{i}>" in asked.prompt)
        return verdict((number % 10) / 10)

    def flaky(asked: Asked) -> Any:
        fails = zlib.crc32(f"{asked.prompt} {asked.temperature}".encode()) % 10 == 0
        return failure if fails and not asked.is_repair and asked.nth < 2 else by_number(asked)

    def dead_for_some(asked: Asked) -> Any:
        return failure if any(f"<{i}>" in asked.prompt for i in range(0, 20, 10)) else by_number(asked)

    scores = []
    for script in (by_number, flaky, dead_for_some):
        async with ScriptedJudge(script) as judge:
            results, _ = await scored(judge, *trajectories)
        scores.append([result.score for result in results])

    well, repaired, partly = scores
    assert repaired == well
    assert [score for score in partly if score is not None] == [score for i, score in enumerate(well) if i % 10]
    assert [partly[i] for i in range(0, 20, 10)] == [None] * 2


# Too many failures


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def stopped(judge: ScriptedJudge, clock: Clock) -> RIMReward:
    """A reward whose judges have just failed too often; they are well again."""
    script, judge.script = judge.script, lambda asked: 400
    over = ACCURACY | {"temperatures": [0.2], "breaker": {"window": 4, "pause_s": 60.0}}
    reward = RIMReward(judge.config(**over), clock=clock)
    await reward.score([a_trajectory(student_answer=str(i)) for i in range(4)])
    judge.script = script
    return reward


async def test_scoring_stops_when_judges_fail_too_often_and_asks_nobody() -> None:
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge, await stopped(judge, Clock()) as reward:
        asked = len(judge.calls)
        with pytest.raises(JudgesFailingError, match=r"4 of the last 4.*accuracy: .*400.*another 60 s"):
            await reward.score([GUIDED])

    assert len(judge.calls) == asked


async def test_after_the_pause_scoring_goes_on_if_the_judges_are_well() -> None:
    clock = Clock()
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge, await stopped(judge, clock) as reward:
        clock.now = 60.0
        [result] = await reward.score([GUIDED])

    assert result.score == 0.8


async def test_after_the_pause_one_group_tries_and_the_others_wait_again() -> None:
    clock = Clock()
    async with ScriptedJudge(lambda asked: 503) as judge, await stopped(judge, clock) as reward:
        clock.now = 60.0
        asked = len(judge.calls)
        results = await asyncio.gather(*(reward.score([GUIDED]) for _ in range(5)), return_exceptions=True)

        assert [type(result) for result in results] == [JudgesFailingError] * 5
        assert len(judge.calls) - asked == 8  # one self-test: two models, four tries each
        assert reward.breaker.pause_left_s() == 60.0


async def test_an_environment_can_wait_for_the_judges() -> None:
    clock = Clock()
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge, await stopped(judge, clock) as reward:
        clock.now = 60.0
        await reward.wait_until_well(deadline_s=10)
        [result] = await reward.score([GUIDED])

    assert result.score == 0.8


async def test_waiting_for_the_judges_ends() -> None:
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge, await stopped(judge, Clock()) as reward:
        with pytest.raises(JudgesFailingError, match=r"did not recover within 0\.01 s"):
            await reward.wait_until_well(deadline_s=0.01)


async def test_waiting_for_judges_that_are_well_returns_at_once() -> None:
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge, RIMReward(judge.config()) as reward:
        await reward.wait_until_well(deadline_s=10)

    assert judge.calls == []
