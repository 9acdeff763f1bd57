"""The order of a run: who starts when, what is evaluated when, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial

import yaml
from rich.console import Console

from atroposlib.client import RolloutClient
from atroposlib.errors import AtroposError
from atroposlib.launch.commands import Command, Plan
from atroposlib.launch.config import EnvironmentSection, UpConfig, check_files
from atroposlib.launch.events import EventLog
from atroposlib.launch.heldout import heldout_rewards, rewards_text
from atroposlib.launch.inference import explain_failure, has_gpu, wait_until_ready
from atroposlib.launch.jsonl import read_jsonl
from atroposlib.launch.mock_model import write_mock_model
from atroposlib.launch.ports import assign_ports
from atroposlib.launch.processes import Child, ProcessSpec, RestartConfig, Supervisor
from atroposlib.launch.readiness import until_it_answers
from atroposlib.launch.run_folder import RunFolder
from atroposlib.launch.summary import Summary, summarise
from atroposlib.launch.telemetry import Telemetry
from atroposlib.launch.view import show
from atroposlib.wire.models import GroupRecord

log = logging.getLogger(__name__)

SERVER_READY_TIMEOUT_S = 60.0
# Callers end before the services that they call.
CALLERS, SERVICES = 0, 1


class InterruptedRunError(AtroposError):
    """Ctrl-C or SIGTERM ended the run."""

    code = "interrupted"

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"ended by {number.name}")
        self.number = number


def make_plan(config: UpConfig, folder: RunFolder) -> Plan:
    """Check what can be checked without starting anything, and find ports.

    Raises:
        LaunchConfigError: a file is missing or a port is in use.
    """
    check_files(config)
    wanted = {"rollout_server.port": (config.rollout_server.host, config.rollout_server.port)}
    if config.inference.base_url is None:
        wanted["inference.port"] = (config.inference.host, config.inference.port)
    started = {name: section for name, section in config.frozen.items() if section.base_url is None}
    wanted |= {f"frozen.{name}.port": (section.host, section.port) for name, section in started.items()}
    ports = assign_ports(wanted)
    return Plan(
        config,
        folder,
        server_port=ports["rollout_server.port"],
        inference_port=ports.get("inference.port", 0),
        has_gpu=has_gpu(),
        frozen_ports={name: ports[f"frozen.{name}.port"] for name in started},
    )


class Up:
    """One session of one run: from the start of its processes to the summary.

    Args:
        plan: what to start.
        console: where the view and the summary go.
        is_live: redraw one view in place, instead of printing lines.
    """

    def __init__(self, plan: Plan, console: Console, *, is_live: bool) -> None:
        self.plan = plan
        self.config = plan.config
        self.folder = plan.folder
        self.console = console
        self.is_live = is_live
        self.events = EventLog(self.folder.events)
        self.supervisor = Supervisor(self.folder.logs, self.events)
        self.telemetry = Telemetry(
            self.folder, num_steps=self.config.trainer.max_steps, children=self.supervisor.children
        )
        self.events.on_event = self.telemetry.on_event
        self._inference: Child | None = None
        # Whether an earlier session ended the training. A model alone does not say so: its writer may have died.
        self._is_trained = self.folder.has_final and any(
            event["event"] == "finished" and event["process"] == "trainer" for event in read_jsonl(self.folder.events)
        )

    async def run(self) -> Summary:
        """Run to the end, whatever the end is; every process is gone and summary.json written when this returns.

        Raises:
            ChildFailedError: a process failed for good.
            InterruptedRunError: Ctrl-C or SIGTERM. The run can be resumed.
        """
        self.folder.config.write_text(self.config.to_yaml(), encoding="utf-8")
        keys = yaml.safe_dump(self.plan.trainer_keys(), sort_keys=False)
        self.folder.trainer_config.write_text(keys, encoding="utf-8")
        if self.config.is_mock:
            write_mock_model(self.folder.mock_model)
        self.events.add("session_started", f"run {self.folder.run_id}", run_id=self.folder.run_id)
        view = asyncio.create_task(show(self.telemetry, self.console, is_live=self.is_live))
        polling = asyncio.create_task(self.telemetry.poll(self.plan.server_url))
        outcome = "finished"
        try:
            with _signals_end(self.supervisor) as interrupted:
                try:
                    await self.supervisor.run(self._body())
                except asyncio.CancelledError:
                    if interrupted:
                        raise InterruptedRunError(interrupted[0]) from None
                    raise
        except BaseException as error:
            outcome = str(error) or type(error).__name__
            raise
        finally:
            self._phase("done" if outcome == "finished" else "ended")
            self.events.add("session_ended", outcome)
            self.telemetry.read_files()
            for task in (view, polling):
                task.cancel()
            await asyncio.wait([view, polling])
        summary = self.summarise()
        summary.write(self.folder.summary)
        return summary

    def summarise(self, outcome: str = "finished") -> Summary:
        """Count what came of the run so far."""
        return summarise(self.folder, outcome=outcome, max_staleness_allowed=self.config.trainer.max_staleness)

    async def _body(self) -> None:
        self._phase("starting")
        if self.config.inference.base_url is not None:
            await until_it_answers(f"{self.plan.inference_url}/health", "inference.url")
        for name in self.config.frozen.keys() - self.plan.frozen_ports.keys():
            await until_it_answers(f"{self.plan.frozen_url(name)}/health", f"frozen.{name}.url")
        checks = self._start_checks()
        await self._start_rollout_server()
        evaluate_before = self.config.evaluation.before and not self.folder.has_evaluation("before")
        self._inference = self._start_inference()
        frozen = [self._start_frozen(name) for name in self.plan.frozen_ports]
        await asyncio.gather(*(check.finished() for check in checks))
        for check in checks:
            del self.supervisor.children[check.name]
        if self._inference is not None:
            await self._inference.ready()
        await asyncio.gather(*(server.ready() for server in frozen))
        if not self._is_trained:
            # The trainer loads its model during the evaluation; but a resumed one publishes what it has learnt.
            trainer = None if self.folder.has_checkpoint else self._start_trainer()
            if evaluate_before:
                await self._evaluate("before")
            await self._train(trainer or self._start_trainer())
        if self.config.evaluation.after and not self.folder.has_evaluation("after"):
            await self._serve_final_weights()
            await self._evaluate("after")
        await self._save_server_ledger()

    def _start_checks(self) -> list[Child]:
        """Let every process check its options now: a bad one should not come to light after the model is loaded."""
        commands = {f"check-{section.label}": self.plan.environment(section) for section in self.config.environments}
        if not self._is_trained:
            commands["check-trainer"] = self.plan.trainer_check()
        return [
            self.supervisor.start(
                self._spec(
                    name,
                    replace(command, argv=(*command.argv, "--dry-run")),
                    is_finished=lambda: True,
                    restart=self.config.restart.model_copy(update={"max_restarts": 0}),
                )
            )
            for name, command in commands.items()
        ]

    def _start_inference(self) -> Child | None:
        if self.config.inference.base_url is not None:
            return None
        model = self.folder.final if self._is_trained else None
        timeout_s = self.config.inference.ready_timeout_s
        return self._start_engine("inference", self.plan.inference(model), self.plan.inference_url, timeout_s)

    def _start_frozen(self, name: str) -> Child:
        timeout_s = self.config.frozen[name].ready_timeout_s
        return self._start_engine(f"inference-{name}", self.plan.frozen(name), self.plan.frozen_url(name), timeout_s)

    def _start_engine(self, name: str, command: Command, url: str, timeout_s: float) -> Child:
        async def is_ready(child: Child) -> None:
            child.waits_for = "loads the model"
            await wait_until_ready(url, child.guardian, child.log_path, timeout_s)

        return self.supervisor.start(
            self._spec(
                name,
                command,
                is_ready=is_ready,
                explain=explain_failure,
                stop_rank=SERVICES,
                # A model that does not load will not load at the second try either.
                restart=self.config.restart.model_copy(update={"max_restarts_before_ready": 0}),
            )
        )

    async def _start_rollout_server(self) -> None:
        child = self.supervisor.start(
            self._spec(
                "rollout-server",
                self.plan.rollout_server(),
                is_ready=self._server_is_ready,
                stop_rank=SERVICES,
                restart=self.config.restart.model_copy(update={"max_restarts_before_ready": 0}),
            )
        )
        await child.ready()

    async def _server_is_ready(self, child: Child) -> None:
        await until_it_answers(f"{self.plan.server_url}/healthz", "rollout server", timeout_s=SERVER_READY_TIMEOUT_S)

    def _start_trainer(self) -> Child:
        return self.supervisor.start(
            self._spec(
                "trainer",
                self.plan.trainer(),
                # It also ends with status 0 when somebody stops it; the model says that it is done.
                is_finished=lambda: self.folder.has_final,
                is_ready=self._trainer_is_ready,
            )
        )

    async def _trainer_is_ready(self, child: Child) -> None:
        """It has opened the run since it was started."""
        child.waits_for = "loads the model"
        await self.telemetry.until(lambda: self.telemetry.trainer_seen_at > child.started_at)

    async def _environment_is_ready(self, label: str, child: Child) -> None:
        """It has called the rollout server since it was started."""
        child.waits_for = "loads the environment"
        await self.telemetry.until(lambda: self.telemetry.env_seen_at(label) > child.started_at)

    async def _train(self, trainer: Child) -> None:
        self._phase("training")
        environments = [
            self.supervisor.start(
                self._spec(
                    f"env-{section.label}",
                    self.plan.environment(section),
                    is_finished=lambda: True,  # it ends by itself when the run has taken its last step
                    is_ready=partial(self._environment_is_ready, section.label),
                )
            )
            for section in self.config.environments
        ]
        await trainer.finished()
        await asyncio.gather(*(environment.stop() for environment in environments))

    async def _serve_final_weights(self) -> None:
        """The engine holds the last published weights, unless it was started again since: then it holds the first."""
        engine = self._inference
        if engine is None or not self.folder.has_final:
            return
        engine.replace_argv(self.plan.inference(self.folder.final).argv)
        last_step = float(self.telemetry.latest.get("time", 0.0))
        if engine.restarts and engine.started_at > last_step:
            await engine.restart("to serve the final weights")

    async def _evaluate(self, phase: str) -> None:
        self._phase(f"evaluating {phase}")
        await asyncio.gather(*(self._evaluate_one(section, phase) for section in self.config.environments))
        rewards = heldout_rewards(self.folder.evaluation(phase))
        if rewards:
            text = f"held-out reward {phase}: {rewards_text(rewards)}"
            self.events.add("evaluated", text, phase=phase, rewards=rewards)
        else:
            self._warn(f"the evaluation {phase} left no heldout_reward in {self.folder.evaluation(phase)}")

    async def _evaluate_one(self, section: EnvironmentSection, phase: str) -> None:
        child = self.supervisor.start(
            self._spec(
                f"evaluate-{phase}-{section.label}",
                self.plan.evaluation(section, phase),
                is_finished=lambda: True,
                restart=self.config.restart.model_copy(update={"max_restarts": 1}),
            )
        )
        await child.finished()
        del self.supervisor.children[child.name]  # its place in the view is free again

    async def _save_server_ledger(self) -> None:
        try:
            async with RolloutClient(self.plan.server_url, deadline_s=10.0) as client:
                records = await asyncio.wait_for(client.group_records(), 60.0)
        except (AtroposError, TimeoutError) as error:
            self._warn(f"the rollout server's records could not be read: {error}")
            return
        write_server_ledger(self.folder, records)

    def _spec(
        self,
        name: str,
        command: Command,
        *,
        is_finished: Callable[[], bool] | None = None,
        is_ready: Callable[[Child], Awaitable[None]] | None = None,
        explain: Callable[[str], str] | None = None,
        stop_rank: int = CALLERS,
        restart: RestartConfig | None = None,
    ) -> ProcessSpec:
        return ProcessSpec(
            name=name,
            argv=command.argv,
            env=command.env,
            is_finished=is_finished,
            is_ready=is_ready,
            explain=explain,
            grace_s=command.grace_s,
            stop_rank=stop_rank,
            restart=restart or self.config.restart,
        )

    def _phase(self, phase: str) -> None:
        self.telemetry.phase = phase
        self.events.add("phase", phase, phase=phase)

    def _warn(self, text: str) -> None:
        log.warning(text)
        self.events.add("warning", f"warning: {text}")


def write_server_ledger(folder: RunFolder, records: list[GroupRecord]) -> None:
    """Keep the server's side of the account for the summary."""
    folder.ledger.mkdir(exist_ok=True)
    folder.server_ledger.write_text(json.dumps([record.model_dump() for record in records]), encoding="utf-8")


@contextlib.contextmanager
def _signals_end(supervisor: Supervisor) -> Iterator[list[signal.Signals]]:
    """The first Ctrl-C or SIGTERM ends the run in order, the second kills. Yields the signals that came."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    came: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        came.append(number)
        if len(came) == 1:
            task.cancel()
        else:
            supervisor.kill_all()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield came
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
