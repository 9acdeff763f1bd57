"""serve mode: an environment, its connection to the rollout server, its files, and the signals that end it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from atroposlib.client import RolloutClient
from atroposlib.envs.serving.records import RunRecords
from atroposlib.envs.serving.runner import EnvRunner
from atroposlib.envs.serving.spool import Spool
from atroposlib.errors import UnknownEnvError
from atroposlib.wire.models import EnvInfo, TicketUpdate

if TYPE_CHECKING:
    from atroposlib.envs.base import BaseEnv


class EnvClient(RolloutClient):
    """The rollout client, with an environment's goodbye."""

    async def leave(self, info: EnvInfo) -> None:
        """Say that the environment of this registration is gone; nothing happens when a newer one has its name."""
        try:
            await self.renew_tickets(TicketUpdate(env_id=info.env_id, session=info.session, tickets=[]))
        except UnknownEnvError:
            return
        await self._send("POST", "/disconnect-env", json={"env_id": info.env_id})


async def serve(env: BaseEnv) -> None:
    """Collect until the run is finished, SIGTERM or Ctrl-C.

    Raises:
        ServerUnreachableError: the rollout server, or a run on it, was missing for server_deadline_s.
        ConfigError: server or environment are set up wrongly.
    """
    config = env.config
    records = RunRecords(config.run_dir, env.display_name)
    async with EnvClient(config.rollout_server_url, deadline_s=config.server_deadline_s) as client:
        runner = EnvRunner(env, client, records, spool=spool_of(env), farewell=client.leave)
        try:
            with _stopped_by_signals(runner):
                await runner.run()
        finally:
            records.close()
            await env.aclose()


def spool_of(env: BaseEnv) -> Spool | None:
    """Where groups of this environment wait for the rollout server; None where it may hold nothing."""
    config = env.config
    if config.max_spool_bytes == 0:
        return None
    name = env.display_name.replace("/", "_")
    return Spool(config.resolve_spool_dir() / f"{name}.groups", max_bytes=config.max_spool_bytes)


@contextmanager
def _stopped_by_signals(runner: EnvRunner) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, runner.stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
