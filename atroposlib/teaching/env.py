"""TeacherEnv: the policy teaches, a frozen student tries, and the policy is paid for what changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, ClassVar

from atroposlib.data.load import load_splits
from atroposlib.envs.base import BaseEnv
from atroposlib.envs.command_line.server_choice import Servers
from atroposlib.envs.server_handling.managed_server import SequenceNode
from atroposlib.envs.server_handling.server_baseline import APIServerConfig, ServerBaseline
from atroposlib.envs.server_pools import handed_over
from atroposlib.errors import ConfigError, RolloutError, infrastructure_error
from atroposlib.rim.reward import RIMReward
from atroposlib.teaching import pools
from atroposlib.teaching.baselines import FILE as BASELINES
from atroposlib.teaching.baselines import BaselineCache
from atroposlib.teaching.checks import check_guidance_arguments, check_probe_arguments
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.diagnosis import DiagnosticResult
from atroposlib.teaching.episode import PaidLesson, Preparation, TeachingItem
from atroposlib.teaching.errors import StudentFailedError, TeacherFailedError
from atroposlib.teaching.evaluation import Outcome, counted, summary
from atroposlib.teaching.group import group_of, teacher_messages
from atroposlib.teaching.items import item_of, shuffled_forever
from atroposlib.teaching.metrics import TeachingMetrics, approach_figures
from atroposlib.teaching.payment import Payment
from atroposlib.teaching.protocol import TeachingProtocol
from atroposlib.teaching.records import TeachingRecords
from atroposlib.teaching.scoring import evened, judged_capability, reward_by_scores, warn_of_rewards
from atroposlib.teaching.served import check_served
from atroposlib.type_definitions import Message, ScoredDataGroup
from atroposlib.utils.chat_tokens import chat_token_ids

log = logging.getLogger(__name__)


class TeacherEnv(BaseEnv):
    """Two passes over each problem: a probe of the student, then guidance by the policy and the student's attempts with it.

    The policy's servers (`--openai.*`) teach and are trained. The student's (`--student.*`) and the reference
    teacher's (`--reference.*`) never get weights; text is enough there.

    Args:
        student_server_configs: servers of the student; None: those of the command line, else of student_config_init.
        reference_server_configs: servers of the reference teacher, asked with use_reference_teacher_model; None: as above.
    Raises:
        ConfigError: no student, no tokenizer, a template without its variables, or a reference teacher without a server.
    """

    env_config_cls: ClassVar[type[TeacherEnvConfig]] = TeacherEnvConfig

    def __init__(
        self,
        config: TeacherEnvConfig,
        server_configs: ServerBaseline | list[APIServerConfig],
        slurm: bool = False,
        testing: bool = False,
        *,
        student_server_configs: Servers | None = None,
        reference_server_configs: Servers | None = None,
    ) -> None:
        super().__init__(config, server_configs, slurm, testing)
        if self.tokenizer is None:
            raise ConfigError("the teacher is asked by token ids: set tokenizer_name to the policy's tokenizer")
        student_at = student_server_configs or handed_over("student") or self.student_config_init()
        self.student = pools.student_of(config, student_at, testing=testing)
        reference_at = reference_server_configs or handed_over("reference")
        self.reference = pools.reference_of(config, reference_at, self.reference_config_init(), testing=testing)
        """The teacher that use_reference_teacher_model compares with."""
        pools.warn_of_shared_servers(self.server, self.student, self.reference)
        self.rim = RIMReward(config.rim) if config.rim is not None else None
        self._approach_judge = pools.approach_judge_of(config)
        cache = BaselineCache(config.run_dir / BASELINES if config.run_dir is not None else None)
        self.protocol = TeachingProtocol(
            config,
            self.student,
            cache,
            count_tokens=self._count_tokens,
            judge_approach=partial(judged_capability, self._approach_judge) if self._approach_judge else None,
        )
        self.payment = Payment(config, self.protocol, judges=self.rim, reference=self.reference)
        self.teaching_metrics = TeachingMetrics()
        self.records = TeachingRecords(config.run_dir, probability=config.logging_prob, seed=config.seed)
        warn_of_rewards(config)

    # What an author overrides

    @classmethod
    def student_config_init(cls) -> Servers | None:
        """Default servers of the student; None: they come from flags or a file."""
        return None

    @classmethod
    def reference_config_init(cls) -> Servers | None:
        """Default servers of the reference teacher; None: they come from flags or a file."""
        return None

    @classmethod
    def server_pools(cls) -> dict[str, Servers | None]:
        """The student's and the reference teacher's, beside those of a class that this one is combined with."""
        own = {"student": cls.student_config_init(), "reference": cls.reference_config_init()}
        return {**super().server_pools(), **own}

    async def load_items(self) -> tuple[list[TeachingItem], list[TeachingItem]]:
        """Training items and held-out ones: those of config.data."""
        splits = await asyncio.to_thread(load_splits, self.config.data)
        return [item_of(row) for row in splits.train], [item_of(row) for row in splits.eval]

    async def setup(self) -> None:
        """Load the problems; ask every frozen model and every judge once.

        Raises:
            ConfigError: one of them cannot be used; names it.
        """
        train, self.heldout = await self.load_items()
        self.items = shuffled_forever(train, self.config.seed)
        await check_served(self.student, option="--student.model_name")
        if self.reference is not None:
            await check_served(self.reference, option="--reference.model_name")
        if self.rim is not None and self.config.teaching_reward_mode == "rim":
            await self.rim.self_test()
        if self._approach_judge is not None and self.config.capability_estimator == "judge":
            await self._approach_judge.self_test()

    async def get_next_item(self) -> TeachingItem | None:
        """The next training problem."""
        return next(self.items, None)

    # The documented methods

    async def diagnostic_probe(self, task: str, max_tokens: int = 50) -> DiagnosticResult:
        """Ask the student how it would go about a task, and say how able it seems.

        Raises:
            TypeError: task is no text, or max_tokens no whole number.
            ValueError: task is empty, or max_tokens below 1.
            RuntimeError: the student could not be asked; the cause is chained.
        """
        check_probe_arguments(task, max_tokens)
        item = TeachingItem(task)
        try:
            reply = await self.protocol.probe(item, max_tokens)
        # The server lets nobody in, or knows no such model.
        except ConfigError as error:
            raise StudentFailedError(f"the student could not be asked: {error}") from error
        return await self.protocol.diagnose(item, reply)

    async def generate_guidance(self, task: str, diagnostic: DiagnosticResult, max_tokens: int = 200) -> str:
        """What the policy would tell a student with this diagnosis.

        Raises:
            TypeError: task is no text, diagnostic no DiagnosticResult, or max_tokens no whole number.
            ValueError: task is empty, diagnostic None, or max_tokens below 10.
            RuntimeError: the policy could not be asked (the cause is chained), or said nothing.
        """
        check_guidance_arguments(task, diagnostic, max_tokens)
        prompt = self.protocol.teacher_prompt(TeachingItem(task), diagnostic)
        messages: list[Message] = [{"role": "user", "content": prompt}]
        try:
            [(text, node)] = await self.sample(messages, temperature=self.config.temperature, max_tokens=max_tokens)
        except Exception as error:
            failure = error if isinstance(error, ConfigError) else infrastructure_error(error)
            if failure is None:
                raise
            raise TeacherFailedError(f"the teacher could not be asked: {failure}") from error
        teaching = self.protocol.guidance(text, len(node.completion_ids)).teaching
        if not teaching:
            raise TeacherFailedError(f"the teacher wrote nothing for the student; it wrote {text[:80]!r}")
        return teaching

    def compute_teaching_reward(self, baseline_score: float, enhanced_score: float, teaching_length: float) -> float:
        """The reward of guidance by scores alone, as this environment is set.

        Raises:
            TypeError: an argument is no number.
            ValueError: a score outside 0 to 1, a negative length, or a mode that needs more (outcome, rim).
        """
        return reward_by_scores(baseline_score, enhanced_score, teaching_length, self.config)

    # One group

    async def collect_trajectories(self, item: TeachingItem) -> tuple[ScoredDataGroup | None, list[TeachingItem]]:
        """group_size guidances for one item, each paid for what the student made of it.

        Raises:
            RolloutError: servers or judges failed, so that too few guidances could be paid.
        """
        config = self.config
        if item.ground_truth is None and config.teaching_reward_mode != "rim":
            return self._drop(item, "no_ground_truth")
        if self.rim is not None and config.teaching_reward_mode == "rim":
            await self.rim.wait_until_well(config.server_deadline_s)
        preparation = await self.protocol.prepare(item, attempts=config.num_baseline_samples)
        if not self._prompt_fits(preparation):
            return self._drop(item, "prompt_too_long")
        sampling = {"temperature": config.temperature, "max_tokens": config.guidance_tokens}
        sampled = await self.sample(teacher_messages(preparation), n=config.group_size, **sampling)
        members = await self._paid(preparation, sampled)
        self.teaching_metrics.note_group(preparation, [paid for _, paid in members])
        self.records.note_group(self.curr_step, preparation, [paid for _, paid in members])
        return group_of(preparation, members, sampling), []

    def _drop(self, item: TeachingItem, reason: str) -> tuple[None, list[TeachingItem]]:
        self.teaching_metrics.note_drop(reason)
        log.info("item gives no group: %s: %.80r", reason, item.question)
        return None, []

    def _prompt_fits(self, preparation: Preparation) -> bool:
        return len(chat_token_ids(self.tokenizer, teacher_messages(preparation), add_generation_prompt=True)) <= int(
            self.config.max_prompt_length
        )

    async def _paid(
        self, preparation: Preparation, sampled: Sequence[tuple[str, SequenceNode]]
    ) -> list[tuple[SequenceNode, PaidLesson]]:
        """The guidances that could be paid, with their tokens."""
        guidances = [self.protocol.guidance(text, len(node.completion_ids)) for text, node in sampled]
        lessons = await self.payment.lessons(preparation, guidances)
        members = [(node, one) for (_, node), one in zip(sampled, lessons, strict=True) if one is not None]
        if len(members) < self._min_valid:
            self.teaching_metrics.note_drop("too_few_valid")
            raise RolloutError(
                f"{len(members)} of {len(sampled)} guidances could be paid, {self._min_valid} are needed"
            )
        return list(zip([node for node, _ in members], evened([paid for _, paid in members]), strict=True))

    def _count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False)) if text else 0

    # Evaluation, figures, the end

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Held-out items with a greedy teacher and student: what teaching changes, with 95 % intervals."""
        items = [item for item in self.heldout if item.ground_truth is not None]
        if not items:
            log.warning("no held-out item has a ground truth: nothing is evaluated")
            return {}
        evaluated = await self.evaluate_items(items, self._evaluate_item)
        samples = [sample for sample in evaluated if sample is not None]
        if not samples:
            log.warning("the prompts of all held-out items exceed max_prompt_length: nothing is evaluated")
            return {}
        metrics = summary([_outcome(sample) for sample in samples])
        await self.evaluate_log(metrics, samples=samples, generation_parameters={"temperature": 0.0})
        return metrics

    async def _evaluate_item(self, item: TeachingItem) -> dict[str, Any] | None:
        preparation = await self.protocol.prepare(item, attempts=1, split="eval")
        if not self._prompt_fits(preparation):
            self.teaching_metrics.note_drop("prompt_too_long")
            return None
        messages = teacher_messages(preparation)
        [(text, node)] = await self.sample(
            messages, temperature=0.0, max_tokens=self.config.guidance_tokens, split="eval"
        )
        guidance = self.protocol.guidance(text, len(node.completion_ids))
        lesson = await self.protocol.teach(preparation, guidance, attempts=1, split="eval")
        if lesson is None:
            raise RolloutError("the student could not be asked for its taught attempt")
        [attempt] = lesson.attempts
        delta = lesson.score - preparation.baseline_score
        return {
            "question": item.question,
            "gold_answer": item.ground_truth,
            "approach": preparation.diagnosis.approach,
            "teaching": guidance.teaching,
            "teaching_tokens": guidance.tokens,
            "is_leak": lesson.is_leak,
            "baseline": preparation.baseline_score,
            "model_answer": attempt.answer,
            "completion": attempt.reply.text,
            "is_complete": attempt.reply.is_complete,
            "score": lesson.score,
            "delta": delta,
            "heldout_reward": float(counted(delta, lesson.is_leak)),
        }

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """Add the figures of the protocol and of the judges."""
        metrics = {**(wandb_metrics or {}), **self.teaching_metrics.take()}
        metrics |= {f"teaching/student_{name}": float(count) for name, count in self.student.take_counts().items()}
        metrics["teaching/baselines_reused"] = self.protocol.cache.take_reused()
        if self.rim is not None:
            metrics |= {**self.rim.take_metrics(), **self.rim.take_explanations()}
        if self._approach_judge is not None:
            metrics |= approach_figures(self._approach_judge.take_metrics())
        await super().wandb_log(metrics)

    async def aclose(self) -> None:
        """Close student, reference, judges and the kept baselines too: each of them, also where another fails to close."""
        async with AsyncExitStack() as closing:
            closing.callback(self.protocol.cache.close)
            for judge in (self.rim, self._approach_judge):
                if judge is not None:
                    closing.push_async_callback(judge.close)
            for model in (self.reference, self.student):
                if model is not None:
                    closing.push_async_callback(model.server.close)
            await super().aclose()


def _outcome(sample: dict[str, Any]) -> Outcome:
    return Outcome(
        sample["baseline"], sample["score"], sample["teaching_tokens"], sample["is_complete"], sample["is_leak"]
    )
