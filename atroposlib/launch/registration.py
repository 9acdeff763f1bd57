"""An inference server's entry in the rollout server's registry, kept by the process beside it."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from atroposlib.errors import AtroposError
from atroposlib.wire.models import InferenceServer, InferenceServerStatus, Role

log = logging.getLogger(__name__)

CALL_S = 5.0
OWN = "engine: "
"""Begins a problem that this process wrote, now or before it was started again; others are the trainer's."""


class Registry(Protocol):
    """What is needed of the rollout client."""

    async def servers(self) -> list[InferenceServerStatus]: ...  # noqa: D102
    async def register_server(self, server: InferenceServer) -> None: ...  # noqa: D102
    async def remove_server(self, url: str) -> None: ...  # noqa: D102


def joined_problem(registered: str, own: str) -> str:
    """What to write for a server's problem: ours first; else what somebody else, the trainer, has against it."""
    if own:
        return f"{OWN}{own}"
    return "" if registered.startswith(OWN) else registered


class Registration:
    """Reports one inference server. A rollout server that is away is told again with the next report.

    Args:
        url: under which environments and trainer reach the server.
    """

    def __init__(self, registry: Registry, *, url: str, role: Role, model_name: str) -> None:
        self._registry = registry
        self._entry = InferenceServer(url=url, role=role, model_name=model_name)
        self._is_heard = True

    async def report(self, policy_version: int | None, problem: str) -> None:
        """Say that the server is there, what it runs, and what is wrong with it."""
        try:
            async with asyncio.timeout(CALL_S):
                entry = self._entry.model_copy(
                    update={"policy_version": policy_version, "problem": await self._problem(problem)}
                )
                await self._registry.register_server(entry)
        except (AtroposError, TimeoutError) as error:
            if self._is_heard:
                log.warning("the rollout server does not take reports, trying on: %s", error)
            self._is_heard = False
            return
        if not self._is_heard:
            log.info("the rollout server takes reports again")
        self._is_heard = True

    async def leave(self) -> None:
        """Take the server off the list, so that nobody sends requests to it any more."""
        try:
            async with asyncio.timeout(CALL_S):
                await self._registry.remove_server(self._entry.url)
        except (AtroposError, TimeoutError) as error:
            log.warning("could not take %s off the rollout server's list: %s", self._entry.url, error)

    async def _problem(self, own: str) -> str:
        registered = next(
            (entry.server.problem for entry in await self._registry.servers() if entry.server.url == self._entry.url),
            "",
        )
        return joined_problem(registered, own)
