"""Inference server clients without a server, for tests of the manager: they answer, hang, fail and recover on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion

from atroposlib.envs.server_handling.engines.engine_load import EngineLoad
from atroposlib.envs.server_handling.engines.samples import TokenCompletion, TokenSamples
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.errors import ModelServerError
from atroposlib.type_definitions import VersionRuns

FAILED = "it is on fire"


class FakeServer(APIServer):
    """Answers at once while `open` is set, else when it is set."""

    def __init__(self, config: APIServerConfig, reasoning_config: Any = None) -> None:
        super().__init__(config, reasoning_config)
        self.open = asyncio.Event()
        self.open.set()
        self.is_down = False
        self.fail_next: list[Exception] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.checks = 0
        self.now = 0
        self.peak = 0
        self.is_closed = False
        self.versions: list[int | None] = []
        """Answers of current_version, in order; the last one stays."""
        self.token_versions: VersionRuns = [(-1, 2)]
        self.metrics: EngineLoad | None = None

    async def check_health(self) -> None:
        self.checks += 1
        if self.is_down:
            raise ModelServerError(f"{self.config.base_url}: {FAILED}")

    async def current_version(self) -> int | None:
        return self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]

    async def engine_load(self) -> EngineLoad | None:
        return self.metrics

    async def close(self) -> None:
        self.is_closed = True

    async def _serve(self, kind: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((kind, kwargs))
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            await asyncio.sleep(0)
            await self.open.wait()
            if self.is_down:
                raise ModelServerError(f"{self.config.base_url}: {FAILED}")
            if self.fail_next:
                raise self.fail_next.pop(0)
        finally:
            self.now -= 1

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        await self._serve("chat", kwargs)
        return ChatCompletion.model_validate(
            {
                "id": "x", "created": 0, "model": "m", "object": "chat.completion", "usage": usage(kwargs.get("n", 1)),
                "choices": [
                    {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": self.config.base_url}}
                    for i in range(kwargs.get("n", 1))
                ],
            }
        )  # fmt: skip

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        await self._serve("text", kwargs)
        return Completion.model_validate(
            {
                "id": "x", "created": 0, "model": "m", "object": "text_completion",
                "choices": [
                    {"index": i, "finish_reason": "stop", "text": self.config.base_url} for i in range(kwargs.get("n", 1))
                ],
            }
        )  # fmt: skip

    async def _sample_tokens_wrapper(self, **kwargs: Any) -> TokenSamples:
        await self._serve("tokens", kwargs)
        return TokenSamples(
            prompt_ids=kwargs["input_ids"],
            completions=[TokenCompletion([7, 8], [-0.5, -0.5], "stop", self.token_versions)],
        )

    async def _get_logprobs_wrapper(self, **kwargs: Any) -> dict[str, Any]:
        await self._serve("logprobs", kwargs)
        return {"prompt_tokens": kwargs["input_ids"], "prompt_topk_token_ids": [], "prompt_topk_logprobs": []}


def usage(n: int) -> CompletionUsage:
    return CompletionUsage(prompt_tokens=3, completion_tokens=2 * n, total_tokens=3 + 2 * n)


class TextServer(FakeServer):
    """Returns no token ids."""

    returns_tokens = False


def a_pool(names: str, *, cls: type[FakeServer] = FakeServer, **config: Any) -> tuple[ServerManager, Sequence[Any]]:
    """A manager over one fake server for each letter, and those servers."""
    settings = {"timeout": 10, **config}
    manager = ServerManager(
        [APIServerConfig(base_url=f"http://{name}/v1", **settings) for name in names], server_class=cls
    )
    return manager, manager.servers


async def until(condition: Any, *, timeout_s: float = 5.0) -> None:
    """Let other tasks run until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
