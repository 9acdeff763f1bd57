"""An engine with routes of its own beside the OpenAI ones: it returns token ids, and may say which version it runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from atroposlib.envs.server_handling.engines.prompts import served_tokenizer
from atroposlib.envs.server_handling.openai_server import HEALTH_TIMEOUT_S, OpenAIServer
from atroposlib.errors import ModelServerError
from atroposlib.wire.layout import NOT_SAMPLED


class NativeServer(OpenAIServer):
    """What vLLM and SGLang have in common; a subclass speaks the engine's token routes."""

    @cached_property
    def tokenizer(self) -> Any:
        """The served model's, loaded at first use: only prompts given as text need it."""
        return served_tokenizer(self.config)

    async def check_health(self) -> None:
        """Alive, and for training also running published weights.

        Raises:
            ModelServerError: it is not.
        """
        answer = await self.http.get(f"{self.root_url}/health", timeout_s=HEALTH_TIMEOUT_S)
        if answer.status != 200:
            raise ModelServerError(f"inference server {self.api_url}: GET /health answered {answer.status}")
        if self.require_version and (version := await self._reported_version()) is not None:
            self._check_published([version])

    async def current_version(self) -> int | None:
        """The policy version that the engine says it runs; None where it does not say or nothing was published."""
        version = await self._reported_version()
        return None if version == NOT_SAMPLED else version

    @abstractmethod
    async def _reported_version(self) -> int | None:
        """NOT_SAMPLED: it says that nothing was published; None: it does not say."""

    def _check_published(self, versions: Sequence[int]) -> None:
        """Refuse what the engine says was sampled from weights that nobody published, where tokens are trained on."""
        if self.require_version and any(version < 0 for version in versions):
            raise ModelServerError(
                f"inference server {self.api_url} does not run a published policy version, so its tokens cannot be "
                "trained on; it can work once the trainer has published weights to it"
            )
