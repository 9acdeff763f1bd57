"""Word problems with one number for an answer; the reward is 1 for the right one, graded beside the event loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Message, ScoredDataGroup
from environments.gsm8k.grading import grade
from environments.rows import held_out, load_rows, shuffled_forever

SAMPLE = Path(__file__).parent / "data" / "problems.jsonl"
SYSTEM = (
    "Solve the problem step by step. Then write the answer on a line of its own: #### and the number, without a unit."
)
FIELDS = {"question": str, "answer": str}


class GSM8KConfig(BaseEnvConfig):
    """Options of the task."""

    group_size: int = 8
    max_token_length: int = 1024
    tokenizer_name: str | None = "Qwen/Qwen2.5-1.5B-Instruct"
    source: str | None = Field(
        default=None, description="JSONL file or hub id, e.g. openai/gsm8k:main; None: the sample that comes along."
    )
    eval_source: str | None = Field(
        default=None, description="Held-out JSONL file, or hub id whose test split is used; None: a part of the source."
    )
    eval_share: float = Field(
        default=0.2, gt=0, lt=1, description="Part of the source to hold out without eval_source."
    )
    eval_size: int = Field(default=200, ge=1, description="Held-out problems, at most.")
    max_tokens: int = Field(default=512, ge=1, description="Tokens of the longest reply.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")
    grader_timeout_s: float = Field(default=10.0, gt=0, description="Seconds to grade one reply.")


@dataclass(frozen=True)
class Problem:
    """A question and its worked solution, which ends in `#### answer`."""

    question: str
    answer: str

    @property
    def messages(self) -> list[Message]:
        """What the model is asked."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.question}]


class GSM8KEnv(BaseEnv):
    """Solve a word problem; 1 for the right number, else 0."""

    name = "gsm8k"
    env_config_cls = GSM8KConfig

    @classmethod
    def config_init(cls) -> tuple[GSM8KConfig, list[APIServerConfig]]:
        """One vLLM server on this machine."""
        server = APIServerConfig(
            base_url="http://localhost:9001/v1", model_name="Qwen/Qwen2.5-1.5B-Instruct", server_type="vllm"
        )
        return GSM8KConfig(), [server]

    async def setup(self) -> None:
        """Load the problems and hold some out."""
        config = self.config
        rows = load_rows(config.source or SAMPLE, fields=FIELDS)
        if config.eval_source:
            heldout = load_rows(config.eval_source, fields=FIELDS, split="test")
        else:
            rows, heldout = held_out(rows, config.eval_share, "question")
        self.problems = shuffled_forever([Problem(row["question"], row["answer"]) for row in rows], config.seed)
        self.heldout = [Problem(row["question"], row["answer"]) for row in heldout[: config.eval_size]]

    async def get_next_item(self) -> Problem:
        """The next training problem."""
        return next(self.problems)

    async def collect_trajectories(self, item: Problem) -> tuple[ScoredDataGroup, list[Problem]]:
        """group_size solutions of one problem."""
        group = await self.rollout_group(
            item.messages,
            reward=lambda text: self.pay(item, text),
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
        )
        return group, []

    async def pay(self, problem: Problem, text: str) -> float:
        """The reward of one reply.

        Raises:
            RolloutError: the grader failed, which says nothing about the reply.
        """
        # On a process: math-verify keeps its own deadline with a signal, which only a main thread can have.
        return await self.run_blocking(
            grade, problem.answer, text, timeout_s=self.config.grader_timeout_s, in_process=True
        )

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy solutions of the held-out problems."""
        samples = await self.evaluate_items(self.heldout, self._solve_greedily)
        metrics = {"heldout_reward": fmean(sample["score"] for sample in samples), "heldout_size": len(samples)}
        sampling = {"temperature": 0.0, "max_tokens": self.config.max_tokens}
        await self.evaluate_log(metrics, samples=samples, generation_parameters=sampling)
        return metrics

    async def _solve_greedily(self, problem: Problem) -> dict[str, Any]:
        [(text, node)] = await self.sample(
            problem.messages, temperature=0.0, max_tokens=self.config.max_tokens, split="eval"
        )
        return {
            "question": problem.question,
            "gold_answer": problem.answer,
            "completion": text,
            "score": await self.pay(problem, text),
            "completion_tokens": len(node.completion_ids),
        }
