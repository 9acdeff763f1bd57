"""Follow instructions about form and content; the reward is what small programs can verify of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, Message, ScoredDataGroup
from environments.instruction_following.constraints import Constraint, is_met, validated
from environments.rows import held_out, load_rows, shuffled_forever

SAMPLE = Path(__file__).parent / "data" / "instructions.jsonl"
FIELDS = {"prompt": str, "constraints": list}
THINK_END = "</think>"


class InstructionFollowingConfig(BaseEnvConfig):
    """Options of the task."""

    group_size: int = 8
    max_token_length: int = 1024
    tokenizer_name: str | None = "Qwen/Qwen2.5-1.5B-Instruct"
    source: str | None = Field(default=None, description="JSONL file or hub id; None: the sample that comes along.")
    eval_share: float = Field(default=0.2, gt=0, lt=1, description="Part of the instructions to hold out.")
    eval_size: int = Field(default=200, ge=1, description="Held-out instructions, at most.")
    max_tokens: int = Field(default=512, ge=1, description="Tokens of the longest reply.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")
    reward: Literal["share", "all"] = Field(
        default="share", description="share: the share of constraints that are met. all: 1 when every one is, else 0."
    )


@dataclass(frozen=True)
class Instruction:
    """What the model is told, and what of it can be checked."""

    prompt: str
    constraints: tuple[Constraint, ...]

    @property
    def messages(self) -> list[Message]:
        """What the model is asked."""
        return [{"role": "user", "content": self.prompt}]


def met(instruction: Instruction, text: str) -> list[bool]:
    """For each constraint, whether the reply, without the thinking before it, meets it."""
    said = text.rpartition(THINK_END)[2].strip()
    return [is_met(constraint, said) for constraint in instruction.constraints]


class InstructionFollowingEnv(BaseEnv):
    """Do as told; programs check it."""

    name = "instruction_following"
    env_config_cls = InstructionFollowingConfig

    @classmethod
    def config_init(cls) -> tuple[InstructionFollowingConfig, list[APIServerConfig]]:
        """One vLLM server on this machine."""
        config = InstructionFollowingConfig()
        server = APIServerConfig(
            base_url="http://localhost:9001/v1", model_name=str(config.tokenizer_name), server_type="vllm"
        )
        return config, [server]

    async def setup(self) -> None:
        """Load the instructions and hold some out."""
        config = self.config
        train, test = held_out(load_rows(config.source or SAMPLE, fields=FIELDS), config.eval_share, "prompt")
        self.instructions = shuffled_forever(
            [Instruction(row["prompt"], validated(row["constraints"])) for row in train], config.seed
        )
        self.heldout = [Instruction(row["prompt"], validated(row["constraints"])) for row in test[: config.eval_size]]

    async def get_next_item(self) -> Instruction:
        """The next training instruction."""
        return next(self.instructions)

    async def collect_trajectories(self, item: Instruction) -> tuple[ScoredDataGroup, list[Instruction]]:
        """group_size replies to one instruction."""
        group = await self.rollout_group(
            item.messages,
            reward=lambda text: self.pay(item, text),
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
        )
        return group, []

    def pay(self, instruction: Instruction, text: str) -> float:
        """The reward of one reply."""
        results = met(instruction, text)
        return fmean(results) if self.config.reward == "share" else float(all(results))

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy replies to the held-out instructions: the share of constraints met, and of replies that meet all."""
        samples = await self.evaluate_items(self.heldout, self._reply_greedily)
        results = [result for sample in samples for result in sample["met"]]
        metrics = {
            "heldout_reward": fmean(sample["score"] for sample in samples),
            "heldout_constraints_met": fmean(results),
            "heldout_all_met": fmean(all(sample["met"]) for sample in samples),
            "heldout_size": len(samples),
        }
        sampling = {"temperature": 0.0, "max_tokens": self.config.max_tokens}
        await self.evaluate_log(metrics, samples=samples, generation_parameters=sampling)
        return metrics

    async def _reply_greedily(self, instruction: Instruction) -> dict[str, Any]:
        [(text, _)] = await self.sample(
            instruction.messages, temperature=0.0, max_tokens=self.config.max_tokens, split="eval"
        )
        return {
            "question": instruction.prompt,
            "gold_answer": [dict(constraint) for constraint in instruction.constraints],
            "completion": text,
            "met": met(instruction, text),
            "score": self.pay(instruction, text),
        }
