"""RIMReward: a panel of judge models pays a trajectory, says why, and abstains where it cannot judge."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atroposlib.errors import ConfigError, JudgesFailingError
from atroposlib.rim.asking import Ask, ChatAsk
from atroposlib.rim.breaker import JudgeBreaker
from atroposlib.rim.cache import VerdictCache
from atroposlib.rim.composing import result_of
from atroposlib.rim.config import RIMConfig
from atroposlib.rim.judging import Judgement, judge_trajectory
from atroposlib.rim.meter import Meter
from atroposlib.rim.questions import Questions
from atroposlib.rim.result import RIMResult
from atroposlib.rim.self_test import self_test
from atroposlib.rim.slots import CallSlots
from atroposlib.rim.trajectory import Trajectory, from_columns, text_of

log = logging.getLogger(__name__)
LOOK_AGAIN_S = 1.0
"""Who waits for judges that others try again learns within this time that they are well."""


class RIMReward:
    """Scores trajectories with the judges of its config. Use `score` in an event loop, calls and `evaluate` outside one.

    Args:
        ask: puts one question to a judge model; None: over HTTP, as the config says.
        clock: seconds, monotonic; for the breaker.
    Raises:
        ConfigError: a model's name leads nowhere, or the variable of its key is not set.
    """

    def __init__(
        self, config: RIMConfig, *, ask: Ask | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.meter = Meter(logs_cost=config.model_configs.default.is_priced)
        self.breaker = JudgeBreaker(config.breaker, clock)
        self._cache = VerdictCache(config.cache_size, Path(config.cache_dir) if config.cache_dir else None)
        self._given_ask = ask
        self._ask = ask or ChatAsk(config)
        self._questions = self._questions_through(self._ask)

    # Scoring

    async def score(self, trajectories: Sequence[Trajectory]) -> list[RIMResult]:
        """One result for each trajectory, all of them judged at once within the limits of the config.

        A result without a score says nothing about its sample: leave the sample out.

        Raises:
            JudgesFailingError: too many judgements failed lately; nothing was asked. See wait_until_well.
        """
        await self._check_breaker()
        return await self._score_with(self._questions, trajectories)

    async def _score_with(self, questions: Questions, trajectories: Sequence[Trajectory]) -> list[RIMResult]:
        complete = [self._with_constitution(trajectory) for trajectory in trajectories]
        workers = CallSlots(self.config.parallel_execution.max_workers)
        async with asyncio.TaskGroup() as tasks:
            # Equal trajectories of a group are judged once.
            asked = {
                trajectory: tasks.create_task(self._score_one(trajectory, questions, workers))
                for trajectory in dict.fromkeys(complete)
            }
        results = [asked[trajectory].result() for trajectory in complete]
        self.meter.add(results)
        return results

    async def _score_one(self, trajectory: Trajectory, questions: Questions, workers: CallSlots) -> RIMResult:
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(
                    judge_trajectory(judge, trajectory, config=self.config, questions=questions, workers=workers)
                )
                for judge in self.config.judges
                if judge != "accuracy" or trajectory.ground_truth.strip()
            ]
        judgements = [task.result() for task in asked]
        for judgement in judgements:
            self._count(judgement)
        return result_of(trajectory, judgements, self.config)

    def _count(self, judgement: Judgement) -> None:
        if self.breaker.record(f"{judgement.judge}: {judgement.failure}" if judgement.failure else ""):
            self.meter.totals["stops"] += 1
            pause_s = self.config.breaker.pause_s
            # As text: a handler that writes later would find the breaker changed.
            log.warning("scoring is stopped: %s; they are tried again in %g s", str(self.breaker), pause_s)
        self.meter.totals["judgements"] += 1
        self.meter.totals["abstained"] += judgement.verdict is None
        self.meter.totals["escalations"] += bool(judgement.escalation_reason)

    def _with_constitution(self, trajectory: Trajectory) -> Trajectory:
        if trajectory.constitution_principles or not self.config.constitution_principles:
            return trajectory
        return replace(trajectory, constitution_principles=self.config.constitution_principles)

    # Outside an event loop

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        return_info_dict: bool = False,
        return_raw_tensors: bool = False,
        **columns: Any,
    ) -> Any:
        """Rewards of completions; None for one that could not be judged.

        Args:
            prompts, completions: texts, messages, or lists of messages.
            return_info_dict: also return for each completion its `rewards`, `explanations` and `structured_reward`.
            return_raw_tensors: together with return_info_dict, also return a list of empty maps: judges make no tensors.
            columns: further fields of the trajectories, by plural or singular name: ground_truths, teacher_traces, ...
        Returns:
            list[float | None], or a tuple of it with the information.
        Raises:
            ConfigError: called in a running event loop, or the columns' lengths differ.
            JudgesFailingError: too many judgements failed lately.
        """
        results = self.score_blocking(from_columns(prompts, completions, columns))
        rewards = [result.score for result in results]
        if not return_info_dict:
            return rewards
        info = [
            {
                "rewards": result.judge_scores,
                "explanations": result.explanations,
                "structured_reward": result.structured_reward,
            }
            for result in results
        ]
        return (rewards, info, [{} for _ in results]) if return_raw_tensors else (rewards, info)

    def evaluate(self, prompt: Any, response: Any, **columns: Any) -> dict[str, Any]:
        """One sample in full.

        Args:
            columns: further fields of the trajectory, each a single value.
        Returns:
            score, rationale, judge_scores, judge_explanations, reward (the score), and extra: structured_reward,
            escalations, failures, reasons. The score is None where nobody could judge.
        Raises:
            ConfigError, JudgesFailingError: as for a call.
        """
        single = {name: None if value is None else [text_of(value)] for name, value in columns.items()}
        [result] = self.score_blocking(from_columns([prompt], [response], single))
        return {
            "score": result.score,
            "rationale": result.structured_reward["rationale"],
            "judge_scores": result.judge_scores,
            "judge_explanations": result.explanations,
            "reward": result.score,
            "extra": {
                "structured_reward": result.structured_reward,
                "escalations": result.escalations,
                "failures": result.failures,
                "reasons": result.reasons,
            },
        }

    def score_blocking(self, trajectories: Sequence[Trajectory]) -> list[RIMResult]:
        """As `score`, outside an event loop. max_concurrent_judge_calls bounds this call alone, not those of other threads.

        Raises:
            ConfigError: called in a running event loop.
            JudgesFailingError: too many judgements failed lately.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._score_apart(trajectories))
        raise ConfigError(
            "a RIMReward is called in a running event loop, which it would block; await its score() there, "
            "or call it through the environment's run_blocking()"
        )

    async def _score_apart(self, trajectories: Sequence[Trajectory]) -> list[RIMResult]:
        # Connections belong to an event loop, and this one ends with the call.
        ask = self._given_ask or ChatAsk(self.config)
        questions = self._questions_through(ask)
        try:
            await self._check_breaker(questions)
            return await self._score_with(questions, trajectories)
        finally:
            if isinstance(ask, ChatAsk):
                await ask.close()

    # Health

    async def self_test(self) -> None:
        """Ask every judge model about a case whose answer is known to be readable. Call it before the first rollout.

        Raises:
            ConfigError: one of them cannot be used; names judge, model and reason.
        """
        await self_test(self.config, self._questions)

    async def wait_until_well(self, deadline_s: float) -> None:
        """Return at once unless scoring is stopped; otherwise try the judges after each pause until they answer.

        Raises:
            JudgesFailingError: they still fail after deadline_s.
        """
        try:
            async with asyncio.timeout(deadline_s):
                while self.breaker.is_open:
                    await self._try_again_if_due(self._questions)
                    await asyncio.sleep(min(self.breaker.pause_left_s(), LOOK_AGAIN_S))
        except TimeoutError:
            raise JudgesFailingError(f"{self.breaker}; they did not recover within {deadline_s:g} s") from None

    async def _check_breaker(self, questions: Questions | None = None) -> None:
        await self._try_again_if_due(questions or self._questions)
        if self.breaker.is_open:
            raise JudgesFailingError(
                f"{self.breaker}; scoring is stopped for another {self.breaker.pause_left_s():.0f} s, "
                "then the judges are tried again"
            )

    async def _try_again_if_due(self, questions: Questions) -> None:
        if not self.breaker.is_open or self.breaker.pause_left_s() > 0:
            return
        # First, so that of many groups only one tries.
        self.breaker.pause_again()
        try:
            await self_test(self.config, questions)
        except ConfigError as error:
            self.breaker.last_failure = str(error)
        else:
            self.breaker.close()
            log.warning("scoring goes on: the judges answer again")

    # Figures and the end

    def take_metrics(self) -> dict[str, float]:
        """`rim_rewards/<judge>` and `rim/...` since the last call."""
        was_stopped = self.breaker.is_open or self.meter.totals["stops"] > 0
        return {**self.meter.take(), "rim/stopped": float(was_stopped)}

    def take_explanations(self) -> dict[str, str]:
        """`rim_explanations/<judge>`: the latest explanation of each judge since the last call."""
        return self.meter.take_explanations()

    async def close(self) -> None:
        """Close the connections to the judges."""
        if isinstance(self._ask, ChatAsk):
            await self._ask.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _questions_through(self, ask: Ask) -> Questions:
        return Questions(self.config, ask, cache=self._cache, meter=self.meter)
