"""Sums and differences of two small numbers: the smallest real task, where a small model learns within minutes."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import reasoning_gym
from pydantic import Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Message, ScoredDataGroup
from atroposlib.envs.evaluation import map_items

SYSTEM = "Answer with the number only."
HELDOUT_SEED = 1_000_000_000
"""Where held-out problems are drawn from. reasoning-gym's problem i of seed s is problem 0 of seed s + i."""
TRAIN_SEEDS = 900_000_000
"""Training seeds stay below this, so the two streams never meet; held-out questions are left out by text besides."""
ANSWER = re.compile(r"-?[0-9]{1,1000}")
"""Bounded, since int() refuses thousands of digits."""


class ChainSumConfig(BaseEnvConfig):
    """Options of the task."""

    group_size: int = 8
    max_token_length: int = 128
    max_num_workers_per_node: int = 16
    steps_per_eval: int = 0
    tokenizer_name: str | None = "models/SmolLM2-135M-Instruct"
    max_tokens: int = Field(default=6, ge=1, description="Tokens of the longest answer; the right ones take at most 5.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")
    min_digits: int = Field(default=1, ge=1, description="Digits of the smallest terms.")
    max_digits: int = Field(default=2, ge=1, description="Digits of the largest terms.")
    eval_size: int = Field(default=200, ge=1, description="Held-out problems.")


@dataclass(frozen=True)
class Problem:
    """One question of reasoning-gym and what it takes to check an answer."""

    question: str
    expression: str
    answer: int

    @property
    def messages(self) -> list[Message]:
        """What the model is asked."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.question}]

    @property
    def prefill(self) -> str:
        """How its reply begins: the model goes on with the number, in a handful of tokens."""
        return f"{self.expression} ="


def reward(problem: Problem, completion: str) -> float:
    """1.0 when the completion is the right number and nothing else, else 0.0."""
    text = completion.strip()
    return float(ANSWER.fullmatch(text) is not None and int(text) == problem.answer)


def draw(config: ChainSumConfig, *, first_seed: int) -> Iterator[Problem]:
    """Problems of consecutive seeds, without end."""
    problems = reasoning_gym.create_dataset(
        "chain_sum",
        min_terms=2,
        max_terms=2,
        min_digits=config.min_digits,
        max_digits=config.max_digits,
        seed=first_seed,
        size=2**31,
    )
    for entry in problems:
        yield Problem(entry["question"], entry["metadata"]["expression"], int(entry["answer"]))


def heldout_problems(config: ChainSumConfig) -> list[Problem]:
    """The same eval_size different problems whatever the seed."""
    found: dict[str, Problem] = {}
    for problem in draw(config, first_seed=HELDOUT_SEED):
        found.setdefault(problem.question, problem)
        if len(found) == config.eval_size:
            break
    return list(found.values())


def training_problems(config: ChainSumConfig) -> Iterator[Problem]:
    """Endless, in an order that the seed decides, none of them held out."""
    heldout = {problem.question for problem in heldout_problems(config)}
    first_seed = random.Random(config.seed).randrange(TRAIN_SEEDS - 2**24)
    return (problem for problem in draw(config, first_seed=first_seed) if problem.question not in heldout)


class ChainSumEnv(BaseEnv):
    """Add and subtract numbers of one or two digits; the reward is 1 for the right number, else 0."""

    name = "chain_sum"
    env_config_cls = ChainSumConfig

    @classmethod
    def config_init(cls) -> tuple[ChainSumConfig, list[APIServerConfig]]:
        """One vLLM server on this machine."""
        return ChainSumConfig(), [
            APIServerConfig(base_url="http://localhost:9001/v1", model_name="smollm2-135m", server_type="vllm")
        ]

    async def setup(self) -> None:
        """Draw the held-out problems and start the training stream."""
        self.heldout = heldout_problems(self.config)
        self.problems = training_problems(self.config)

    async def get_next_item(self) -> Problem:
        """The next training problem."""
        return next(self.problems)

    async def collect_trajectories(self, item: Problem) -> tuple[ScoredDataGroup, list[Problem]]:
        """group_size answers to one problem."""
        group = await self.rollout_group(
            item.messages,
            prefill=item.prefill,
            reward=lambda text: reward(item, text),
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
        )
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy answers to the held-out problems."""
        started = time.time()
        samples = await map_items(self.heldout, self._answer_greedily, description="held-out problems")
        metrics = {
            "heldout_reward": sum(sample["score"] for sample in samples) / len(samples),
            "heldout_size": len(samples),
            "heldout_completion_tokens": sum(sample["completion_tokens"] for sample in samples) / len(samples),
        }
        await self.evaluate_log(
            metrics,
            start_time=started,
            samples=samples,
            generation_parameters={"temperature": 0.0, "max_tokens": self.config.max_tokens},
        )
        return metrics

    async def _answer_greedily(self, problem: Problem) -> dict[str, Any]:
        [(text, node)] = await self.sample(
            problem.messages, prefill=problem.prefill, temperature=0.0, max_tokens=self.config.max_tokens, split="eval"
        )
        return {
            "question": problem.question,
            "gold_answer": problem.answer,
            "completion": text,
            "score": reward(problem, text),
            "completion_tokens": len(node.completion_ids),
            "finish_reason": (node.metadata or {}).get("finish_reason"),
        }


if __name__ == "__main__":
    ChainSumEnv.cli()
