"""Puzzles, arithmetic, logic and games of reasoning-gym; each task brings its own rule of reward."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from statistics import fmean
from typing import Any

from pydantic import Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Message, ScoredDataGroup
from environments.reasoning_tasks.problems import Problem, TaskMix, score

SYSTEM = "Think step by step, then give the answer alone between <answer> and </answer>."
HELDOUT_SEED = 1_000_000_000
TRAIN_SEEDS = 900_000_000
"""Training seeds stay below this; a held-out question that turns up all the same is passed over."""


class ReasoningTasksConfig(BaseEnvConfig):
    """Options of the task."""

    group_size: int = 8
    max_token_length: int = 2048
    tokenizer_name: str | None = "Qwen/Qwen2.5-1.5B-Instruct"
    tasks: list[str] = Field(
        default=["leg_counting"], min_length=1, description="Names of reasoning-gym's tasks, taken by turns."
    )
    task_options: dict[str, dict[str, Any]] = Field(
        default={}, description='Parameters of the generators: {"leg_counting": {"max_animals": 4}}.'
    )
    problems_per_task: int = Field(
        default=10_000, ge=1, description="Problems of each task before they come again; some tasks make all at start."
    )
    is_exact: bool = Field(
        default=False, description="Pay 1 or 0 only; without it a task's rule may pay something for a part."
    )
    allows_eval: bool = Field(
        default=False,
        description="Take tasks whose rule runs the answer as Python code. The policy can then do whatever this user can: "
        "only in a container without secrets.",
    )
    eval_size: int = Field(default=100, ge=1, description="Held-out problems in all.")
    max_tokens: int = Field(default=1024, ge=1, description="Tokens of the longest reply.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")


def messages_of(problem: Problem) -> list[Message]:
    """What the model is asked."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem.question}]


class ReasoningTasksEnv(BaseEnv):
    """Solve problems of the chosen tasks; the task's own rule pays from 0 to 1."""

    name = "reasoning_tasks"
    env_config_cls = ReasoningTasksConfig

    @classmethod
    def config_init(cls) -> tuple[ReasoningTasksConfig, list[APIServerConfig]]:
        """One vLLM server on this machine."""
        config = ReasoningTasksConfig()
        server = APIServerConfig(
            base_url="http://localhost:9001/v1", model_name=str(config.tokenizer_name), server_type="vllm"
        )
        return config, [server]

    async def setup(self) -> None:
        """Open the stream of training problems, and draw the held-out ones: the same whatever the seed."""
        config = self.config
        seed = random.Random(config.seed).randrange(TRAIN_SEEDS - config.problems_per_task)
        per_task = -(-config.eval_size // len(config.tasks))
        self.mix = self._mix(seed, config.problems_per_task)
        heldout = self._mix(HELDOUT_SEED, per_task)
        self.heldout = [await self.run_blocking(heldout.problem, index) for index in range(config.eval_size)]
        self.heldout_questions = {problem.question for problem in self.heldout}
        self.indices = itertools.count()

    def _mix(self, seed: int, size: int) -> TaskMix:
        config = self.config
        return TaskMix(config.tasks, config.task_options, seed=seed, size=size, allows_eval=config.allows_eval)

    async def get_next_item(self) -> Problem | None:
        """The next training problem; None where so few are possible that every one of them is held out."""
        for index in itertools.islice(self.indices, self.config.problems_per_task * len(self.config.tasks)):
            # On a thread: some tasks search for seconds until a problem is a good one.
            problem = await self.run_blocking(self.mix.problem, index)
            if problem.question not in self.heldout_questions:
                return problem
        return None

    async def collect_trajectories(self, item: Problem) -> tuple[ScoredDataGroup, list[Problem]]:
        """group_size answers to one problem."""
        group = await self.rollout_group(
            messages_of(item),
            reward=lambda text: self.pay(item, text),
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
        )
        return group, []

    async def pay(self, problem: Problem, text: str) -> float:
        """The reward of one reply.

        Raises:
            RolloutError: the task's rule did not come to an end, and was killed.
        """
        options = self.config.task_options.get(problem.task, {})
        paid = await self.run_blocking(score, problem.task, options, problem.entry, text, in_process=True)
        return float(paid == 1.0) if self.config.is_exact else paid

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy answers to the held-out problems, in all and for each task."""
        samples = await self.evaluate_items(self.heldout, self._answer_greedily)
        by_task: dict[str, list[float]] = defaultdict(list)
        for sample in samples:
            by_task[sample["task"]].append(sample["score"])
        metrics = {
            "heldout_reward": fmean(sample["score"] for sample in samples),
            "heldout_size": len(samples),
            **{f"heldout_reward/{task}": fmean(scores) for task, scores in by_task.items()},
        }
        sampling = {"temperature": 0.0, "max_tokens": self.config.max_tokens}
        await self.evaluate_log(metrics, samples=samples, generation_parameters=sampling)
        return metrics

    async def _answer_greedily(self, problem: Problem) -> dict[str, Any]:
        [(text, _)] = await self.sample(
            messages_of(problem), temperature=0.0, max_tokens=self.config.max_tokens, split="eval"
        )
        return {
            "task": problem.task,
            "question": problem.question,
            "gold_answer": problem.entry["answer"],
            "completion": text,
            "score": await self.pay(problem, text),
        }
