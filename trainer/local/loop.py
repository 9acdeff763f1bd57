"""The services of a local run: a rollout server and a vLLM server, child processes for as long as a block lasts."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from atroposlib.errors import AtroposError
from atroposlib.launch.events import EventLog
from atroposlib.launch.inference import InferenceConfig, explain_failure, has_gpu, vllm_command, wait_until_ready
from atroposlib.launch.ports import assign_ports
from atroposlib.launch.processes import Child, ProcessSpec, RestartConfig, Supervisor
from atroposlib.launch.readiness import until_it_answers
from atroposlib.launch.run_folder import RunFolder
from trainer.local.background import Background

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
SERVER_READY_TIMEOUT_S = 60.0
POLL_S = 0.5
STOP_TIMEOUT_S = 60.0
"""A guardian needs at most three graces for its process; twice that, for a machine that is busy."""
KILL_TIMEOUT_S = 10.0
# What does not come up will hardly do so at the second try.
RESTART = RestartConfig(max_restarts_before_ready=0)

ShowProgress = Callable[[str], None]
"""Told what is waited for."""


class LocalLoop:
    """Starts the services, waits until they answer, restarts what dies, and ends all of them with the block.

    Nothing is left behind, whatever ends the block: an exception, Ctrl-C, or the death of this process.

    Args:
        folder: gets logs, events and the rollout server's store.
        inference: the server to start; its port 0 takes a free one. None: none is started.
        ready_timeout_s: for the inference server to load its model.
        on_failure: told, on another thread, when a service has died for good; failure holds it too.
        show_progress: told what is waited for, again and again while the block is entered.
    Raises:
        ChildFailedError: on entering, a service did not come up.
    """

    def __init__(
        self,
        folder: RunFolder,
        inference: InferenceConfig | None,
        *,
        ready_timeout_s: float = 600.0,
        on_failure: Callable[[Exception], None] = lambda error: None,
        show_progress: ShowProgress = lambda text: None,
    ) -> None:
        folder.logs.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ready_timeout_s = ready_timeout_s
        self._on_failure = on_failure
        self._show_progress = show_progress
        ports = assign_ports(
            {"rollout server": (HOST, 0)}
            | ({} if inference is None else {"local.inference.port": (inference.host, inference.port)})
        )
        self._port = ports["rollout server"]
        self._inference = (
            None if inference is None else inference.model_copy(update={"port": ports["local.inference.port"]})
        )
        self._supervisor = Supervisor(folder.logs, EventLog(folder.events))
        self._background = Background("local-services", self._run, on_failure=self._fail)
        self._ready: Future[None] = Future()

    @property
    def rollout_server_url(self) -> str:
        """Base URL."""
        return f"http://{HOST}:{self._port}"

    @property
    def inference_servers(self) -> list[str]:
        """Base URLs, without /v1, of what was started."""
        return [] if self._inference is None else [self._inference.url]

    @property
    def failure(self) -> Exception | None:
        """Why the services have ended by themselves."""
        return self._background.failure

    @property
    def inference_up_since(self) -> float:
        """Unix time of its last start; infinite while it is down, 0 where none was started."""
        if self._inference is None:
            return 0.0
        child = self._supervisor.children.get("inference")
        return child.started_at if child is not None and child.state == "running" else math.inf

    def pids(self) -> dict[str, int]:
        """Of the services, by name."""
        children = dict(self._supervisor.children)
        return {name: child.pid for name, child in children.items() if child.pid is not None}

    def __enter__(self) -> Self:
        try:
            self._background.start()
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_until_ready(self) -> None:
        began = time.monotonic()
        while True:
            try:
                return self._ready.result(timeout=POLL_S)
            except TimeoutError:
                waits = ", ".join(
                    name for name, child in list(self._supervisor.children.items()) if child.state == "starting"
                )
                self._show_progress(f"starting {waits or 'the services'} ({time.monotonic() - began:.0f} s)")

    def _stop(self) -> None:
        try:
            is_stopped = self._background.stop(STOP_TIMEOUT_S)
        except BaseException:
            # The second Ctrl-C.
            self._kill()
            raise
        if not is_stopped:
            self._kill()

    def _kill(self) -> None:
        self._background.call_soon(self._supervisor.kill_all)
        if not self._background.stop(KILL_TIMEOUT_S):
            log.error("services that do not end: %s", self.pids())

    def _fail(self, error: Exception) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
            return
        self._on_failure(error)

    async def _run(self) -> None:
        await self._supervisor.run(self._serve())

    async def _serve(self) -> None:
        children = [self._supervisor.start(self._rollout_server())]
        if self._inference is not None:
            children.append(self._supervisor.start(self._inference_server(self._inference)))
        await asyncio.gather(*(child.ready() for child in children))
        self._ready.set_result(None)
        await asyncio.get_running_loop().create_future()

    def _rollout_server(self) -> ProcessSpec:
        data_dir = self._folder.path / "rollout_server"
        arguments = ["--host", HOST, "--port", str(self._port), "--data-dir", str(data_dir)]
        return ProcessSpec(
            name="rollout-server",
            argv=(sys.executable, "-m", "rollout_server.cli", *arguments),
            env={"PYTHONUNBUFFERED": "1"},
            is_ready=self._rollout_server_answers,
            restart=RESTART,
        )

    async def _rollout_server_answers(self, child: Child) -> None:
        await until_it_answers(f"{self.rollout_server_url}/healthz", "rollout server", timeout_s=SERVER_READY_TIMEOUT_S)

    def _inference_server(self, config: InferenceConfig) -> ProcessSpec:
        argv, env = vllm_command(config, has_gpu=has_gpu())
        return ProcessSpec(
            name="inference",
            argv=tuple(argv),
            env={"PYTHONUNBUFFERED": "1", **env},
            is_ready=self._inference_answers,
            explain=explain_failure,
            restart=RESTART,
        )

    async def _inference_answers(self, child: Child) -> None:
        if self._inference is None:
            raise AtroposError("there is no inference server")
        await wait_until_ready(self._inference.url, child.guardian, child.log_path, self._ready_timeout_s)
