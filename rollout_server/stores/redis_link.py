"""Calls to Redis: scripts with typed answers, a deadline on each, tried again while Redis restarts or fails over."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha1
from importlib.resources import files
from typing import Any, TypeVar

import msgspec
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,  # noqa: A004
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    TryAgainError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from atroposlib.errors import ConfigError, StoreUnavailableError, error_from_wire
from rollout_server.stores.base import Payload

T = TypeVar("T")

PASSING_ERRORS = (
    ConnectionError, RedisTimeoutError, ReadOnlyError, MasterDownError, TryAgainError, OSError, TimeoutError
)  # fmt: skip
"""What a restart or a failover looks like from here."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
ANSWER_S = 5.0
"""For one attempt of one command."""
MAX_CONNECTIONS = 64
BYTES_A_CALL = 8 << 20
ORPHAN_TTL_S = 3600
"""A payload that no script has adopted vanishes after this long; far more than any call's deadline."""
REFUSED_WHEN_FULL = frozenset({"append"})
"""Scripts that may not run while Redis is over maxmemory; the others must, for they make room."""


@dataclass(frozen=True)
class Script:
    """A Lua script as Redis runs it."""

    text: str
    digest: str


@cache
def load_script(name: str) -> Script:
    """The script of lua/NAME.lua, with what is common to all before it."""
    folder = files("rollout_server.stores") / "lua"
    flags = "" if name in REFUSED_WHEN_FULL else " flags=allow-oom"
    parts = [(folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("common", name)]
    text = "\n".join([f"#!lua{flags}", *parts])
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


class RedisLink:
    """One Redis, one namespace.

    Args:
        deadline_s: how long a call is tried before StoreUnavailableError.
    Raises:
        ConfigError: the URL cannot be read.
    """

    def __init__(self, url: str, namespace: str, *, deadline_s: float) -> None:
        self.namespace = "{" + namespace + "}"
        self._deadline_s = deadline_s
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=deadline_s,
                socket_timeout=ANSWER_S,
                socket_connect_timeout=ANSWER_S,
                retry=Retry(NoBackoff(), 0),  # attempts are counted here, not there
            )
        except ValueError as error:
            raise ConfigError(f"redis_url cannot be read: {error}; expected e.g. redis://localhost:6379/0") from error
        self.redis = Redis(connection_pool=pool)
        self.address = _address(pool.connection_kwargs)

    def command(self, *words: str | bytes | int | memoryview) -> Awaitable[Any]:
        """One attempt of one command."""
        answer: Awaitable[Any] = self.redis.execute_command(*words)  # type: ignore[no-untyped-call]
        return answer

    async def close(self) -> None:
        """Close every connection."""
        await self.redis.aclose()
        await self.redis.connection_pool.disconnect()

    async def run(
        self,
        name: str,
        answer: type[T],
        facts: Mapping[str, object],
        payloads: Sequence[tuple[str, Payload]] = (),
    ) -> T:
        """Run a script, with payloads put in place before it.

        Raises:
            AtroposError: what the script refused with; StoreUnavailableError when Redis stayed away.
            OutOfMemoryError: Redis is over its maxmemory.
        """
        script = load_script(name)
        arguments = (1, f"{self.namespace}:generation", self.namespace, msgspec.msgpack.encode(facts))
        reply = await self.persist(f"running {name}", lambda: self._attempt(script, arguments, payloads))
        done, *rest = msgspec.msgpack.decode(reply, type=list[msgspec.Raw])
        if not msgspec.msgpack.decode(done, type=bool):
            code, text = (msgspec.msgpack.decode(part, type=str) for part in rest)
            raise error_from_wire(code, text, 500)
        return msgspec.msgpack.decode(rest[0] if rest else b"\xc0", type=answer)

    async def _attempt(
        self, script: Script, arguments: Sequence[int | str | bytes], payloads: Sequence[tuple[str, Payload]]
    ) -> bytes:
        for part in _chunks(payloads, size=lambda payload: len(payload[1])):
            await self._put(part)
        try:
            reply: bytes = await self.command("EVALSHA", script.digest, *arguments)
        except NoScriptError:
            reply = await self.command("EVAL", script.text, *arguments)
        return reply

    async def _put(self, payloads: Sequence[tuple[str, Payload]]) -> None:
        pipeline = self.redis.pipeline(transaction=False)
        for name, payload in payloads:
            # NX: an earlier attempt may have put it there, and its script may have made it permanent.
            pipeline.execute_command("SET", self._payload_key(name), payload, "NX", "EX", ORPHAN_TTL_S)
        await pipeline.execute()

    async def read(self, names: Sequence[tuple[str, int]]) -> list[bytes | None]:
        """Payloads by name and size in bytes; None where there is none."""
        found: list[bytes | None] = []
        for part in _chunks(names, size=lambda name: name[1]):
            keys = [self._payload_key(name) for name, _ in part]
            found += await self.persist("reading payloads", partial(self.command, "MGET", *keys))
        return found

    def _payload_key(self, name: str) -> str:
        return f"{self.namespace}:p:{name}"

    async def persist(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try until it succeeds, fails for good, or the deadline has passed."""
        end = asyncio.get_running_loop().time() + self._deadline_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with asyncio.timeout_at(end):
                    return await attempt()
            except (AuthenticationError, NoPermissionError) as error:
                raise StoreUnavailableError(
                    f"Redis at {self.address} refuses this server ({error}); check user, password and ACL of redis_url"
                ) from error
            except PASSING_ERRORS as error:
                if asyncio.get_running_loop().time() + pause_s > end:
                    raise StoreUnavailableError(
                        f"Redis at {self.address} did not answer within {self._deadline_s:.0f} s ({what}: {error!r});"
                        " check that it runs and can be reached, then try again"
                    ) from error
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)


def _address(kwargs: Mapping[str, Any]) -> str:
    """Without the password."""
    return str(kwargs.get("path") or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}")


def _chunks(items: Sequence[T], *, size: Callable[[T], int]) -> list[list[T]]:
    """Parts of at most BYTES_A_CALL, or of one item."""
    parts: list[list[T]] = []
    held = 0
    for item in items:
        if not parts or held + size(item) > BYTES_A_CALL:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += size(item)
    return parts
