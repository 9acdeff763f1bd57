"""What a judge's server answers is read, whatever of it is missing or of another type."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.rim import RIMReward
from tests.rim.judges import ScriptedJudge, a_trajectory

TEXT = '{"score": 0.5, "uncertainty": 0.1}'


class FixedAnswer(ScriptedJudge):
    """Answers every question with one body."""

    def __init__(self, answer: Any) -> None:
        super().__init__(lambda asked: None)
        self.answer = answer

    async def _reply(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, self.answer


def body(content: Any, **over: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}}], **over}


@pytest.mark.parametrize(
    "answer",
    [
        body([{"type": "text", "text": TEXT[:9]}, {"type": "text", "text": TEXT[9:]}]),
        body(TEXT, usage=[1, 2]),
        body(TEXT, usage=None),
        body(TEXT, usage={"prompt_tokens": "many"}),
    ],
)
async def test_parts_are_one_text_and_a_usage_that_is_none_counts_nothing(answer: Any) -> None:
    async with FixedAnswer(answer) as judge, RIMReward(judge.config(active_judges={"accuracy": True})) as reward:
        [result] = await reward.score([a_trajectory()])
        metrics = reward.take_metrics()

    assert result.score == 0.5
    assert metrics["rim/prompt_tokens"] == 0


@pytest.mark.parametrize("answer", [[], {}, {"choices": []}, {"choices": [{"message": "hi"}]}, body(None), body(3)])
async def test_an_answer_without_a_text_is_a_failure_of_the_judge(answer: Any) -> None:
    over: dict[str, Any] = {"active_judges": {"accuracy": True}, "judge_retries": 0, "temperatures": [0.2]}
    async with FixedAnswer(answer) as judge, RIMReward(judge.config(**over)) as reward:
        [result] = await reward.score([a_trajectory()])

    assert result.score is None
    assert result.failures == 1
