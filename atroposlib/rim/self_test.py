"""Asks every judge model about a known case before the first rollout depends on it."""

from __future__ import annotations

import asyncio

from atroposlib.errors import ConfigError
from atroposlib.rim.asking import JudgeCall
from atroposlib.rim.config import RIMConfig
from atroposlib.rim.prompts import arbiter_prompt, judge_prompt
from atroposlib.rim.questions import JudgeFailedError, Questions
from atroposlib.rim.slots import CallSlots
from atroposlib.rim.trajectory import Trajectory

FIXTURE = Trajectory(
    question="What is 12 + 30?",
    student_answer="42",
    ground_truth="42",
    student_plan="Add the tens, then the ones.",
    teacher_trace="Start with the tens: 10 + 30. What is left to add?",
    student_trace="10 + 30 is 40, and 2 more is 42.",
    student_baseline_answer="32",
)
"""The case. Its scores do not matter, only that there are some."""


async def self_test(config: RIMConfig, questions: Questions) -> None:
    """Ask each active judge of the small model, and the large model once; nothing is taken from the cache.

    Raises:
        ConfigError: a judge gave no verdict; names judge, model and reason.
    """
    workers = CallSlots(config.parallel_execution.max_workers)

    async def failure_of(call: JudgeCall) -> str | None:
        model = config.models.large_model if call.is_large else config.models.small_model
        try:
            await questions.fresh_verdict(call, workers)
        except JudgeFailedError as error:
            return f"judge {call.judge!r} on {model} failed its self-test: {error}"
        return None

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(failure_of(call)) for call in _calls(config)]
    failures = [failure for task in asked if (failure := task.result()) is not None]
    if failures:
        raise ConfigError("; ".join(failures))


def _calls(config: RIMConfig) -> list[JudgeCall]:
    calls = [JudgeCall(judge, judge_prompt(judge, FIXTURE), config.temperatures[0]) for judge in config.judges]
    if config.models.large_model is not None:
        judge = config.judges[0]
        prompt = arbiter_prompt(judge, FIXTURE, [])
        calls.append(JudgeCall(judge, prompt, config.escalation_temperature, is_large=True))
    return calls
