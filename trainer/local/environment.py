"""The environment of local mode: the user's rows, sampled by the policy and paid by the user's reward functions."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from atroposlib.envs.base import BaseEnv, BaseEnvConfig
from atroposlib.envs.eval_items import evaluate_items
from atroposlib.envs.server_handling.managed_server import Reply
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.type_definitions import Message, ScoredDataGroup
from trainer.local.rewards import RewardFunctions, combined
from trainer.local.rows import Row, Rows, columns_of, endless_rows, is_conversation

log = logging.getLogger(__name__)

ROUNDS = 3
"""Requests for the completions of one group: those that no reward function judges are sampled again."""


class FunctionEnvConfig(BaseEnvConfig):
    """Options of the environment."""

    max_tokens: int = Field(default=256, ge=1, description="Tokens of a completion, at most.")
    temperature: float = Field(default=1.0, gt=0, description="Of training rollouts.")
    eval_temperature: float = Field(default=0.0, ge=0, description="Of evaluation.")
    sampling: dict[str, Any] = Field(default={}, description="Further sampling options of every request.")
    reward_timeout_s: float = Field(default=300.0, gt=0, description="Seconds for one call of a reward function.")


class FunctionEnv(BaseEnv):
    """Single-turn tasks out of a data set.

    Args:
        tokenizer: the policy's.
        rows: endless, in an order that config.seed decides.
        eval_rows: gone through once by each evaluation.
    """

    name = "local"
    env_config_cls = FunctionEnvConfig

    def __init__(
        self,
        config: FunctionEnvConfig,
        server_configs: list[APIServerConfig],
        *,
        tokenizer: Any,
        rows: Rows,
        rewards: RewardFunctions,
        eval_rows: Sequence[Row] = (),
    ) -> None:
        super().__init__(config, server_configs)
        self.tokenizer = tokenizer
        self.eval_rows = eval_rows
        self.rows_taken = 0
        """Also what a resumed run starts at."""
        self._rows = rows
        self._order: Iterator[Row] | None = None
        self._rewards = rewards
        self._sums: dict[str, list[float]] = {}

    async def get_next_item(self) -> Row:
        """The next row."""
        if self._order is None:
            # Not before: a checkpoint may have moved the start.
            self._order = endless_rows(self._rows, seed=self.config.seed, start=self.rows_taken)
        row = next(self._order)
        self.rows_taken += 1
        return row

    def save_checkpoint(self, step: int, data: dict[str, Any] | None = None) -> None:
        """Keep the place in the data set."""
        super().save_checkpoint(step, {"rows_taken": self.rows_taken, **(data or {})})

    async def collect_trajectories(self, item: Row) -> tuple[ScoredDataGroup | None, list[Row]]:
        """group_size completions of one prompt; nothing where the reward functions judge too few."""
        paid: list[tuple[Reply, float]] = []
        for _ in range(ROUNDS):
            replies = await self._complete(
                item["prompt"], n=self.config.group_size - len(paid), temperature=self.config.temperature
            )
            rewards = await self._pay(item, replies)
            paid += [(reply, r) for reply, r in zip(replies, rewards, strict=True) if r is not None]
            if len(paid) == self.config.group_size:
                return self._group(item["prompt"], paid), []
        log.warning("row left out: the reward functions judged %d of its completions: %.80r", len(paid), item["prompt"])
        return None, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Mean reward over eval_rows, one completion each; rows that no reward function judges do not count."""
        started = time.time()
        samples = await evaluate_items(
            self.eval_rows, self._evaluate_row, max_workers=max(1, self.config.max_eval_workers), progress=False
        )
        rewards = [sample["score"] for sample in samples if sample["score"] is not None]
        metrics: dict[str, Any] = {"heldout_size": len(rewards)}
        if rewards:
            metrics["heldout_reward"] = sum(rewards) / len(rewards)
        await self.evaluate_log(
            metrics,
            start_time=started,
            samples=samples,
            generation_parameters={"temperature": self.config.eval_temperature, "max_tokens": self.config.max_tokens},
            verbose=False,
        )
        return metrics

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        """Add the mean of every reward function since the last log."""
        sums, self._sums = self._sums, {}
        means = {f"reward/{name}": sum(values) / len(values) for name, values in sums.items() if values}
        await super().wandb_log({**means, **(wandb_metrics or {})})

    async def _evaluate_row(self, row: Row) -> dict[str, Any]:
        [reply] = await self._complete(row["prompt"], n=1, temperature=self.config.eval_temperature, split="eval")
        [score] = await self._pay(row, [reply], is_training=False)
        return {"prompt": row["prompt"], "completion": reply.text, "score": score, "finish_reason": reply.finish_reason}

    async def _complete(self, prompt: str | Sequence[Mapping[str, Any]], **sampling: Any) -> list[Reply]:
        """n completions in one request. A last message of the assistant's is what they begin with."""
        sampling = {"max_tokens": self.config.max_tokens, **self.config.sampling, **sampling}
        async with self.server.managed_server(tokenizer=self.tokenizer) as session:
            if isinstance(prompt, str):
                answer = await session.completion(prompt=prompt, **sampling)
                nodes = session.get_state()["nodes"]
                return [
                    Reply(node, choice.text, choice.finish_reason)
                    for node, choice in zip(nodes, answer.choices, strict=True)
                ]
            messages, prefill = _split_prefill(prompt)
            replies: list[Reply] = await session.sample_replies(messages=messages, prefill=prefill, **sampling)
            return replies

    async def _pay(self, row: Row, replies: Sequence[Reply], *, is_training: bool = True) -> list[float | None]:
        """[n] rewards of completions of one row."""
        prompt, n = row["prompt"], len(replies)
        columns = {
            **{key: [value] * n for key, value in columns_of(row).items()},
            "prompts": [prompt] * n,
            "completions": [_completion(prompt, reply.text) for reply in replies],
            "completion_ids": [list(reply.node.completion_ids) for reply in replies],
        }
        rewards_FN = await self._rewards.score(
            columns, on_thread=self._on_thread, timeout_s=self.config.reward_timeout_s
        )
        if is_training:
            for name, rewards_N in zip(self._rewards.names, rewards_FN, strict=True):
                self._sums.setdefault(name, []).extend(r for r in rewards_N if r is not None)
        return combined(rewards_FN, self._rewards.weights)

    async def _on_thread(self, call: Any) -> Any:
        return await self._blocking.run(call, timeout_s=self.config.reward_timeout_s, limit="reward_timeout_s")

    def _group(self, prompt: str | Sequence[Mapping[str, Any]], paid: Sequence[tuple[Reply, float]]) -> ScoredDataGroup:
        nodes = [reply.node for reply, _ in paid]
        group = ScoredDataGroup(
            tokens=[node.tokens for node in nodes],
            masks=[node.masked_tokens for node in nodes],
            scores=[reward for _, reward in paid],
            inference_logprobs=[node.logprobs for node in nodes],
            policy_versions=[node.policy_versions for node in nodes],
            finish_reasons=[reply.finish_reason for reply, _ in paid],
            generation_params={"temperature": self.config.temperature, **self.config.sampling},
        )
        if is_conversation(prompt):
            messages, prefill = _split_prefill(prompt)  # type: ignore[arg-type]
            group["messages"] = [
                [*messages, {"role": "assistant", "content": prefill + reply.text}] for reply, _ in paid
            ]
        return group


def _split_prefill(prompt: Sequence[Mapping[str, Any]]) -> tuple[list[Message], str]:
    """Messages to answer, and how the answer begins."""
    messages: list[Message] = [dict(message) for message in prompt]  # type: ignore[misc]
    if messages[-1]["role"] != "assistant":
        return messages, ""
    return messages[:-1], str(messages[-1]["content"])


def _completion(prompt: Any, text: str) -> Any:
    """As reward functions expect it: messages where the prompt is a conversation, else text."""
    return [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
