"""The rollout server's list of inference servers, for a thread that has no event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from atroposlib.client import RolloutClient
from atroposlib.errors import ServerUnreachableError
from atroposlib.wire.models import InferenceServer, InferenceServerStatus
from trainer.weight_sync.states import GRACE_S
from trainer.weight_sync.watched import run_within

T = TypeVar("T")

CALL_S = 5.0
"""A publication waits for these calls, so they give up soon."""


class RolloutRegistry:
    """Asks and tells the rollout server, each time over a connection of its own.

    Args:
        connect: makes a client, e.g. ``lambda: RolloutClient(url, deadline_s=3)``.
    """

    def __init__(self, connect: Callable[[], RolloutClient]) -> None:
        self._connect = connect

    def servers(self) -> list[InferenceServerStatus]:
        """See Registry.servers."""

        async def ask(client: RolloutClient) -> list[InferenceServerStatus]:
            return await client.servers()

        return self._call(ask)

    def report(self, servers: Sequence[InferenceServer]) -> None:
        """See Registry.report."""

        async def tell(client: RolloutClient) -> None:
            await asyncio.gather(*map(client.register_server, servers))

        self._call(tell)

    def _call(self, work: Callable[[RolloutClient], Coroutine[Any, Any, T]]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(CALL_S), self._connect() as client:
                return await work(client)

        try:
            # Closing the loop waits for a name that is being looked up, which nothing else bounds.
            return run_within(lambda: asyncio.run(bounded()), timeout_s=CALL_S + GRACE_S, name="inference-registry")
        except TimeoutError:
            raise ServerUnreachableError(f"the rollout server did not answer within {CALL_S:.0f} s") from None
