"""Requests over several inference servers, as environments make them: chat, text, tokens, sessions."""

from __future__ import annotations

import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, Field

from atroposlib.envs.gathering import all_or_none
from atroposlib.envs.server_handling.pool.busy_clock import BusyClock
from atroposlib.envs.server_handling.pool.joined_answers import join_answers, split_n
from atroposlib.envs.server_handling.pool.routing import Router
from atroposlib.envs.server_handling.pool.seat import Seat, Split, split_of
from atroposlib.envs.server_handling.pool.server_classes import server_class_of
from atroposlib.envs.server_handling.pool.server_configs import at_url, server_list, with_address
from atroposlib.envs.server_handling.pool.server_pool import ServerPool
from atroposlib.envs.server_handling.pool.version_bounds import sample_with_versions
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig, ServerBaseline
from atroposlib.envs.server_handling.sessions.session_choice import (
    PROXY_URL,
    dummies_allowed,
    managed_session,
    proxy_session,
)
from atroposlib.errors import ConfigError, ModelServerError

if TYPE_CHECKING:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    from atroposlib.envs.server_handling.engines.samples import TokenSamples

__all__ = ["ServerManager", "ServerManagerConfig", "server_list"]


T = TypeVar("T")


class ServerManagerConfig(BaseModel):
    """Options of the manager itself."""

    slurm: bool = Field(default=False, description="Find the inference servers from the SLURM variables.")
    testing: bool = Field(default=False, description="Replace the servers by a harness of canned answers.")
    max_n_completions: int = Field(default=8, ge=1, description="Chat requests for more choices than this are split.")
    proxy_url: str | None = Field(
        default=None, description="Managed-server proxy that holds the sessions; none: ATROPOS_PROXY_URL."
    )


