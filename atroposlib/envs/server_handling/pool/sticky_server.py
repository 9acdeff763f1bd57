"""What a conversation sees of the pool: one server, with the others behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    from atroposlib.envs.server_handling.engines.samples import TokenSamples
    from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
    from atroposlib.envs.server_handling.server_manager import ServerManager


class StickyServer:
    """Every request prefers the conversation's server, where its prefix is cached; another answers if that one fails.

    Args:
        server: where the conversation settled.
    """

    def __init__(self, manager: ServerManager, server: APIServer) -> None:
        self._manager = manager
        self._server = server

    @property
    def config(self) -> APIServerConfig:
        """Of the conversation's server: the model's and the tokenizer's name."""
        return self._server.config

    @property
    def tokenizer(self) -> Any:
        """The server's, where its class has one.

        Raises:
            AttributeError: it has none.
        """
        return self._server.tokenizer  # type: ignore[attr-defined]

    async def sample_tokens(self, **kwargs: Any) -> TokenSamples:
        """As ServerManager.sample_tokens."""
        return await self._manager.sample_tokens(prefer=self._server, **kwargs)

    async def tokens_and_logprobs_completion(
        self, **kwargs: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[str]]:
        """As ServerManager.tokens_and_logprobs_completion."""
        return await self._manager.tokens_and_logprobs_completion(prefer=self._server, **kwargs)

    async def get_logprobs(self, **kwargs: Any) -> dict[str, Any]:
        """As ServerManager.get_logprobs."""
        return await self._manager.get_logprobs(prefer=self._server, **kwargs)

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """As ServerManager.chat_completion."""
        return await self._manager.chat_completion(prefer=self._server, **kwargs)

    async def completion(self, **kwargs: Any) -> Completion:
        """As ServerManager.completion."""
        return await self._manager.completion(prefer=self._server, **kwargs)
