"""The protocol around one item: probe, unaided attempts, the teacher's prompt, attempts with a guidance."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from atroposlib.envs.gathering import all_or_none
from atroposlib.envs.reward_fns.leaks import gives_away
from atroposlib.teaching.answers import teaching_of
from atroposlib.teaching.baselines import BaselineCache, StudentFingerprint
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.diagnosis import Capability, DiagnosticResult, capability_from_scores, diagnose
from atroposlib.teaching.episode import Attempt, Guidance, Lesson, Preparation, TeachingItem
from atroposlib.teaching.errors import StudentFailedError
from atroposlib.teaching.frozen_model import ChatReply, FrozenModel, Sampling
from atroposlib.teaching.templates import format_doubt

log = logging.getLogger(__name__)

JudgeApproach = Callable[[TeachingItem, str], Awaitable[Capability]]
"""Says how able a student is that means to go about an item this way."""


class TeachingProtocol:
    """What the student is asked, in which order.

    Args:
        student: never gets weights.
        cache: of the unaided attempts.
        count_tokens: of a text, under the teacher's tokenizer.
        judge_approach: the diagnostic judge, where there is one.
    Raises:
        ConfigError: a template lacks a variable.
    """

    def __init__(
        self,
        config: TeacherEnvConfig,
        student: FrozenModel,
        cache: BaselineCache,
        *,
        count_tokens: Callable[[str], int],
        judge_approach: JudgeApproach | None = None,
    ) -> None:
        self.config = config
        self.student = student
        self.cache = cache
        self._count_tokens = count_tokens
        self._judge_approach = judge_approach
        self._diagnostic = config.template("student_diagnostic_template")
        self._teacher = config.template("teacher_adaptive_template")
        self._with_teaching = config.template("student_with_teaching_template")
        self._baseline = config.template("student_baseline_template")
        if doubt := format_doubt(self._baseline, self._with_teaching):
            log.warning("%s", doubt)

    def sampling(self, split: str = "train") -> Sampling:
        """How solutions of the student are sampled."""
        config = self.config
        temperature = config.student_temperature if split == "train" else config.student_temperature_eval
        return Sampling(temperature, config.max_completion_length, split)

    async def prepare(self, item: TeachingItem, *, attempts: int, split: str = "train") -> Preparation:
        """Probe and unaided attempts, side by side, and what the teacher is asked.

        Args:
            attempts: unaided ones.
        Raises:
            StudentFailedError: the probe failed, or too many attempts did.
        """
        steps: list[Coroutine[Any, Any, Any]] = [
            self.probe(item, self.config.max_probe_tokens, split=split),
            self._baselines(item, attempts, split),
        ]
        reply, baseline = await all_or_none(steps)
        diagnosis = await self.diagnose(item, reply, baseline)
        return Preparation(item, diagnosis, baseline, self.teacher_prompt(item, diagnosis))

    async def probe(self, item: TeachingItem, max_tokens: int, *, split: str = "train") -> ChatReply:
        """What the student says about its approach.

        Raises:
            StudentFailedError: it could not be asked.
        """
        prompt = self._diagnostic.render({**item.context, "question": item.question})
        return await self.student.reply(prompt, Sampling(self.sampling(split).temperature, max_tokens, split))

    async def diagnose(
        self, item: TeachingItem, reply: ChatReply, baseline: tuple[Attempt, ...] = ()
    ) -> DiagnosticResult:
        """The diagnosis of a probe.

        Args:
            baseline: unaided attempts at the item, where they are known.
        """
        capability = await self._capability(item, reply.text, baseline)
        return diagnose(
            item.question, reply.text, tokens=reply.tokens, is_cut=not reply.is_complete, capability=capability
        )

    def teacher_prompt(self, item: TeachingItem, diagnosis: DiagnosticResult) -> str:
        """What the teacher is asked: a user message."""
        found = {
            "approach": diagnosis.approach,
            "tier": diagnosis.tier,
            "capability_level": round(float(diagnosis.capability_level), 2),
            "identified_gaps": diagnosis.identified_gaps,
        }
        return self._teacher.render({**item.context, **found, "question": item.question})

    def guidance(self, text: str, completion_tokens: int) -> Guidance:
        """What a teacher's text means to the student.

        Args:
            completion_tokens: of the whole text.
        """
        teaching = teaching_of(text)
        is_full = self.config.teaching_length_scope == "full"
        return Guidance(text, teaching, completion_tokens if is_full else self._count_tokens(teaching))

    async def teach(
        self, preparation: Preparation, guidance: Guidance, *, attempts: int, split: str = "train"
    ) -> Lesson | None:
        """Attempts of the student with a guidance; None where too few of them could be made."""
        item = preparation.item
        prompt = self._with_teaching.render({**item.context, "question": item.question, "teaching": guidance.teaching})
        replies = await self.student.attempts(prompt, attempts, self.sampling(split))
        if len(replies) < min(attempts, self.config.min_student_samples):
            return None
        return Lesson(
            guidance,
            tuple(Attempt.of(reply, item.ground_truth) for reply in replies),
            is_leak=item.ground_truth is not None
            and gives_away(
                guidance.teaching, item.ground_truth, question=item.question, approach=preparation.diagnosis.approach
            ),
        )

    async def _baselines(self, item: TeachingItem, attempts: int, split: str) -> tuple[Attempt, ...]:
        sampling = self.sampling(split)
        prompt = self._baseline.render({"question": item.question})
        models = [self.config.student_model] if self.config.student_model else self.student.model_names
        key = StudentFingerprint.of(models, self._baseline.digest, sampling, attempts).key(prompt)
        replies = self.cache.get(key)
        if replies is None:
            replies = await self.student.attempts(prompt, attempts, sampling)
            if len(replies) < min(attempts, self.config.min_student_samples):
                raise StudentFailedError(f"{len(replies)} of {attempts} unaided attempts of the student could be made")
            if len(replies) == attempts:
                self.cache.put(key, replies)
        return tuple(Attempt.of(reply, item.ground_truth) for reply in replies)

    async def _capability(self, item: TeachingItem, approach: str, baseline: tuple[Attempt, ...]) -> Capability:
        estimator = self.config.capability_estimator
        is_scored = bool(baseline) and item.ground_truth is not None
        if estimator in ("auto", "baseline") and is_scored:
            return capability_from_scores([attempt.score for attempt in baseline])
        if estimator in ("auto", "judge") and self._judge_approach is not None:
            return await self._judge_approach(item, approach)
        return capability_from_scores([])
