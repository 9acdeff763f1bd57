"""Supervised data as groups of a run: nothing is sampled, every row is its own right answer."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

from pydantic import Field

from atroposlib.data.chats import tokenized
from atroposlib.data.registry import Row
from atroposlib.data.trained_text import TrainedText
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from environments.rows import held_out, load_rows, shuffled_forever
from environments.sft_loader.rows import check_rows, prompt_key

log = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent / "data" / "chats.jsonl"


class SFTLoaderConfig(BaseEnvConfig):
    """Options of the loader."""

    group_size: int = Field(default=1, ge=1, description="Rows of a group.")
    max_token_length: int = Field(default=2048, ge=1, description="Longer rows are left out.")
    tokenizer_name: str | None = "Qwen/Qwen2.5-1.5B-Instruct"
    inference_weight: float = Field(
        default=-1.0, description="0 or less: only places that no other environment wants. Above: a share of the batch."
    )
    source: str | None = Field(default=None, description="JSONL file or hub id; None: the sample that comes along.")
    split: str = Field(default="train", description="Split of a hub data set.")
    epochs: int | None = Field(default=None, ge=1, description="Times that each row is given; None: without end.")
    trains_all_turns: bool = Field(
        default=False, description="Train on every turn of the assistant; without it on the last one of a chat."
    )
    eval_share: float = Field(default=0.1, gt=0, lt=1, description="Part of the rows to hold out.")
    eval_size: int = Field(default=200, ge=1, description="Held-out rows, at most.")


class SFTLoaderEnv(BaseEnv):
    """Hands out rows of supervised data; evaluation measures the policy's surprise at held-out ones."""

    name = "sft_loader"
    env_config_cls = SFTLoaderConfig

    @classmethod
    def config_init(cls) -> tuple[SFTLoaderConfig, list[APIServerConfig]]:
        """One vLLM server on this machine, which evaluation alone asks."""
        config = SFTLoaderConfig()
        server = APIServerConfig(
            base_url="http://localhost:9001/v1", model_name=str(config.tokenizer_name), server_type="vllm"
        )
        return config, [server]

    async def setup(self) -> None:
        """Load the rows and hold some out."""
        config = self.config
        source = config.source or SAMPLE
        rows = load_rows(source, fields={}, split=config.split)
        check_rows(rows, str(source))
        train, test = held_out(rows, config.eval_share, prompt_key)
        stream = shuffled_forever(train, config.seed)
        self.rows = stream if config.epochs is None else itertools.islice(stream, config.epochs * len(train))
        self.heldout = test[: config.eval_size]

    async def get_next_item(self) -> list[Row] | None:
        """The rows of the next group; None when every epoch is over."""
        return list(itertools.islice(self.rows, self.config.group_size)) or None

    async def collect_trajectories(self, item: list[Row]) -> tuple[ScoredDataGroup | None, list[list[Row]]]:
        """The rows as one group, without those that are too long."""
        texts = [text for row in item if (text := self._tokenized(row)) is not None]
        if not texts:
            return None, []
        group = ScoredDataGroup(
            tokens=[text.tokens for text in texts],
            masks=[text.masks for text in texts],
            scores=[1.0] * len(texts),
            # Given outright: there is nothing in the group that a row could be compared with.
            advantages=[1.0] * len(texts),
            overrides=[{"sft": True} for _ in texts],
            group_overrides={"sft": True, "group_size": len(texts)},
        )
        if all(text.messages is not None for text in texts):
            group["messages"] = [text.messages for text in texts]
        return group, []

    def _tokenized(self, row: Row) -> TrainedText | None:
        text, limit = self._whole(row), self.config.max_token_length
        if len(text.tokens) <= limit:
            return text
        log.warning("left out a row of %d tokens: max_token_length=%d", len(text.tokens), limit)
        return None

    def _whole(self, row: Row) -> TrainedText:
        return tokenized(row, self.tokenizer, trains_all_turns=self.config.trains_all_turns)

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Mean surprise at the trained tokens of held-out rows, in nats."""
        samples = await self.evaluate_items(self.heldout, self._surprise)
        n_tokens = sum(sample["tokens"] for sample in samples)
        nats = -sum(sample["score"] * sample["tokens"] for sample in samples) / n_tokens
        metrics = {
            "heldout_nats_per_token": nats,
            "heldout_perplexity": math.exp(nats),
            "heldout_tokens": n_tokens,
            "heldout_size": len(samples),
        }
        await self.evaluate_log(metrics, samples=samples, generation_parameters={})
        return metrics

    async def _surprise(self, row: Row) -> dict[str, Any]:
        """The mean logprob of a row's trained tokens under the policy."""
        text = self._whole(row)
        scored = await self.server.get_logprobs(input_ids=text.tokens, top_k=1, split="eval")
        # The first token has no logprob: nothing comes before it.
        trained = [position for position in text.trained if position > 0]
        logprobs = [scored["prompt_topk_logprobs"][position][0] for position in trained]
        return {"row": row, "tokens": len(logprobs), "score": sum(logprobs) / len(logprobs)}
