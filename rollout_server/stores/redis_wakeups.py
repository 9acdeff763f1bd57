"""Hears what any of the servers on one Redis has changed, so that long-polls wake everywhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError, RedisError  # noqa: A004

log = logging.getLogger(__name__)

SILENCE_S = 5.0
"""After this long without a word the connection is tested; after twice that it is given up."""
RECONNECT_S = 0.2
_EVENT = msgspec.msgpack.Decoder(tuple[str, str])


class Wakeups:
    """Owns the task that listens, from start to close."""

    def __init__(
        self,
        redis: Redis,
        namespace: str,
        *,
        on_capacity: Callable[[], None],
        on_queue: Callable[[], None],
        on_event: Callable[[str, str], None],
    ) -> None:
        self._redis = redis
        self._capacity, self._queue, self._events = (f"{namespace}:{name}" for name in ("capacity", "queue", "events"))
        self._on_capacity, self._on_queue, self._on_event = on_capacity, on_queue, on_event
        self._is_listening = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, *, deadline_s: float) -> None:
        """Listen; returns once it does, or raises TimeoutError."""
        self._task = asyncio.create_task(self._listen_forever(), name="redis wake-ups")
        self._task.add_done_callback(_report)
        async with asyncio.timeout(deadline_s):
            await self._is_listening.wait()

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=SILENCE_S)

    async def _listen_forever(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as channels:
                    await self._listen(channels)
            except (RedisError, OSError) as error:
                log.warning("the wake-ups of Redis stopped, connecting again: %s", error)
            await asyncio.sleep(RECONNECT_S)

    async def _listen(self, channels: PubSub) -> None:
        loop = asyncio.get_running_loop()
        await channels.subscribe(self._capacity, self._queue, self._events)
        heard_at = loop.time()
        while True:
            message = await channels.get_message(timeout=SILENCE_S)
            if message is not None:
                heard_at = loop.time()
                self._dispatch(message["type"], message["channel"], message["data"])
            elif loop.time() - heard_at > 2 * SILENCE_S:
                raise ConnectionError(f"no answer for {loop.time() - heard_at:.0f} s")
            else:
                await channels.ping()

    def _dispatch(self, kind: str, channel: bytes | None, data: bytes | int) -> None:
        name = channel.decode() if channel else ""
        if kind == "message" and name == self._events and isinstance(data, bytes):
            self._on_event(*_EVENT.decode(data))
        elif kind == "message" and name == self._capacity:
            self._on_capacity()
        elif kind == "message" and name == self._queue:
            self._on_queue()
        elif kind == "subscribe" and name == self._events:
            # The last of the three. What changed while nobody listened went unheard.
            self._is_listening.set()
            self._on_capacity()
            self._on_queue()


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the wake-ups of Redis ended; long-polls wait for their time-outs", exc_info=error)
