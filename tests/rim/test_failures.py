"""What goes wrong with judges: it is repaired, retried, then left out; it is never paid 0."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Collection
from statistics import fmean
from typing import Any

import pytest

from atroposlib.rim import RIMConfig, RIMReward
from atroposlib.rim.asking import JudgeCall, JudgeReply
from atroposlib.rim.questions import backoff_s
from tests.rim.judges import Asked, Script, ScriptedJudge, a_trajectory, verdict

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
    async with ScriptedJudge(lambda asked: verdict({"process": 0.6, "helpfulness": 0.8}[asked.judge])) as judge:
        [both], _ = await scored(judge)
    async with ScriptedJudge(lambda asked: 500 if asked.judge == "process" else verdict(0.8)) as judge:
        [result], metrics = await scored(judge)

    assert both.score == pytest.approx(0.7)
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


# Ten percent fail: helpfulness and process on twenty trajectories at three temperatures are 120 samples

TWENTY = [a_trajectory(student_answer=f"<{i}>", student_trace=f"<{i}>") for i in range(20)]
TEMPERATURES = (0.2, 0.5, 0.8)
DEAD = {
    (judge, number, TEMPERATURES[number // 3 % 3])
    for judge, first in (("helpfulness", 0), ("process", 1))
    for number in range(first, 18, 3)
}
"""12 samples, never two of one judgement."""
FAILURES = ["babble", 500, 429]


def said(judge: str, number: int, temperature: float) -> tuple[float, float]:
    """Score and uncertainty. The samples of a judgement all differ, but not so much that the large model is asked."""
    nth = TEMPERATURES.index(temperature)
    score = {"helpfulness": 0.5, "process": 0.7}[judge] + (number % 10) / 100 + nth / 20
    return round(score, 2), 0.05 + (nth + number) % 3 / 10


def picked(judge: str, number: int, *, dead: Collection[tuple[str, int, float]] = ()) -> float:
    """Temperature of the least uncertain of the samples that live."""
    alive = [temperature for temperature in TEMPERATURES if (judge, number, temperature) not in dead]
    return min(alive, key=lambda temperature: said(judge, number, temperature)[1])


def sample_of(asked: Asked) -> tuple[str, int, float]:
    return asked.judge, next(i for i in range(20) if f"<{i}>" in asked.prompt), asked.temperature


def well(asked: Asked) -> Any:
    return verdict(*said(*sample_of(asked)))


async def scores_of_twenty(script: Script) -> list[float | None]:
    async with ScriptedJudge(script) as judge:
        results, _ = await scored(judge, *TWENTY)
    return [result.score for result in results]


@pytest.mark.parametrize("failure", FAILURES)
async def test_ten_percent_failing_calls_that_recover_within_the_retries_change_no_score(failure: Any) -> None:
    def flaky(asked: Asked) -> Any:
        fails = zlib.crc32(f"{asked.prompt} {asked.temperature}".encode()) % 10 == 0
        return failure if fails and not asked.is_repair and asked.nth < 2 else well(asked)

    assert await scores_of_twenty(flaky) == await scores_of_twenty(well)


@pytest.mark.parametrize("failure", FAILURES)
async def test_ten_percent_dead_samples_change_a_score_only_where_the_picked_one_died_and_the_next_best_is_paid(
    failure: Any,
) -> None:
    def partly_dead(asked: Asked) -> Any:
        return failure if sample_of(asked) in DEAD else well(asked)

    before, after = await scores_of_twenty(well), await scores_of_twenty(partly_dead)

    judges = ("helpfulness", "process")
    lost_its_pick = {i for i in range(20) if any((judge, i, picked(judge, i)) in DEAD for judge in judges)}
    expected = [fmean(said(judge, i, picked(judge, i, dead=DEAD))[0] for judge in judges) for i in range(20)]
    assert (len(DEAD), len(lost_its_pick)) == (12, 4)
    assert after == pytest.approx(expected)
    assert {i for i in range(20) if after[i] != before[i]} == lost_its_pick


async def test_a_dead_sample_takes_its_disagreement_along() -> None:
    scores = {0.2: 0.95, 0.5: 0.5, 0.8: 0.8, 0.3: 0.6}

    def outlier_dies(asked: Asked) -> Any:
        return 500 if asked.temperature == 0.5 else verdict(scores[asked.temperature])

    async with ScriptedJudge(lambda asked: verdict(scores[asked.temperature])) as judge:
        [decided], _ = await scored(judge, **ACCURACY)
    async with ScriptedJudge(outlier_dies) as judge:
        [left], _ = await scored(judge, **ACCURACY)

    assert (decided.score, decided.escalations) == (0.6, 1)
    assert (left.score, left.escalations) == (0.95, 0)


@pytest.mark.parametrize("failure", FAILURES)
async def test_trajectories_that_nobody_can_judge_have_no_score_and_the_others_keep_theirs(failure: Any) -> None:
    def dead_for_two(asked: Asked) -> Any:
        return failure if sample_of(asked)[1] % 10 == 0 else well(asked)

    before, after = await scores_of_twenty(well), await scores_of_twenty(dead_for_two)

    assert after == [None if i % 10 == 0 else before[i] for i in range(20)]
