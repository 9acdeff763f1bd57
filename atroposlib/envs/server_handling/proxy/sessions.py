"""The sessions of the managed-server proxy: which server each is on, and when it is forgotten."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from atroposlib.envs.server_handling.managed_server import ManagedServer
from atroposlib.envs.server_handling.pool.sticky_server import StickyServer
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.errors import ConfigError, ModelServerError, UnknownSessionError


@dataclass
class ProxySession:
    """One caller's conversation."""

    managed: ManagedServer
    server: Any
    tool_parser: str | None
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    created_at: float = field(default_factory=time.time)
    last_accessed: float = field(default_factory=time.time)
    """Unix time, for people."""
    idle_since: float = 0.0
    """On the store's clock."""
    in_flight: int = 0

    @property
    def base_url(self) -> str | None:
        """Of the server that it prefers."""
        return server_url(self.server)

    @property
    def nodes(self) -> list[Any]:
        """Its sequences, tracked as list or as tree."""
        state = self.managed.get_state()
        return list(state["nodes"] if "nodes" in state else state["sequences"].values())


class ProxySessions:
    """Sessions by id; one that nobody used for `idle_s` seconds is gone.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, *, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_s = idle_s
        self._clock = clock
        self._by_uuid: dict[str, ProxySession] = {}

    def create(
        self, manager: Any, tokenizer: Any, *, base_url: str | None, tool_parser: str | None, track_tree: bool
    ) -> ProxySession:
        """Open a session on the server of that URL, else on the well one with the fewest sessions.

        Raises:
            ConfigError: no server has that URL, or there is no such tool parser.
            ModelServerError: there is no server at all.
        """
        server = self._choose_server(manager, base_url)
        managed = ManagedServer(_routed(manager, server), tokenizer, track_tree=track_tree, tool_parser=tool_parser)
        # Now, not at the first request with tools: a misspelt parser must not look like a model that calls nothing.
        managed._get_translator()
        session = ProxySession(managed, server, tool_parser, idle_since=self._clock())
        self._by_uuid[session.uuid] = session
        return session

    @contextmanager
    def use(self, session_uuid: str) -> Iterator[ProxySession]:
        """The session, which does not expire meanwhile.

        Raises:
            UnknownSessionError: it is not there, or not any more.
        """
        session = self._get(session_uuid)
        session.in_flight += 1
        try:
            yield session
        finally:
            session.in_flight -= 1
            session.idle_since, session.last_accessed = self._clock(), time.time()

    def delete(self, session_uuid: str) -> None:
        """Forget a session.

        Raises:
            UnknownSessionError: it is not there.
        """
        self._get(session_uuid)
        del self._by_uuid[session_uuid]

    def clear(self) -> None:
        """Forget all sessions."""
        self._by_uuid.clear()

    def list(self) -> list[ProxySession]:
        """The sessions that have not expired, oldest first."""
        # Expiry waits for the next look: it needs no task of its own, and what nobody asks for holds little memory.
        oldest = self._clock() - self._idle_s
        for session in [*self._by_uuid.values()]:
            if session.in_flight == 0 and session.idle_since < oldest:
                del self._by_uuid[session.uuid]
        return [*self._by_uuid.values()]

    def _get(self, session_uuid: str) -> ProxySession:
        self.list()
        if session_uuid not in self._by_uuid:
            raise UnknownSessionError(
                f"there is no session {session_uuid!r}: it was deleted, or unused for {self._idle_s:g} s; "
                "open another with POST /sessions/create"
            )
        return self._by_uuid[session_uuid]

    def _choose_server(self, manager: Any, base_url: str | None) -> Any:
        if not manager.servers:
            raise ModelServerError("the proxy has no inference servers; name some with --config, or with POST /setup")
        if base_url is None:
            used = [id(session.server) for session in self.list()]
            return min(manager.servers, key=lambda server: (not is_well(server), used.count(id(server))))
        for server in manager.servers:
            if _same_url(server_url(server), base_url):
                return server
        known = ", ".join(str(server_url(server)) for server in manager.servers)
        raise ConfigError(f"no inference server has base_url {base_url!r}; known: {known}")


def server_url(server: Any) -> str | None:
    """Its base_url, where it has one."""
    url: str | None = getattr(getattr(server, "config", None), "base_url", None)
    return url


def is_well(server: Any) -> bool:
    """Whether it answered when it was last asked."""
    return bool(getattr(server, "server_healthy", True))


def _routed(manager: Any, server: Any) -> Any:
    """The server through its manager, so that another one answers where it fails."""
    if isinstance(manager, ServerManager) and hasattr(server, "sample_tokens"):
        return StickyServer(manager, server)
    return server


def _same_url(one: str | None, other: str) -> bool:
    return (one or "").rstrip("/") == other.rstrip("/")
