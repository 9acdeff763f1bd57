"""SCRIPTED judge models over real HTTP: what they answer is a function of what they are asked. No model runs."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from atroposlib.rim import RIMConfig, Trajectory
from atroposlib.rim.config import JudgeName
from tests.envs.engine_fakes import FakeEngine, chat_answer

ROUTE = "POST /v1/chat/completions"
_OPENINGS = {
    "whether a final answer is right": "accuracy",
    "guidance helped a student": "helpfulness",
    "how a student worked": "process",
    "a first approach to a task": "diagnostic",
}
SHOWN: dict[JudgeName, set[str]] = {
    "accuracy": {"question", "student_answer", "ground_truth"},
    "helpfulness": {
        "question", "student_plan", "teacher_trace", "student_answer", "ground_truth", "student_baseline_answer",
    },
    "process": {"question", "ground_truth", "student_plan", "teacher_trace", "student_trace"},
    "diagnostic": {"question", "student_plan", "ground_truth"},
}  # fmt: skip
"""Fields that each judge reads."""


@dataclass(frozen=True)
class Asked:
    """A request that reached the server."""

    body: dict[str, Any]
    nth: int
    """How many requests with the same prompt and temperature came before."""

    @cached_property
    def prompt(self) -> str:
        return str(self.body["messages"][0]["content"])

    @property
    def judge(self) -> str:
        return next(name for opening, name in _OPENINGS.items() if opening in self.prompt)

    @property
    def temperature(self) -> float:
        return float(self.body["temperature"])

    @property
    def is_large(self) -> bool:
        return bool(self.body["model"] == "large")

    @property
    def is_repair(self) -> bool:
        return len(self.body["messages"]) > 1


Script: TypeAlias = Callable[[Asked], Any]
"""A dict becomes a JSON text, a text stays one, a number is an HTTP status; None: no answer, ever."""


class ScriptedJudge(FakeEngine):
    """``async with ScriptedJudge(script) as judge``; `judge.config(...)` points a RIMConfig at it.

    Args:
        holds_until: answers nobody before so many calls are in flight.
    """

    def __init__(self, script: Script, *, holds_until: int = 0) -> None:
        super().__init__({ROUTE: self._reply})
        self.script = script
        self.holds_until = holds_until
        self._is_full = asyncio.Event()
        self.calls: list[Asked] = []
        self._times_asked: Counter[str] = Counter()
        self.in_flight = 0
        self.max_in_flight = 0

    def config(self, **over: Any) -> RIMConfig:
        models = {"small_model": f"{self.url}#small", "large_model": f"{self.url}#large"}
        return RIMConfig.read({"models": models, "retry_backoff_s": 0.001, **over})

    async def _reply(self, body: dict[str, Any]) -> tuple[int, Any]:
        key = json.dumps([body["messages"], body["temperature"]])
        asked = Asked(body, self._times_asked[key])
        self._times_asked[key] += 1
        self.calls.append(asked)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            if self.in_flight >= self.holds_until:
                self._is_full.set()
            await self._is_full.wait()
            if self.holds_until:
                # One more than there should be gets time to arrive.
                await asyncio.sleep(0.01)
            answer = self.script(asked)
            if answer is None:
                await asyncio.Event().wait()
        finally:
            self.in_flight -= 1
        if isinstance(answer, int):
            return answer, {"error": {"message": "scripted failure"}}
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return 200, chat_answer(text) | {"usage": {"prompt_tokens": 100, "completion_tokens": 10}}


def verdict(score: float, uncertainty: float = 0.1, **over: Any) -> dict[str, Any]:
    return {
        "principles": [{"name": "right", "weight": 1.0, "description": "it is right"}],
        "score": score,
        "rationale": f"because of {score}",
        "uncertainty": uncertainty,
        **over,
    }


def a_trajectory(**over: str) -> Trajectory:
    return Trajectory(
        **{
            "question": "What is 2 + 2?",
            "student_answer": "four",
            "ground_truth": "4",
            "student_plan": "Count up from two.",
            "teacher_trace": "Use your fingers, one hand for each number.",
            "student_trace": "two and two make four",
            "student_baseline_answer": "five",
            **over,
        }
    )
