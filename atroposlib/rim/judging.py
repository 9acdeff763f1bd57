"""One judge on one trajectory: the small model at every temperature, then the large one where it must decide."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from atroposlib.rim.asking import JudgeCall
from atroposlib.rim.config import JudgeName, RIMConfig
from atroposlib.rim.prompts import arbiter_prompt, judge_prompt
from atroposlib.rim.questions import JudgeFailedError, Questions
from atroposlib.rim.slots import DOUBTED, FIRST, FURTHER, CallSlots, Place
from atroposlib.rim.tiering import Escalate, Pick, decide
from atroposlib.rim.trajectory import Trajectory
from atroposlib.rim.verdict import Verdict


@dataclass(frozen=True)
class Sample:
    """A verdict of the small model."""

    temperature: float
    verdict: Verdict


@dataclass(frozen=True)
class Judgement:
    """What one judge says about one trajectory."""

    judge: JudgeName
    verdict: Verdict | None
    """None: the judge abstains, and `failure` says why."""
    samples: tuple[Sample, ...] = ()
    escalation_reason: str = ""
    """Why the small model was not enough; "": it was."""
    failure: str = ""


async def judge_trajectory(
    judge: JudgeName,
    trajectory: Trajectory,
    *,
    config: RIMConfig,
    questions: Questions,
    workers: CallSlots,
) -> Judgement:
    """The judgement, always: a judge that fails abstains."""
    prompt = judge_prompt(judge, trajectory)
    calls = [
        JudgeCall(judge, prompt, temperature, nth=config.temperatures[:place].count(temperature))
        for place, temperature in enumerate(config.temperatures)
    ]
    answers = await _ask_all(calls, config, questions, workers)
    samples = tuple(
        Sample(call.temperature, answer)
        for call, answer in zip(calls, answers, strict=True)
        if isinstance(answer, Verdict)
    )
    verdicts = [sample.verdict for sample in samples]
    decision = _decision(verdicts, config)
    if isinstance(decision, Pick):
        return Judgement(judge, decision.verdict, samples)
    if config.models.large_model is None:
        why = next((str(answer) for answer in answers if isinstance(answer, JudgeFailedError)), "")
        failure = f"{decision.reason}, and there is no large_model" + (f"; {why}" if not samples else "")
        return Judgement(judge, None, samples, decision.reason, failure)
    call = JudgeCall(judge, arbiter_prompt(judge, trajectory, verdicts), config.escalation_temperature, is_large=True)
    try:
        verdict = await questions.verdict(call, workers)
    except JudgeFailedError as error:
        return Judgement(judge, None, samples, decision.reason, f"{decision.reason}, then the large model: {error}")
    return Judgement(judge, verdict, samples, decision.reason)


async def _ask_all(
    calls: Sequence[JudgeCall], config: RIMConfig, questions: Questions, workers: CallSlots
) -> list[Verdict | JudgeFailedError]:
    first, further = Place(workers, FIRST), Place(workers, FURTHER)
    so_far: list[Verdict] = []

    async def verdict_or_failure(call: JudgeCall) -> Verdict | JudgeFailedError:
        answer: Verdict | JudgeFailedError
        try:
            answer = await questions.verdict(call, first if call is calls[0] else further)
            so_far.append(answer)
        except JudgeFailedError as error:
            answer = error
        # The large model, which takes longest, waits for the others: let them not stand at the end of the line.
        further.rank = DOUBTED if isinstance(_decision(so_far, config), Escalate) else FURTHER
        return answer

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(verdict_or_failure(call)) for call in calls]
    return [task.result() for task in asked]


def _decision(verdicts: Sequence[Verdict], config: RIMConfig) -> Pick | Escalate:
    return decide(
        verdicts, variance_threshold=config.variance_threshold, uncertainty_threshold=config.uncertainty_threshold
    )
