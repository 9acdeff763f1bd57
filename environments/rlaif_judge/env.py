"""RlaifJudgeEnv: a second model compares the replies of a group; its failures exclude, they never pay 0."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from atroposlib.envs.base import (
    APIServerConfig,
    BaseEnv,
    BaseEnvConfig,
    Message,
    ScoredDataGroup,
    ServerBaseline,
    ServerManager,
)
from atroposlib.errors import RolloutError
from environments.rlaif_judge.judge import Judge
from environments.rlaif_judge.ranking import ring, win_shares
from environments.rows import held_out, load_rows, shuffled_forever

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent / "data" / "requests.jsonl"
JUDGE_API_KEY = "JUDGE_API_KEY"
"""Environment variable: a key on the command line would end up in logs."""


class RlaifJudgeConfig(BaseEnvConfig):
    """Options of the task."""

    group_size: int = 4
    max_token_length: int = 1024
    tokenizer_name: str | None = "models/SmolLM2-135M-Instruct"
    source: str | None = Field(
        default=None, description="JSONL file or hub id with request and reference; None: the sample that comes along."
    )
    eval_share: float = Field(default=0.25, gt=0, lt=1, description="Share of the requests held out for evaluation.")
    judge_base_url: str | None = Field(
        default=None, description="OpenAI-compatible server of the judge; none: the policy's own servers judge."
    )
    judge_model: str = Field(default="judge", description="Model name sent to judge_base_url.")
    judge_mode: Literal["compare", "rate"] = Field(
        default="compare", description="compare: pairs of replies, in both orders. rate: each reply alone, 1 to 10."
    )
    judge_max_tokens: int = Field(default=256, ge=1, description="Tokens of one verdict with its reasons.")
    judge_timeout_s: int = Field(default=120, ge=1, description="Seconds that one verdict may take.")
    opponents: int = Field(default=1, ge=1, description="compare: replies of the group that each one is set against.")
    max_tokens: int = Field(default=256, ge=1, description="Tokens of one reply.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts; evaluation is greedy.")


@dataclass(frozen=True)
class Request:
    """What the policy is asked, and a reply that evaluation compares with."""

    text: str
    reference: str

    @property
    def messages(self) -> list[Message]:
        """As a chat."""
        return [{"role": "user", "content": self.text}]


class RlaifJudgeEnv(BaseEnv):
    """Follow short requests; paid by a judge model that compares the replies of a group."""

    name = "rlaif_judge"
    env_config_cls = RlaifJudgeConfig

    def __init__(
        self,
        config: RlaifJudgeConfig,
        server_configs: ServerBaseline | list[APIServerConfig],
        slurm: bool = False,
        testing: bool = False,
    ) -> None:
        super().__init__(config, server_configs, slurm, testing)
        self.judge_server = self.server if config.judge_base_url is None else judge_server(config)
        self.judge = Judge(self.judge_server, max_tokens=config.judge_max_tokens)

    @classmethod
    def config_init(cls) -> tuple[RlaifJudgeConfig, list[APIServerConfig]]:
        """One vLLM server on this machine, which judges too unless judge_base_url is set."""
        return RlaifJudgeConfig(), [
            APIServerConfig(base_url="http://localhost:9001/v1", model_name="smollm2-135m", server_type="vllm")
        ]

    async def setup(self) -> None:
        """Load the requests."""
        rows = load_rows(self.config.source or SAMPLE, fields={"request": str, "reference": str})
        train, test = held_out(rows, self.config.eval_share, "request")
        self.heldout = [Request(row["request"], row["reference"]) for row in test]
        self.requests = shuffled_forever([Request(row["request"], row["reference"]) for row in train], self.config.seed)

    async def get_next_item(self) -> Request:
        """The next training request."""
        return next(self.requests)

    async def collect_trajectories(self, item: Request) -> tuple[ScoredDataGroup, list[Request]]:
        """group_size replies, judged."""
        sampling = {"temperature": self.config.temperature, "max_tokens": self.config.max_tokens}
        if self.config.judge_mode == "rate":
            # A RolloutError of the reward leaves that reply out.
            return await self.rollout_group(
                item.messages, reward=lambda text: self.judge.rate(item.text, text), **sampling
            ), []
        sampled = await self.sample(item.messages, n=self.config.group_size, **sampling)
        shares = await self.compare_all(item, [text for text, _ in sampled])
        judged = [(*one, share) for one, share in zip(sampled, shares, strict=True) if share is not None]
        needed = self.config.min_valid_per_group or self.config.group_size
        if len(judged) < needed:
            raise RolloutError(f"the judge could compare {len(judged)} of {len(sampled)} replies, {needed} are needed")
        return group_of(item, judged, sampling), []

    async def compare_all(self, request: Request, replies: list[str]) -> list[float | None]:
        """The share of its comparisons that each reply wins; None where the judge failed in all of them."""
        pairs = ring(len(replies), self.config.opponents)
        results = await asyncio.gather(
            *(self._compare(request, replies[first], replies[second]) for first, second in pairs)
        )
        return win_shares(len(replies), dict(zip(pairs, results, strict=True)))

    async def _compare(self, request: Request, a: str, b: str) -> float | None:
        if a == b:
            return 0.5
        try:
            return await self.judge.compare(request.text, a, b)
        except RolloutError as error:
            log.warning("a comparison is left out: %s", error)
            return None

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Greedy replies to the held-out requests, each compared with its reference."""
        samples = await self.evaluate_items(self.heldout, self._compare_with_reference)
        metrics = {
            "heldout_win_rate": fmean(sample["score"] for sample in samples),
            "heldout_size": len(samples),
        }
        await self.evaluate_log(metrics, samples=samples, generation_parameters={"temperature": 0.0})
        return metrics

    async def _compare_with_reference(self, request: Request) -> dict[str, Any]:
        [(text, _)] = await self.sample(
            request.messages, temperature=0.0, max_tokens=self.config.max_tokens, split="eval"
        )
        score = await self.judge.compare(request.text, text, request.reference, split="eval")
        return {"question": request.text, "gold_answer": request.reference, "completion": text, "score": score}

    async def aclose(self) -> None:
        """Close the judge's connections too."""
        try:
            await super().aclose()
        finally:
            if self.judge_server is not self.server:
                await self.judge_server.close()


def judge_server(config: RlaifJudgeConfig) -> ServerManager:
    """The judge's own server."""
    return ServerManager(
        [
            APIServerConfig(
                base_url=config.judge_base_url,
                model_name=config.judge_model,
                api_key=os.environ.get(JUDGE_API_KEY, ""),
                timeout=config.judge_timeout_s,
            )
        ]
    )


def group_of(request: Request, judged: list[tuple[str, Any, float]], sampling: dict[str, Any]) -> ScoredDataGroup:
    """Replies with their exact tokens and win shares, as a group."""
    nodes = [node for _, node, _ in judged]
    return ScoredDataGroup(
        tokens=[node.tokens for node in nodes],
        masks=[node.masked_tokens for node in nodes],
        scores=[share for *_, share in judged],
        inference_logprobs=[node.logprobs for node in nodes],
        policy_versions=[node.policy_versions for node in nodes],
        finish_reasons=[(node.metadata or {}).get("finish_reason", "") for node in nodes],
        messages=[[*request.messages, {"role": "assistant", "content": text}] for text, *_ in judged],
        generation_params=sampling,
    )
