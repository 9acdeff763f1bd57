"""Judges that fail too often stop the scoring: it is said, nobody is asked, and it goes on when they are well."""

from __future__ import annotations

import asyncio
import logging

import pytest

from atroposlib.errors import JudgesFailingError, RolloutError
from atroposlib.rim import RIMConfig, RIMReward
from atroposlib.rim.asking import JudgeCall, JudgeReply
from atroposlib.rim.reward import LOOK_AGAIN_S
from tests.rim.judges import ScriptedJudge, a_trajectory, verdict
from tests.rim.virtual_time import run_in_virtual_time

ACCURACY = {"active_judges": {"accuracy": True}}
GUIDED = a_trajectory()


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


async def test_that_scoring_stopped_and_goes_on_is_said_once_each_and_is_in_the_figures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, figures = Clock(), []
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge, await stopped(judge, clock) as reward:
        for _ in range(2):
            figures.append(reward.take_metrics()["rim/stopped"])
            with pytest.raises(JudgesFailingError):
                await reward.score([GUIDED])
        clock.now = 60.0
        for _ in range(2):
            await reward.score([GUIDED])
            figures.append(reward.take_metrics()["rim/stopped"])

    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "scoring is stopped: judges gave no score in 4 of the last 4" in caplog.messages[0]
    assert caplog.messages[1] == "scoring goes on: the judges answer again"
    assert figures == [1.0, 1.0, 0.0, 0.0]


async def test_a_stop_that_is_over_before_the_figures_are_taken_is_in_them() -> None:
    clock = Clock()
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge, await stopped(judge, clock) as reward:
        clock.now = 60.0
        await reward.score([GUIDED])

        assert [reward.take_metrics()["rim/stopped"] for _ in range(2)] == [1.0, 0.0]


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


def test_of_many_that_wait_for_the_judges_one_tries_and_the_others_learn_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    n_asked, is_well = 0, False

    async def ask(call: JudgeCall) -> JudgeReply:
        nonlocal n_asked
        n_asked += 1
        if not is_well:
            raise RolloutError("no")
        return JudgeReply('{"score": 0.8, "uncertainty": 0.1}')

    async def five_wait() -> int:
        nonlocal is_well
        over = ACCURACY | {"breaker": {"window": 4, "pause_s": 60.0}, "models": {"small_model": "any"}}
        reward = RIMReward(RIMConfig.read(over), ask=ask, clock=asyncio.get_running_loop().time)
        await reward.score([a_trajectory(student_answer=str(i)) for i in range(4)])
        asked, is_well = n_asked, True
        await asyncio.gather(*(reward.wait_until_well(deadline_s=100) for _ in range(5)))
        return n_asked - asked

    n_tries, seconds = run_in_virtual_time(five_wait())

    assert n_tries == 1
    assert 60.0 <= seconds <= 60.0 + LOOK_AGAIN_S
    assert caplog.messages.count("scoring goes on: the judges answer again") == 1


async def test_waiting_for_the_judges_ends() -> None:
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge, await stopped(judge, Clock()) as reward:
        with pytest.raises(JudgesFailingError, match=r"did not recover within 0\.01 s"):
            await reward.wait_until_well(deadline_s=0.01)


async def test_waiting_for_judges_that_are_well_returns_at_once() -> None:
    async with ScriptedJudge(lambda asked: verdict(0.8)) as judge, RIMReward(judge.config()) as reward:
        await reward.wait_until_well(deadline_s=10)

    assert judge.calls == []
