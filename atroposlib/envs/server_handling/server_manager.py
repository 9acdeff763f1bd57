"""Requests over several inference servers: the least busy one that is well gets the next; failures go to another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from atroposlib.envs.server_handling.busy_clock import BusyClock
from atroposlib.envs.server_handling.managed_server import ManagedServer
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig, ServerBaseline
from atroposlib.envs.server_handling.vllm_server import VLLMServer
from atroposlib.errors import ConfigError, ModelServerError

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    from atroposlib.envs.server_handling.samples import TokenSamples

DEFAULT_PORTS = (9004, 9005, 9006, 9007)
MAX_TRIES = 8
HEALTH_POLL_S = 0.25

_SERVER_CLASSES: dict[str, type[APIServer]] = {"openai": OpenAIServer, "vllm": VLLMServer}


class ServerManagerConfig(BaseModel):
    """Options of the manager itself."""

    slurm: bool = Field(default=False, description="Find the inference servers from the SLURM variables.")
    testing: bool = Field(default=False, description="Replace the servers by a harness of canned answers.")
    max_n_completions: int = Field(default=8, ge=1, description="Chat requests for more choices than this are split.")


class ServerManager:
    """Routes requests to inference servers.

    Args:
        configs: one entry a server; a bare APIServerConfig is one server; a ServerBaseline means four local ports.
        server_class: client class of every server; the abstract APIServer chooses by each config's server_type.
        max_n_completions: a chat or text request for more choices is split. Token requests never are.
    """

    def __init__(
        self,
        configs: ServerBaseline | Sequence[APIServerConfig],
        server_class: type[APIServer] = APIServer,
        slurm: bool = False,
        testing: bool = False,
        max_n_completions: int = 8,
        reasoning_config: Any = None,
    ) -> None:
        self.max_n_completions = max_n_completions
        self.reasoning_config = reasoning_config
        self.busy = BusyClock()
        self.servers: list[APIServer] = [
            _class_of(config, server_class)(config, reasoning_config=reasoning_config)
            for config in server_list(configs)
        ]

    @property
    def in_flight(self) -> int:
        """Requests in flight, those waiting for a slot included."""
        return sum(server.load.in_flight for server in self.servers)

    @property
    def sampled_tokens(self) -> int:
        """Completion tokens sampled so far through the token route."""
        return sum(server.load.sampled_tokens for server in self.servers)

    def train_only_on_published_versions(self) -> None:
        """From here on refuse tokens of a server that does not say which published policy version sampled them."""
        for server in self.servers:
            server.require_version = True

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(server.close() for server in self.servers))

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """Chat over the least busy server; n above max_n_completions is split and joined again."""
        answer: ChatCompletion = await self._split_n("chat_completion", kwargs)
        return answer

    async def completion(self, **kwargs: Any) -> Completion:
        """Text completion, as chat_completion."""
        answer: Completion = await self._split_n("completion", kwargs)
        return answer

    async def sample_tokens(self, *, prefer: APIServer | None = None, **kwargs: Any) -> TokenSamples:
        """Sample from `input_ids`; one request whatever n is, so that a group shares its prompt's cache.

        Args:
            prefer: the server that holds the prompt's prefix; taken while it is well.
        """
        samples: TokenSamples = await self._route("sample_tokens", kwargs, prefer=prefer)
        return samples

    async def tokens_and_logprobs_completion(
        self, **kwargs: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[str]]:
        """As sample_tokens, in the upstream form: prompt tokens, outputs, logprobs, finish reasons."""
        return (await self.sample_tokens(**kwargs)).as_lists()

    @asynccontextmanager
    async def dedicated_server(self) -> AsyncIterator[APIServer]:
        """The least busy server, for several requests of one conversation."""
        yield await self._pick(time.monotonic() + self.servers[0].config.timeout)

    @asynccontextmanager
    async def managed_server(
        self, tokenizer: Any = None, base_url: str | None = None, preserve_think_blocks: bool = False
    ) -> AsyncIterator[ManagedServer]:
        """A token-exact session on one server; it moves to another only when that one fails.

        Raises:
            NotImplementedError: no server returns token ids.
        """
        candidates = [server for server in self.servers if server.returns_tokens]
        if not candidates:
            raise NotImplementedError(
                "managed_server needs a server that returns token ids: use --openai.server_type vllm; "
                "openai servers are for evaluation and judges"
            )
        server = min(candidates, key=lambda candidate: (not candidate.server_healthy, _busy(candidate)))
        managed = ManagedServer(
            _StickyServer(self, server), tokenizer=tokenizer, preserve_think_blocks=preserve_think_blocks
        )
        try:
            yield managed
        finally:
            managed.reset()

    async def _split_n(self, method: str, kwargs: dict[str, Any]) -> Any:
        n = kwargs.get("n") or 1
        if n <= self.max_n_completions:
            return await self._route(method, kwargs)
        sizes = [self.max_n_completions] * (n // self.max_n_completions) + (
            [rest] if (rest := n % self.max_n_completions) else []
        )
        answers = await asyncio.gather(*(self._route(method, {**kwargs, "n": size}) for size in sizes))
        choices = [choice for answer in answers for choice in answer.choices]
        for index, choice in enumerate(choices):
            choice.index = index
        return answers[0].model_copy(update={"choices": choices})

    async def _route(self, method: str, kwargs: dict[str, Any], *, prefer: APIServer | None = None) -> Any:
        """Try servers until one answers or the time is over; the last failure is the cause of the error."""
        timeout_s = self.servers[0].config.timeout
        end = time.monotonic() + timeout_s
        last: ModelServerError | None = None
        for _ in range(MAX_TRIES):
            try:
                server = await self._pick(end, prefer)
                async with asyncio.timeout(end - time.monotonic()):
                    with self.busy:
                        return await getattr(server, method)(**kwargs)
            except ModelServerError as error:
                last = error
            except TimeoutError as error:
                raise ModelServerError(
                    f"no answer from the inference servers within {timeout_s} s (openai.timeout)"
                ) from last or error
            if time.monotonic() >= end:
                break
        raise ModelServerError(f"no inference server answered: {last}") from last

    async def _pick(self, end: float, prefer: APIServer | None = None) -> APIServer:
        """The preferred server while it is well, else the least busy one; waits while all are down."""
        while True:
            # A failed server is asked at most once per pause, so this delays few requests, and briefly.
            well = [server for server in self.servers if await server.recover()]
            if prefer is not None and prefer in well:
                return prefer
            if well:
                return min(well, key=_busy)
            if time.monotonic() >= end:
                urls = ", ".join(str(server.config.base_url) for server in self.servers)
                raise ModelServerError(
                    f"no inference server is well: {urls}; are they running, with published weights?"
                )
            await asyncio.sleep(HEALTH_POLL_S)


class _StickyServer:
    """What a ManagedServer sees: the manager, with one server preferred."""

    def __init__(self, manager: ServerManager, server: APIServer) -> None:
        self._manager = manager
        self._server = server
        self.config = server.config

    async def sample_tokens(self, **kwargs: Any) -> TokenSamples:
        return await self._manager.sample_tokens(prefer=self._server, **kwargs)


def server_list(configs: ServerBaseline | Sequence[APIServerConfig]) -> list[APIServerConfig]:
    """One config a server."""
    if isinstance(configs, APIServerConfig):
        return [configs]
    if isinstance(configs, ServerBaseline):
        shared = configs.model_dump()
        return [APIServerConfig(base_url=f"http://localhost:{port}/v1", **shared) for port in DEFAULT_PORTS]
    if not configs:
        raise ConfigError(
            "an environment needs at least one inference server: give config_init() a list of APIServerConfig"
        )
    return list(configs)


def _class_of(config: APIServerConfig, server_class: type[APIServer]) -> type[APIServer]:
    if server_class is not APIServer:
        return server_class
    if config.server_type not in _SERVER_CLASSES:
        raise ConfigError(
            f"server_type {config.server_type!r} is not supported yet; supported: {', '.join(_SERVER_CLASSES)}"
        )
    return _SERVER_CLASSES[config.server_type]


def _busy(server: APIServer) -> float:
    return server.load.in_flight / server.config.num_max_requests_at_once
