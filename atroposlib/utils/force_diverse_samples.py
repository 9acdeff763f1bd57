"""Samples replies that differ from their first token on. Experimental."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from atroposlib.utils.chat_tokens import as_messages, chat_token_ids


async def generate_with_diverse_first_tokens(
    self: Any,
    messages: Sequence[Any],
    prefill: str = "",
    n: int = 8,
    max_tokens: int = 4096,
    temperature: float = 1.0,
) -> list[str]:
    """One reply for each of the n likeliest first tokens.

    Args:
        self: an environment: its server and its tokenizer are used.
        prefill: text that every reply is made to begin with.
    Returns:
        Up to n texts, likeliest first token first, without the prefill.
    Raises:
        ModelServerError: no inference server answered.
    """
    prompt_ids = chat_token_ids(self.tokenizer, as_messages(messages), add_generation_prompt=True)
    prompt_ids += self.tokenizer.encode(prefill, add_special_tokens=False) if prefill else []
    firsts = await _likeliest_next(self, prompt_ids, n)

    async def go_on(first: int) -> str:
        _, outputs, _, _ = await self.server.tokens_and_logprobs_completion(
            input_ids=[*prompt_ids, first], n=1, max_tokens=max(1, max_tokens - 1), temperature=temperature
        )
        return str(self.tokenizer.decode([first, *outputs[0]], skip_special_tokens=True))

    async with asyncio.TaskGroup() as tasks:
        replies = [tasks.create_task(go_on(first)) for first in firsts]
    return [reply.result() for reply in replies]


async def _likeliest_next(env: Any, prompt_ids: Sequence[int], n: int) -> list[int]:
    """Ids of the n likeliest tokens after the prompt."""
    # Engines give top logprobs for the positions of a prompt. One more token, whichever, makes the next position one.
    probe = [*prompt_ids, prompt_ids[-1]]
    answer = await env.server.get_logprobs(input_ids=probe, top_k=n, max_tokens=1)
    ids, logprobs = answer["prompt_topk_token_ids"][-1], answer["prompt_topk_logprobs"][-1]
    ranked = sorted(zip(logprobs, ids, strict=True), key=lambda pair: -pair[0])
    return [token for _, token in ranked[:n]]
