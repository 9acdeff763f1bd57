"""An environment's membership of the run: registered, and registered again when the rollout server or the run changed."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from atroposlib.errors import NoRunError, ServerUnreachableError
from atroposlib.wire.models import OLD_RUN_PREFIX, EnvInfo, EnvRequest, RunInfo

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 10.0
QUIET_S = 60.0
"""A membership that lasted this long ended for a new reason: pauses start small again."""


class Registrar(Protocol):
    """What joining a run needs of the rollout client."""

    async def register_env(self, request: EnvRequest) -> EnvInfo:
        """Join the run.

        Raises:
            NoRunError: no trainer has registered.
        """
        ...


def publishes_versions(run: RunInfo) -> bool:
    """Whether the trainer tells inference servers which version they run. One of the old protocol never does."""
    return not run.run_name.startswith(OLD_RUN_PREFIX)


class Membership:
    """Joins the run, waits for a trainer where there is none yet, and rejoins once however many callers ask.

    Args:
        deadline_s: seconds without a run before giving up.
    """

    def __init__(self, client: Registrar, request: EnvRequest, *, deadline_s: float) -> None:
        self._client = client
        self._request = request
        self._deadline_s = deadline_s
        self._lock = asyncio.Lock()
        self._info: EnvInfo | None = None
        self._joined_at = 0.0
        self._pause_s = FIRST_PAUSE_S

    @property
    def is_joined(self) -> bool:
        """Whether join() has succeeded."""
        return self._info is not None

    @property
    def info(self) -> EnvInfo:
        """The newest registration."""
        assert self._info is not None, "join() first"
        return self._info

    async def join(self) -> EnvInfo:
        """Register; waits for a trainer.

        Raises:
            ServerUnreachableError: no rollout server, or no run on it, within the deadline.
        """
        async with self._lock:
            return await self._join()

    async def rejoin(self, lost: EnvInfo, reason: Exception) -> EnvInfo:
        """Register again because the server does not know `lost` any more; callers that come late get the new one."""
        async with self._lock:
            if self._info is not lost:
                return self.info
            # Two processes under one name take the membership from each other for ever: make that slow and loud.
            if time.monotonic() - self._joined_at > QUIET_S:
                self._pause_s = FIRST_PAUSE_S
            log.warning(
                "registration of environment %r is gone, registering again (%s); "
                "if this repeats, another process has the same name: set --wandb_name",
                self._request.name,
                reason,
            )
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, MAX_PAUSE_S)
            return await self._join()

    async def _join(self) -> EnvInfo:
        end = time.monotonic() + self._deadline_s
        pause_s, is_told = FIRST_PAUSE_S, False
        while True:
            try:
                self._info = await self._client.register_env(self._request)
            except NoRunError as error:
                if time.monotonic() >= end:
                    raise ServerUnreachableError(
                        f"no trainer opened a run within {self._deadline_s:.0f} s (server_deadline_s)"
                    ) from error
                if not is_told:
                    log.info("waiting for a trainer: %s", error)
                    is_told = True
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, 2.0)
            else:
                self._joined_at = time.monotonic()
                log.info("registered as environment %d of run %r", self._info.env_id, self._info.run.run_name)
                return self._info
