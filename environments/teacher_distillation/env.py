"""WordProblemsTeacherEnv: replies of the policy, a reward of their own, and a teacher's opinion of every token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from atroposlib.envs.base import APIServerConfig, Message, ScoredDataGroup
from atroposlib.envs.teacher_distillation_env import TeacherDistillationConfig, TeacherDistillationEnv
from atroposlib.type_definitions import MASKED
from environments.rows import held_out, load_rows, shuffled_forever

SAMPLE = Path(__file__).parent / "data" / "problems.jsonl"
SYSTEM = "Solve the problem in a few short steps. End with a line: Answer: N"
POLICY = "models/SmolLM2-135M-Instruct"
_ANSWER = re.compile(r"answer:\s*(-?[0-9][0-9,]{0,30})", re.I)


class WordProblemsConfig(TeacherDistillationConfig):
    """Options of the task, beside those of every distillation."""

    group_size: int = 4
    max_token_length: int = 1024
    tokenizer_name: str | None = POLICY
    teacher_enabled: bool = True
    teacher_top_k: int = Field(default=8, ge=-1, description="Candidates for each token, beside the token itself.")
    ensure_scores_are_not_same: bool = Field(
        default=False, description="Off: the teacher has something to say about a group with equal rewards too."
    )
    source: str | None = Field(
        default=None, description="JSONL file or hub id with question and answer; None: the sample that comes along."
    )
    eval_share: float = Field(default=0.25, gt=0, lt=1, description="Share of the problems held out for evaluation.")
    max_tokens: int = Field(default=192, ge=1, description="Tokens of one reply.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")


@dataclass(frozen=True)
class Problem:
    """A question with a whole number as its answer."""

    question: str
    answer: int

    @property
    def messages(self) -> list[Message]:
        """What the model is asked."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.question}]


def reward(problem: Problem, text: str) -> float:
    """1.0 when the last `Answer:` of a reply is right, else 0.0."""
    answers = _ANSWER.findall(text)
    return float(bool(answers) and int(answers[-1].replace(",", "")) == problem.answer)


class WordProblemsTeacherEnv(TeacherDistillationEnv):
    """Short word problems; a teacher says how probable it finds each token of the policy's replies."""

    name = "teacher_distillation"
    env_config_cls = WordProblemsConfig

    @classmethod
    def config_init(cls) -> tuple[WordProblemsConfig, list[APIServerConfig]]:
        """The policy on one vLLM server of this machine."""
        return WordProblemsConfig(), [
            APIServerConfig(base_url="http://localhost:9001/v1", model_name="smollm2-135m", server_type="vllm")
        ]

    @classmethod
    def teacher_config_init(cls) -> list[APIServerConfig]:
        """The teacher on another, with the policy's tokenizer."""
        return [
            APIServerConfig(
                base_url="http://localhost:9002/v1", model_name="teacher", server_type="vllm", tokenizer_name=POLICY
            )
        ]

    async def setup(self) -> None:
        """Load the problems."""
        rows = load_rows(self.config.source or SAMPLE, fields={"question": str, "answer": int})
        train, test = held_out(rows, self.config.eval_share, "question")
        self.heldout = [Problem(row["question"], row["answer"]) for row in test]
        self.problems = shuffled_forever([Problem(row["question"], row["answer"]) for row in train], self.config.seed)

    async def get_next_item(self) -> Problem:
        """The next training problem."""
        return next(self.problems)

    async def collect_trajectories(self, item: Problem) -> tuple[ScoredDataGroup, list[Problem]]:
        """group_size replies; the teacher is asked about them when they are sent."""
        group = await self.rollout_group(
            item.messages,
            reward=lambda text: reward(item, text),
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
        )
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy replies to the held-out problems: how many are right, and what the teacher thinks of them."""
        samples = await self.evaluate_items(self.heldout, self._answer_greedily)
        metrics = {"heldout_reward": fmean(sample["score"] for sample in samples), "heldout_size": len(samples)}
        if self.teacher_server is not None:
            metrics["heldout_teacher_logprob"] = fmean(sample["teacher_logprob"] for sample in samples)
        await self.evaluate_log(metrics, samples=samples, generation_parameters={"temperature": 0.0})
        return metrics

    async def _answer_greedily(self, problem: Problem) -> dict[str, Any]:
        [(text, node)] = await self.sample(
            problem.messages, temperature=0.0, max_tokens=self.config.max_tokens, split="eval"
        )
        sample = {
            "question": problem.question,
            "gold_answer": str(problem.answer),
            "completion": text,
            "score": reward(problem, text),
        }
        if self.teacher_server is not None:
            sample["teacher_logprob"] = await self.teacher_logprob(node.tokens, node.masked_tokens)
        return sample

    async def teacher_logprob(self, tokens: list[int], masks: list[int]) -> float:
        """Mean over the sampled tokens of the teacher's logprobs, in nats a token.

        Raises:
            RolloutError: no teacher answered.
        """
        assert self.teacher_server is not None
        answer = await self.teacher_server.get_logprobs(input_ids=tokens, top_k=0, max_tokens=1, split="eval")
        columns = zip(answer["prompt_topk_logprobs"], masks, strict=True)
        # The token itself comes first of a position's candidates.
        return fmean(logprobs[0] for logprobs, mask in columns if mask != MASKED)
