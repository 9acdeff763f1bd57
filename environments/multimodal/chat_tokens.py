"""Replies over the chat route with their exact tokens: pictures go through there, the token route takes ids alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atroposlib.errors import RolloutError
from atroposlib.type_definitions import MASKED

UNSAMPLED_LOGPROB = 1.0
ASK_FOR_TOKENS: Mapping[str, Any] = {
    "logprobs": True,
    "top_p": 1.0,
    # Said outright, so that the model's generation_config changes nothing: the trainer must know the distribution.
    "extra_body": {"return_token_ids": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
}
"""What makes vLLM's chat route return token ids and the logprobs of the sampled ones."""


@dataclass(frozen=True)
class ChatSample:
    """One reply as the trainer needs it."""

    text: str
    tokens: list[int]
    """Prompt, with the engine's own image tokens, and completion."""
    masks: list[int]
    logprobs: list[float]
    finish_reason: str


def chat_samples(answer: Any) -> list[ChatSample]:
    """The choices of a chat completion that was asked for with ASK_FOR_TOKENS.

    Raises:
        RolloutError: the server does not return token ids over chat, or its logprobs are not theirs.
    """
    prompt = getattr(answer, "prompt_token_ids", None)
    return [_sample(prompt, choice) for choice in answer.choices]


def _sample(prompt: list[int] | None, choice: Any) -> ChatSample:
    completion = getattr(choice, "token_ids", None)
    if prompt is None or completion is None:
        raise RolloutError(
            "the server returned no token ids with a chat completion; serve the model with vLLM, which knows return_token_ids"
        )
    logprobs = [entry.logprob for entry in (choice.logprobs.content or [])] if choice.logprobs else []
    if len(logprobs) != len(completion):
        raise RolloutError(f"the server returned {len(logprobs)} logprobs for {len(completion)} sampled tokens")
    return ChatSample(
        text=choice.message.content or "",
        tokens=[*prompt, *completion],
        masks=[MASKED] * len(prompt) + list(completion),
        logprobs=[UNSAMPLED_LOGPROB] * len(prompt) + logprobs,
        finish_reason=choice.finish_reason or "",
    )
