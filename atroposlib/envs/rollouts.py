"""Single-turn rollouts: one request for the whole group, one reward for each completion."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from atroposlib.envs.gathering import all_or_none
from atroposlib.envs.server_handling.managed_server import SequenceNode
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.errors import RolloutError, infrastructure_error
from atroposlib.type_definitions import Message, ScoredDataGroup

log = logging.getLogger(__name__)

Reward: TypeAlias = Callable[[str], float | Awaitable[float]]
"""Pays one completion, given its text."""


async def sample_texts(
    server: ServerManager, tokenizer: Any, messages: Sequence[Message], *, prefill: str = "", **sampling: Any
) -> list[tuple[str, SequenceNode]]:
    """Sample n completions of a chat: each with its text (prefill excluded) and its exact tokens.

    Args:
        prefill: text that the reply is made to begin with.
    """
    async with server.managed_server(tokenizer=tokenizer) as session:
        replies = await session.sample_replies(messages=messages, prefill=prefill, **sampling)
    return [(reply.text, reply.node) for reply in replies]


async def rollout_group(
    server: ServerManager,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    reward: Reward,
    group_size: int,
    min_valid: int,
    prefill: str = "",
    **sampling: Any,
) -> ScoredDataGroup:
    """Sample group_size completions in one request and pay each.

    Args:
        reward: called with each completion's text. A RolloutError from it (dead grader, time-out) excludes that
            sequence instead of paying it 0.
        min_valid: sequences that must be left.
    Raises:
        RolloutError: the servers failed, or fewer than min_valid sequences could be paid.
    """
    sampled = await sample_texts(server, tokenizer, messages, prefill=prefill, n=group_size, **sampling)
    rewards = await all_or_none(_pay(reward, text) for text, _ in sampled)
    paid = [(text, node, value) for (text, node), value in zip(sampled, rewards, strict=True) if value is not None]
    if len(paid) < min_valid:
        raise RolloutError(
            f"the reward function could pay {len(paid)} of {len(sampled)} completions, {min_valid} are needed"
        )
    return ScoredDataGroup(
        tokens=[node.tokens for _, node, _ in paid],
        masks=[node.masked_tokens for _, node, _ in paid],
        scores=[value for _, _, value in paid],
        inference_logprobs=[node.logprobs for _, node, _ in paid],
        policy_versions=[node.policy_versions for _, node, _ in paid],
        finish_reasons=[(node.metadata or {}).get("finish_reason", "") for _, node, _ in paid],
        messages=[[*messages, {"role": "assistant", "content": prefill + text}] for text, _, _ in paid],
        generation_params=dict(sampling),
    )


async def _pay(reward: Reward, text: str) -> float | None:
    try:
        value = reward(text)
        return float(await value if inspect.isawaitable(value) else value)
    except Exception as error:
        failure = infrastructure_error(error)
        if failure is None:
            raise
        log.warning("reward function failed, sequence excluded: %s", failure)
        return None
