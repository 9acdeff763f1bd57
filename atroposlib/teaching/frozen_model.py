"""A model that never gets weights (student, reference): asked in chats, with the chat template of its own server."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from atroposlib.envs.gathering import all_or_none
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.errors import RolloutError, infrastructure_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatReply:
    """What a model said."""

    text: str
    tokens: int
    """That it produced."""
    finish_reason: str

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself, not at a limit."""
        return self.finish_reason == "stop"


@dataclass(frozen=True)
class Sampling:
    """How a reply is sampled."""

    temperature: float
    max_tokens: int
    split: str = "train"
    """Which of the servers' slots: train or eval."""


class FrozenModel:
    """Asks the servers of one model.

    Args:
        server: its pool.
        role: in error texts.
        failed: what is raised when it cannot be asked.
        tokenizer: counts tokens where a server does not say how many it produced; words are counted without one.
    """

    def __init__(
        self, server: ServerManager, *, role: str, failed: type[RolloutError] = RolloutError, tokenizer: Any = None
    ) -> None:
        self.server = server
        self.role = role
        self.counts: Counter[str] = Counter()
        """requests, failures."""
        self._failed = failed
        self._tokenizer = tokenizer

    @property
    def model_names(self) -> list[str]:
        """As its servers know the model."""
        return sorted({server.config.model_name for server in self.server.servers})

    def take_counts(self) -> dict[str, int]:
        """requests and failures since the last call."""
        taken, self.counts = self.counts, Counter()
        return {name: taken[name] for name in ("requests", "failures")}

    async def reply(self, prompt: str, sampling: Sampling) -> ChatReply:
        """One reply to a user message.

        Raises:
            RolloutError: of the type `failed`: no server answered.
        """
        self.counts["requests"] += 1
        try:
            answer: Any = await self.server.chat_completion(
                messages=[{"role": "user", "content": prompt}],
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                split=sampling.split,
            )
        except Exception as error:
            failure = infrastructure_error(error)
            if failure is None:
                raise
            self.counts["failures"] += 1
            raise self._failed(f"the {self.role} could not be asked: {failure}") from error
        return self._read(answer)

    async def attempts(self, prompt: str, n: int, sampling: Sampling) -> list[ChatReply]:
        """n replies side by side, without those that failed: a failure is no wrong answer."""
        replies = await all_or_none(self._reply_or_none(prompt, sampling) for _ in range(n))
        return [reply for reply in replies if reply is not None]

    async def _reply_or_none(self, prompt: str, sampling: Sampling) -> ChatReply | None:
        try:
            return await self.reply(prompt, sampling)
        except self._failed as error:
            log.warning("an attempt is left out: %s", error)
            return None

    def _read(self, answer: Any) -> ChatReply:
        choices = getattr(answer, "choices", None) or []
        reason = str(choices[0].finish_reason) if choices else "none"
        if not choices or reason == "abort":
            self.counts["failures"] += 1
            raise self._failed(f"the {self.role}'s server gave {len(choices)} choices, finish reason {reason}")
        # Half of a surrogate pair, which JSON can hold, is in no text that tokenizers, files or servers take.
        text = (choices[0].message.content or "").encode(errors="replace").decode()
        return ChatReply(text, self._tokens(answer, text), reason)

    def _tokens(self, answer: Any, text: str) -> int:
        counted = getattr(getattr(answer, "usage", None), "completion_tokens", None)
        if isinstance(counted, int):
            return counted
        return len(text.split()) if self._tokenizer is None else len(self._tokenizer.encode(text))
