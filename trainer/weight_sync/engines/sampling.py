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
