"""What the start-up probe needs of an inference server: to sample, and to say how it reads a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Completion:
    """What an engine sampled after one prompt."""

    token_ids: list[int]
    logprobs: list[float]
    """Nats, one for each token, as the engine reports them to environments."""


def completion(token_ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
    """Raises TypeError or ValueError where an engine's answer holds no numbers, or not one logprob for each token."""
    found = Completion([int(token) for token in token_ids], [float(nats) for nats in logprobs])
    if len(found.token_ids) != len(found.logprobs) or not found.token_ids:
        raise ValueError(f"{len(found.logprobs)} logprobs for {len(found.token_ids)} tokens")
    return found


def one_each(completions: list[Completion], prompts: Sequence[object]) -> list[Completion]:
    """Raises ValueError unless there is one for each prompt."""
    if len(completions) != len(prompts):
        raise ValueError(f"{len(completions)} completions for {len(prompts)} prompts")
    return completions


class SamplingControl(Protocol):
    """One inference server. Every call raises ServerSyncError when it does not answer within timeout_s (seconds)."""

    @property
    def url(self) -> str:
        """Base URL, without /v1."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        seed: int = 0,
        model: str | None = None,
        timeout_s: float,
    ) -> list[Completion]:
        """Sample max_tokens tokens after each prompt, past an end of text if need be.

        Args:
            prompts: token ids.
            model: the served name, e.g. of an adapter; None: the first one that it serves.
        """

    def chat_token_ids(
        self, messages: Sequence[Mapping[str, str]], *, model: str | None = None, timeout_s: float
    ) -> list[int]:
        """The prompt that the server makes of a conversation, with the opening of the answer."""