class ServerManager:
    """Routes requests to inference servers: the least busy one that is well; another when that one fails.

    Args:
        configs: one entry a server; a bare APIServerConfig is one server; a ServerBaseline means four local ports.
        server_class: client class of every server; an abstract one chooses by each config's server_type.
        slurm: the servers are those of the SLURM job; the first config is their template.
        testing: one ServerHarness of canned answers instead of servers.
        max_n_completions: a chat or text request for more choices is split. Token requests never are.
        reasoning_config: what chat requests ask about reasoning.
        proxy_url: managed-server proxy, for use_proxy; None: the variable ATROPOS_PROXY_URL.
        use_proxy: sessions live in the proxy.
        tool_parser: how sessions read tool calls; None: they do not.
    Raises:
        ConfigError: there is no server, or one has no address.
    """

    # Defaults on the class: managers are also made without the constructor, with only the servers set.
    servers: list[APIServer]
    max_n_completions: int = 8
    reasoning_config: Any = None
    proxy_url: str | None = None
    use_proxy: bool = False
    tool_parser: str | None = None
    _require_version: bool = False
    _template: APIServerConfig | None = None
    _server_class: type[APIServer] = APIServer  # type: ignore[type-abstract]

    def __init__(
        self,
        configs: ServerBaseline | Sequence[APIServerConfig],
        server_class: type[APIServer] = APIServer,
        slurm: bool = False,
        testing: bool = False,
        max_n_completions: int = 8,
        reasoning_config: Any = None,
        proxy_url: str | None = None,
        use_proxy: bool = False,
        tool_parser: str | None = None,
    ) -> None:
        self.max_n_completions = max_n_completions
        self.reasoning_config = reasoning_config
        self.proxy_url = proxy_url or os.environ.get(PROXY_URL) or None
        self.use_proxy = use_proxy
        self.tool_parser = tool_parser
        self._server_class = server_class
        if testing:
            self.servers = [_harness()]
            return
        found = server_list(configs, slurm=slurm)
        self._template = found[0]
        self.servers = [self._client(config) for config in found]

    # Requests

    async def chat_completion(self, *, prefer: APIServer | None = None, **kwargs: Any) -> ChatCompletion:
        """Chat; the answer is the openai package's object. n above max_n_completions is split and joined again.

        Args:
            prefer: the server to try first.
        """
        answer: ChatCompletion = await self._in_parts("chat_completion", kwargs, prefer)
        return answer

    async def completion(self, *, prefer: APIServer | None = None, **kwargs: Any) -> Completion:
        """Text completion, as chat_completion."""
        answer: Completion = await self._in_parts("completion", kwargs, prefer)
        return answer

    async def sample_tokens(self, *, prefer: APIServer | None = None, **kwargs: Any) -> TokenSamples:
        """Sample from `input_ids`; one request whatever n is, so that a group shares its prompt's cache.

        Args:
            prefer: the server that holds the prompt's prefix; taken while it is well and not crowded.
        """
        return await self._route(
            "sample_tokens", lambda seat: sample_with_versions(seat, kwargs), kwargs, prefer, tokens=True
        )

    async def tokens_and_logprobs_completion(
        self, *, prefer: APIServer | None = None, **kwargs: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[str]]:
        """As sample_tokens, in the upstream form: prompt tokens, outputs, logprobs, finish reasons."""
        name = "tokens_and_logprobs_completion"
        return await self._route(name, _method(name, kwargs), kwargs, prefer, tokens=True)

    async def get_logprobs(self, *, prefer: APIServer | None = None, **kwargs: Any) -> dict[str, Any]:
        """Logprobs of a prompt's own tokens, as APIServer.get_logprobs.

        Raises:
            NotImplementedError: the server cannot.
        """
        return await self._route("get_logprobs", _method("get_logprobs", kwargs), kwargs, prefer, tokens=True)

    # Sessions

    @asynccontextmanager
    async def dedicated_server(self) -> AsyncIterator[APIServer]:
        """The least busy server, for several requests of one conversation. It takes no slot; each request does."""
        await self.wait_for_sem(is_training=True)
        with self._pool.session() as seat:
            yield seat.server

    @asynccontextmanager
    async def managed_server(
        self, tokenizer: Any = None, base_url: str | None = None, preserve_think_blocks: bool = False
    ) -> AsyncIterator[Any]:
        """A token-exact session on one server; it moves to another when that one fails or is much more crowded.

        Args:
            tokenizer: of the policy; None: by the server's config.
            base_url: the inference server that the proxy uses; None: it chooses. Without a proxy it means nothing.
            preserve_think_blocks: leave think blocks to the chat template.
        Raises:
            NotImplementedError: no server returns token ids.
            ConfigError: use_proxy without the proxy's URL.
            ModelServerError: all servers have left, and none that returns token ids joined in time.
        """
        if self.use_proxy:
            model_name = self.servers[0].config.model_name if self.servers else "unknown"
            async with proxy_session(
                self.proxy_url, base_url, self.tool_parser, model_name, require_version=self._require_version
            ) as session:
                yield session
            return
        needs_tokens = await self._sessions_need_tokens()
        with self._pool.session(needs_tokens=needs_tokens) as seat:
            managed = managed_session(self, seat, tokenizer, preserve_think_blocks)
            try:
                yield managed
            finally:
                managed.reset()

    # Limits

    async def update_weight(self, weight: float) -> None:
        """Use only this share, from 0 to 1, of every server: the rest is for other environments."""
        self._pool.set_weight(weight)
        for server in self.servers:
            answer: Any = server.update_weight(weight)
            if inspect.isawaitable(answer):
                await answer

    async def wait_for_sem(self, is_training: bool) -> None:
        """Wait until some server has a free slot for training, or else for evaluation. It is not taken."""
        await self._router.wait_for_slot(Split.TRAIN if is_training else Split.EVAL)

    def train_only_on_published_versions(self, is_on: bool = True) -> None:
        """From here on refuse tokens of a server that does not say which published policy version sampled them."""
        self._require_version = is_on
        for server in self.servers:
            server.require_version = is_on

    # Servers that join and leave

    async def add_server(self, config: APIServerConfig) -> None:
        """A server joins; it gets requests as soon as it says that it is well.

        Raises:
            ConfigError: it is here already, or has no address.
        """
        if self._seat_at(config.base_url or "") is not None:
            raise ConfigError(f"inference server {config.base_url} is in the pool already; remove it first")
        server = self._client(config)
        server.require_version = self._require_version
        # Before the first wait: whoever asks next must see that it is here.
        self._pool.add(server)
        self.servers.append(server)
        await server.update_weight(self._pool.weight)

    async def remove_server(self, base_url: str) -> None:
        """A server leaves: nothing new goes there; returns when what it has in flight has ended, at most its timeout.

        Raises:
            ConfigError: there is no such server.
        """
        seat = self._seat_at(base_url)
        if seat is None:
            here = ", ".join(seat.url for seat in self._pool.seats) or "none"
            raise ConfigError(f"inference server {base_url} is not in the pool; it has {here}")
        self.servers.remove(seat.server)
        self._pool.detach(seat)
        await self._pool.drain(seat)

    async def sync_servers(self, urls: Collection[str]) -> None:
        """Make the servers those of a registry: new ones join, others leave in the background once they are idle."""
        wanted = dict.fromkeys(url.rstrip("/") for url in urls)
        for seat in list(self._pool.seats):
            if seat.url not in wanted:
                self.servers.remove(seat.server)
                self._pool.detach(seat)
                self._pool.own(self._pool.drain(seat))
        template = self._template
        for url in wanted:
            if self._seat_at(url) is None:
                if template is None:
                    raise ConfigError(f"inference server {url} cannot join: this manager was made without configs")
                await self.add_server(at_url(template, url))

    async def close(self) -> None:
        """Close all connections and end the background work."""
        await self._pool.close()

    # Counters

    @cached_property
    def busy(self) -> BusyClock:
        """Time with at least one request at a server."""
        return BusyClock()

    @property
    def in_flight(self) -> int:
        """Requests in flight, those waiting for a slot included."""
        seats = [*self._pool.seats, *self._pool.leaving]
        return self._pool.waiting + sum(max(seat.total_in_flight, seat.server.load.in_flight) for seat in seats)

    @property
    def sampled_tokens(self) -> int:
        """Completion tokens sampled so far through the token route."""
        seats = [*self._pool.seats, *self._pool.leaving]
        return self._pool.sampled_by_the_gone + sum(seat.server.load.sampled_tokens for seat in seats)

    # Inside

    @cached_property
    def _pool(self) -> ServerPool:
        return ServerPool(self.servers)

    @cached_property
    def _router(self) -> Router:
        return Router(self._pool, self.busy)

    def _client(self, config: APIServerConfig) -> APIServer:
        chosen = server_class_of(config, self._server_class)
        if chosen is not self._server_class:
            with_address(config)
        return chosen(config, reasoning_config=self.reasoning_config)

    def _seat_at(self, base_url: str) -> Seat | None:
        return next((seat for seat in self._pool.seats if seat.url == base_url.rstrip("/")), None)

    def _get_server_base_url(self, i: int = 0) -> str | None:
        return self.servers[i].config.base_url if i < len(self.servers) else None

    async def _sessions_need_tokens(self) -> bool:
        """Whether sessions must be on a server that returns token ids. Where all have left, another may join first."""
        had_left = not self._pool.seats
        if had_left:
            await self.wait_for_sem(is_training=True)
        if not self._pool.seats or any(seat.returns_tokens for seat in self._pool.seats):
            return True
        try:
            return not dummies_allowed()
        except NotImplementedError as error:
            if not had_left:
                raise
            raise ModelServerError(
                "all inference servers had left, and none that joined returns token ids; one that does may join"
            ) from error

    async def _in_parts(self, name: str, kwargs: dict[str, Any], prefer: APIServer | None) -> Any:
        n = kwargs.get("n") or 1
        if n <= self.max_n_completions:
            return await self._route(name, _method(name, kwargs), kwargs, prefer)
        parts = [{**kwargs, "n": size} for size in split_n(n, self.max_n_completions)]
        return join_answers(await all_or_none([self._route(name, _method(name, part), part, prefer) for part in parts]))

    async def _route(
        self,
        name: str,
        call: Callable[[Seat], Awaitable[T]],
        kwargs: dict[str, Any],
        prefer: APIServer | None,
        *,
        tokens: bool = False,
    ) -> T:
        home = None if prefer is None else next((s for s in self._pool.seats if s.server is prefer), None)
        return await self._router.ask(
            name, call, split=split_of(kwargs), needs_tokens=tokens, home=home, timeout_s=_own_timeout_s(kwargs)
        )


def _method(name: str, kwargs: dict[str, Any]) -> Callable[[Seat], Awaitable[Any]]:
    async def call(seat: Seat) -> Any:
        return await getattr(seat.server, name)(**kwargs)

    return call


def _own_timeout_s(kwargs: dict[str, Any]) -> float | None:
    """The seconds that a request allows itself; None where it does not say."""
    given = kwargs.get("timeout")
    return float(given) if isinstance(given, int | float) and given > 0 else None


def _harness() -> APIServer:
    from atroposlib.envs.server_handling.server_harness import ServerHarness

    harness: Any = ServerHarness()
    return harness  # type: ignore[no-any-return]
