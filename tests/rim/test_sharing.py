"""Equal questions that are in flight at once are asked once; the figures survive being taken meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from atroposlib.errors import ModelServerError
from atroposlib.rim import RIMConfig, RIMReward
from atroposlib.rim.asking import JudgeCall, JudgeReply
from atroposlib.rim.cache import VerdictCache
from atroposlib.rim.meter import Meter
from atroposlib.rim.questions import JudgeFailedError, Questions
from atroposlib.rim.result import RIMResult
from atroposlib.rim.slots import CallSlots
from tests.rim.judges import a_trajectory

CALL = JudgeCall("process", "p", 0.2)
GOOD = '{"score": 0.5, "uncertainty": 0.1}'


class HeldJudge:
    """Answers when it is let go."""

    def __init__(self, text: str = GOOD, *, fails: bool = False) -> None:
        self.text = text
        self.fails = fails
        self.calls: list[JudgeCall] = []
        self.asked = asyncio.Event()
        self.free = asyncio.Event()

    async def __call__(self, call: JudgeCall) -> JudgeReply:
        self.calls.append(call)
        self.asked.set()
        await self.free.wait()
        if self.fails:
            raise ModelServerError("it broke")
        return JudgeReply(self.text, 100, 10)


def config(**over: object) -> RIMConfig:
    return RIMConfig.read({"models": {"small_model": "http://a/v1#s"}, "judge_retries": 0, **over})


def questions(judge: HeldJudge, meter: Meter | None = None) -> Questions:
    return Questions(config(), judge, cache=VerdictCache(10), meter=meter or Meter())


async def test_equal_questions_at_once_are_asked_once() -> None:
    judge, meter = HeldJudge(), Meter()
    asking = questions(judge, meter)
    tasks = [asyncio.create_task(asking.verdict(CALL, CallSlots(8))) for _ in range(3)]
    await judge.asked.wait()
    judge.free.set()

    assert {verdict.score for verdict in await asyncio.gather(*tasks)} == {0.5}
    assert len(judge.calls) == 1
    assert meter.take()["rim/cache_hits"] == 2


async def test_who_waits_shares_the_failure_and_who_comes_later_asks_again() -> None:
    judge = HeldJudge(fails=True)
    asking = questions(judge)
    tasks = [asyncio.create_task(asking.verdict(CALL, CallSlots(8))) for _ in range(3)]
    await judge.asked.wait()
    judge.free.set()

    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [JudgeFailedError] * 3
    assert len(judge.calls) == 1
    judge.fails = False
    assert (await asking.verdict(CALL, CallSlots(8))).score == 0.5


async def test_where_the_one_who_asked_is_cancelled_the_next_one_asks() -> None:
    judge = HeldJudge()
    asking = questions(judge)
    owner, *others = [asyncio.create_task(asking.verdict(CALL, CallSlots(8))) for _ in range(3)]
    await judge.asked.wait()
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    judge.free.set()

    assert [verdict.score for verdict in await asyncio.gather(*others)] == [0.5, 0.5]
    assert len(judge.calls) == 2


async def test_one_who_waits_may_be_cancelled_alone() -> None:
    judge = HeldJudge()
    asking = questions(judge)
    owner, waiter = [asyncio.create_task(asking.verdict(CALL, CallSlots(8))) for _ in range(2)]
    await judge.asked.wait()
    waiter.cancel()
    judge.free.set()

    assert (await owner).score == 0.5
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_a_temperature_that_is_named_twice_is_asked_twice() -> None:
    judge = HeldJudge()
    judge.free.set()
    over = {"temperatures": [0.7, 0.7, 0.2], "active_judges": {"accuracy": True}}
    async with RIMReward(config(**over), ask=judge) as reward:
        [result] = await reward.score([a_trajectory()])

    assert result.score == 0.5
    assert sorted((call.temperature, call.nth) for call in judge.calls) == [(0.2, 0), (0.7, 0), (0.7, 1)]


async def test_a_call_that_ends_after_the_figures_were_taken_is_in_the_next_ones() -> None:
    judge, meter = HeldJudge(), Meter()
    task = asyncio.create_task(questions(judge, meter).verdict(CALL, CallSlots(8)))
    await judge.asked.wait()
    first = meter.take()
    judge.free.set()
    await task
    second = meter.take()

    assert (first["rim/calls"], first["rim/completion_tokens"]) == (1, 0)
    assert (second["rim/calls"], second["rim/completion_tokens"]) == (0, 10)


def test_the_mean_score_of_a_judge_needs_no_list_of_them() -> None:
    meter = Meter()
    meter.add(RIMResult(score, {"process": score}) for score in (0.25, 0.5, 0.75))

    assert meter.take()["rim_rewards/process"] == 0.5
    assert "rim_rewards/process" not in meter.take()
