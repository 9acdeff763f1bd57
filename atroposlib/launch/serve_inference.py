"""One inference server as a service: start its engine, wait, register, watch, and leave nothing behind."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from atroposlib.errors import ConfigError
from atroposlib.launch.commands import Command
from atroposlib.launch.engine_look import EngineName, EngineWindow, Look
from atroposlib.launch.events import EventLog
from atroposlib.launch.inference import InferenceConfig, explain_failure, vllm_command, wait_until_ready
from atroposlib.launch.inference_watch import DEFAULT_MAX_PAUSE_S, InferenceWatch
from atroposlib.launch.processes import Child, ProcessSpec, RestartConfig, Supervisor
from atroposlib.launch.registration import Registration
from atroposlib.launch.sglang import sglang_command
from atroposlib.wire.models import Role

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.5
GRACE_S = 20.0
"""An engine on a GPU takes a while to give its memory back."""
# Whoever started the service decides whether it is started again.
NO_RESTART = RestartConfig(max_restarts=0, max_restarts_before_ready=0)
ALL_INTERFACES = "0.0.0.0"

ShowProgress = Callable[[float, str], None]
"""Told of the seconds since the start, and what the engine said last."""


@dataclass(frozen=True)
class InferenceService:
    """What to start, and what it is for.

    Raises:
        ConfigError: options that contradict each other.
    """

    config: InferenceConfig
    engine: EngineName = "vllm"
    role: Role = "policy"
    address: str = ""
    """Base URL under which others reach it; absent: by the host that it listens on."""
    python: str = ""
    """Interpreter of the environment that holds the engine; absent: ours."""
    log_dir: Path = Path("runs/inference")
    ready_timeout_s: float = 600.0
    max_pause_s: float = DEFAULT_MAX_PAUSE_S

    def __post_init__(self) -> None:
        if ":" in self.config.host:
            raise ConfigError(
                f"host={self.config.host}: IPv4 addresses and names only; {ALL_INTERFACES} is any interface"
            )
        if self.role != "policy" and self.config.weight_transfer != "none":
            raise ConfigError(
                f"weight_transfer={self.config.weight_transfer} is for policy servers: a {self.role} server never gets"
                " weights; use weight_transfer=none"
            )

    @property
    def url(self) -> str:
        """Base URL for others."""
        if self.address:
            return self.address.rstrip("/").removesuffix("/v1")
        is_anywhere = self.config.host == ALL_INTERFACES
        return f"http://{socket.gethostname()}:{self.config.port}" if is_anywhere else self.config.url

    @property
    def missing(self) -> str:
        """What is not installed, with the fix; empty when nothing is, or when another interpreter decides."""
        if self.python or find_spec(self.engine) is not None:
            return ""
        return explain_failure(f"No module named '{self.engine}'")

    def command(self, *, has_gpu: bool) -> Command:
        """The engine's command line."""
        build = vllm_command if self.engine == "vllm" else sglang_command
        argv, env = build(self.config, has_gpu=has_gpu)
        return Command((self.python or sys.executable, *argv[1:]), {"PYTHONUNBUFFERED": "1", **env}, grace_s=GRACE_S)


class RunningService:
    """Runs an InferenceService until stop() is called or its engine dies.

    Args:
        registration: its entry on a rollout server; None: nobody is told.
        on_ready: called once when the engine answers.
    """

    def __init__(
        self,
        service: InferenceService,
        command: Command,
        registration: Registration | None,
        *,
        show_progress: ShowProgress,
        on_ready: Callable[[], None],
    ) -> None:
        self._service = service
        self._command = command
        self._registration = registration
        self._show_progress = show_progress
        self._on_ready = on_ready
        service.log_dir.mkdir(parents=True, exist_ok=True)
        self._supervisor = Supervisor(service.log_dir, EventLog(service.log_dir / "events.jsonl"))
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End soon; asked a second time, end now."""
        if self._stopping.is_set():
            self._supervisor.kill_all()
        self._stopping.set()

    async def run(self) -> None:
        """Serve. The engine and all that it started are gone when this returns, whatever the reason.

        Raises:
            ChildFailedError: the engine did not come up, or died; the text says why.
        """
        await self._supervisor.run(self._serve())

    async def _serve(self) -> None:
        child = self._supervisor.start(
            ProcessSpec(
                name="inference",
                argv=self._command.argv,
                env=self._command.env,
                is_ready=self._answers,
                explain=explain_failure,
                grace_s=self._command.grace_s,
                restart=NO_RESTART,
            )
        )
        if not await self._becomes_ready(child):
            return
        self._on_ready()
        try:
            await self._watch()
        finally:
            # Before the engine ends: nobody shall send requests to one that goes.
            if self._registration is not None:
                await self._registration.leave()

    async def _answers(self, child: Child) -> None:
        await wait_until_ready(self._service.config.url, child.guardian, child.log_path, self._service.ready_timeout_s)

    async def _becomes_ready(self, child: Child) -> bool:
        """Show progress until the engine answers; False when stop() came first."""
        start = time.monotonic()
        waits = {asyncio.create_task(child.ready()), asyncio.create_task(self._stopping.wait())}
        try:
            while not (await asyncio.wait(waits, timeout=PROGRESS_EVERY_S, return_when=asyncio.FIRST_COMPLETED))[0]:
                self._show_progress(time.monotonic() - start, child.log_tail(1))
        finally:
            for wait in waits:
                wait.cancel()
        return not self._stopping.is_set()

    async def _watch(self) -> None:
        service = self._service
        async with EngineWindow(service.config.url, service.engine) as window, asyncio.TaskGroup() as tasks:
            watch = InferenceWatch(window, self._report, max_pause_s=service.max_pause_s)
            watching = tasks.create_task(watch.run())
            await self._stopping.wait()
            watching.cancel()

    async def _report(self, look: Look, problem: str) -> None:
        if self._registration is not None:
            await self._registration.report(look.policy_version, problem)
