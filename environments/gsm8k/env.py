"""Word problems with one answer; the reward is 1 for the right one, graded beside the event loop."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from atroposlib.data.answers import question_of
from atroposlib.data.config import DataConfig
from atroposlib.data.load import load_splits
from atroposlib.data.registry import Row
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Message, ScoredDataGroup
from atroposlib.errors import ConfigError
from environments.gsm8k.grading import grade, grade_bare
from environments.rows import held_out, load_rows, shuffled_forever

log = logging.getLogger(__name__)
SAMPLE = Path(__file__).parent / "data" / "problems.jsonl"
SYSTEM = (
    "Solve the problem step by step. Then write the answer on a line of its own: #### and the number, without a unit."
)
FIELDS = {"question": str, "answer": str}


class GSM8KConfig(BaseEnvConfig):
    """Options of the task."""

    # data.db_url may hold a password, and the hiding of the inner model does not reach out here.
    model_config = ConfigDict(hide_input_in_errors=True)

    group_size: int = 8
    max_token_length: int = 1024
    tokenizer_name: str | None = "Qwen/Qwen2.5-1.5B-Instruct"
    source: str | None = Field(
        default=None, description="JSONL file or hub id, e.g. openai/gsm8k:main; None: the sample that comes along."
    )
    eval_source: str | None = Field(
        default=None, description="Held-out JSONL file, or hub id whose test split is used; None: a part of the source."
    )
    data: DataConfig | None = Field(
        default=None,
        description="Instead of source: a data set with its splits, read by loader=math unless it names another.",
    )
    eval_share: float = Field(
        default=0.2, gt=0, lt=1, description="Part of the source to hold out without eval_source."
    )
    eval_size: int = Field(default=200, ge=1, description="Held-out problems, at most.")
    max_tokens: int = Field(default=512, ge=1, description="Tokens of the longest reply.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")
    grader_timeout_s: float = Field(default=10.0, gt=0, description="Seconds to grade one reply.")

    @field_validator("data", mode="before")
    @classmethod
    def _word_problems(cls, value: Any) -> Any:
        # The general loader takes a whole solution for the answer where its mark is another than GSM8K's.
        return {"loader": "math", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_data_set(self) -> Self:
        given = [name for name in ("source", "eval_source") if getattr(self, name) is not None]
        if self.data is not None and given:
            raise ValueError(
                f"data says what to read, and so does {', '.join(given)}; give data alone, or leave it out"
            )
        return self


@dataclass(frozen=True)
class Problem:
    """A question as the model is asked, and what its answer is compared with."""

    question: str
    answer: str
    """A worked solution that ends in `#### answer`; of `data` the bare answer."""
    messages: list[Message]

    @classmethod
    def of_gsm8k(cls, row: Row) -> Problem:
        """A problem in the format of GSM8K."""
        prompt: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
        return cls(row["question"], row["answer"], prompt)

    @classmethod
    def of_data(cls, row: Row) -> Problem:
        """A problem of a row for reinforcement learning.

        Raises:
            ConfigError: the row has no prompt, or does not say what is right.
            DataError: the prompt is a chat in which no user asks in text.
        """
        if "prompt" not in row or row.get("ground_truth") is None:
            raise ConfigError(
                f"a row of data has the columns {', '.join(row)}; expected prompt and ground_truth: give data a loader and a "
                "form that make them, such as loader=math form=rl"
            )
        prompt = row["prompt"]
        asked: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return cls(question_of({"prompt": prompt}), str(row["ground_truth"]), asked)


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
        if config.data is not None:
            splits = await asyncio.to_thread(load_splits, config.data)
            rows, heldout, problem = splits.train, splits.eval, Problem.of_data
        else:
            rows, heldout = self._of_source()
            problem = Problem.of_gsm8k
        self.problems = shuffled_forever([problem(row) for row in rows], config.seed)
        self.heldout = [problem(row) for row in heldout[: config.eval_size]]

    def _of_source(self) -> tuple[list[Row], list[Row]]:
        config = self.config
        rows = load_rows(config.source or SAMPLE, fields=FIELDS)
        if config.eval_source:
            return rows, load_rows(config.eval_source, fields=FIELDS, split="test")
        return held_out(rows, config.eval_share, "question")

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
        rule = grade if self.config.data is None else grade_bare
        # On a process: math-verify keeps its own deadline with a signal, which only a main thread can have.
        return await self.run_blocking(
            rule, problem.answer, text, timeout_s=self.config.grader_timeout_s, in_process=True
        )

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy solutions of the held-out problems."""
        if not self.heldout:
            log.warning("no problem is held out, and nothing is evaluated; raise data.eval_split_ratio to change that")
            return {}
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
