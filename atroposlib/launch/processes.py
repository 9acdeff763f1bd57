"""The supervisor: starts child processes, restarts what dies with growing pauses, ends all of them in every case."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from atroposlib.errors import AtroposError
from atroposlib.launch.events import EventLog

log = logging.getLogger(__name__)

T = TypeVar("T")

State = Literal["starting", "running", "restarting", "finished", "stopping", "stopped", "failed"]

GUARD = Path(__file__).with_name("guard.py")
TAIL_LINES = 15
# By convention 2 means "started wrongly" (a bad option, a bad config): another try would end the same way.
USAGE_STATUS = 2


class RestartConfig(BaseModel):
    """When a dead process is started again, and when the run gives up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_restarts: int = Field(default=5, ge=0)
    """Restarts of one process within window_s; one more ends the run."""
    max_restarts_before_ready: int = Field(default=1, ge=0)
    """The same for a process that has never been up: it will hardly get better."""
    window_s: float = Field(default=300.0, gt=0)
    first_pause_s: float = Field(default=1.0, ge=0)
    """Pause before the first restart; doubles with each restart within window_s."""
    max_pause_s: float = Field(default=30.0, ge=0)

    def pause_s(self, recent_restarts: int) -> float:
        """How long to wait when `recent_restarts` happened within the window."""
        return float(min(self.first_pause_s * 2**recent_restarts, self.max_pause_s))


@dataclass(frozen=True)
class ProcessSpec:
    """How to start one process, and what its ends mean."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to our own environment variables."""
    is_finished: Callable[[], bool] | None = None
    """Asked when it exits with status 0: is its work done? None: never. Otherwise it is started again."""
    is_ready: Callable[[Child], Awaitable[None]] | None = None
    """Returns when the process does its work. Raises AtroposError when it never will."""
    explain: Callable[[str], str] | None = None
    """Turns the last part of the log into the reason of its death."""
    grace_s: float = 10.0
    """From SIGTERM to SIGKILL."""
    stop_rank: int = 0
    """Lower ranks end first: who calls a service ends before the service."""
    restart: RestartConfig = field(default_factory=RestartConfig)


class ChildFailedError(AtroposError):
    """A process died for good. `hint` holds the last lines of its log."""

    code = "child_failed"

    def __init__(self, name: str, reason: str, *, log_path: Path, tail: str) -> None:
        super().__init__(f"{name} {reason}")
        self.name = name
        self.log_path = log_path
        self.tail = tail


class Child:
    """One process over all its restarts."""

    def __init__(self, spec: ProcessSpec, log_path: Path, events: EventLog) -> None:
        self.spec = spec
        self.log_path = log_path
        self.state: State = "starting"
        self.pid: int | None = None
        self.restarts = 0
        self.started_at = 0.0
        """Unix time of the last start."""
        self.returncode: int | None = None
        """Of the current process; None while it runs."""
        self.waits_for = ""
        """What it is about to get or do, in the user's words; for the view."""
        self._events = events
        self._restart_times: list[float] = []
        self._guard: asyncio.subprocess.Process | None = None
        self._has_been_ready = False
        self._was_ready = False
        self._not_ready_because = ""
        self._log_offset = 0
        self._stop_ordered = False
        self._restart_ordered = False
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """Name in the view, the log files and the events."""
        return self.spec.name

    async def ready(self) -> None:
        """Wait until the process does its work. A process that never will ends the whole run."""
        await self._ready.wait()

    async def finished(self) -> None:
        """Wait for exit status 0 of a process that may finish, or for the end by our order."""
        await self._ended.wait()

    @property
    def guardian(self) -> asyncio.subprocess.Process:
        """Lives exactly as long as the process."""
        if self._guard is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._guard

    def replace_argv(self, argv: Iterable[str]) -> None:
        """Start it differently from the next start on."""
        self.spec = replace(self.spec, argv=tuple(argv))

    async def restart(self, why: str) -> None:
        """End the running process; the keeper starts it again."""
        self._ready.clear()
        self._restart_ordered = True
        self._events.add("restart_ordered", f"{self.name} is started again: {why}", process=self.name, why=why)
        self._tell_guard(b"stop\n")
        await self._ready.wait()

    async def stop(self) -> None:
        """End the process, whatever state it is in, with all it started."""
        if self._stop_ordered:
            await self._ended.wait()
            return
        self._stop_ordered = True
        if self._keeper is None or self._keeper.done():
            return
        if self.state not in ("finished", "failed"):
            self.state = "stopping"
        if self.returncode is not None or not self._tell_guard(b"stop\n"):
            self._keeper.cancel()
        # The guardian needs at most three graces; one that was stopped or starved must not hold us for ever.
        _, late = await asyncio.wait({self._keeper}, timeout=3 * self.spec.grace_s + 10)
        if late:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})

    def kill(self) -> None:
        """End it now, without asking."""
        self._tell_guard(b"kill\n")

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines that the current process wrote."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def log_text(self, max_bytes: int = 200_000) -> str:
        """What the current process wrote, at most the last max_bytes."""
        try:
            with self.log_path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_offset, size - max_bytes))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""

    async def keep(self) -> None:
        """Run the process until it has finished, fails for good, or is told to stop."""
        try:
            while True:
                returncode = await self._run_once()
                if self._stop_ordered:
                    self.state = "stopped"
                    self._events.add("stopped", f"{self.name} ended", process=self.name, status=returncode)
                    return
                if returncode == 0 and self.spec.is_finished is not None and self.spec.is_finished():
                    self.state = "finished"
                    self._ready.set()
                    self._events.add("finished", f"{self.name} has finished", process=self.name, status=0)
                    return
                if self._restart_ordered:
                    self._restart_ordered = False
                else:
                    await self._pause_before_restart(returncode)
        except asyncio.CancelledError:
            self.state = "stopped"
            raise
        finally:
            self.waits_for = ""
            self._ended.set()

    async def _pause_before_restart(self, returncode: int) -> None:
        now = time.monotonic()
        policy = self.spec.restart
        self._restart_times = [at for at in self._restart_times if now - at < policy.window_s]
        recent = len(self._restart_times)
        limit = (
            policy.max_restarts if self._has_been_ready else min(policy.max_restarts_before_ready, policy.max_restarts)
        )
        how = _how_it_ended(returncode)
        # Who was killed had no time to write why; the last lines of its log are about something else.
        was_killed = returncode in (-signal.SIGKILL, -signal.SIGTERM)
        explanation = self._not_ready_because or ("" if was_killed else self.explanation())
        is_usage_error = returncode == USAGE_STATUS and not self._was_ready
        if is_usage_error or recent >= limit:
            self.state = "failed"
            again = f" {recent + 1} times within {policy.window_s:.0f} s" if recent else ""
            reason = f"{how}{again}" + (f": {explanation}" if explanation else "")
            self._events.add("failed", f"{self.name} {reason}", process=self.name, status=returncode)
            raise ChildFailedError(self.name, reason, log_path=self.log_path, tail=self.log_tail())
        pause_s = policy.pause_s(recent)
        self.restarts += 1
        self._restart_times.append(now)
        self.state = "restarting"
        self.waits_for = f"restart {self.restarts} after {how}"
        self._ready.clear()
        self._events.add(
            "died",
            f"{self.name} {how}; restart {self.restarts} in {pause_s:.1f} s"
            + (f" ({explanation})" if explanation else ""),
            process=self.name,
            status=returncode,
            restart=self.restarts,
        )
        await asyncio.sleep(pause_s)

    def explanation(self) -> str:
        """Why the process ended, from its log; empty when the log says nothing."""
        text = self.log_text()
        return (self.spec.explain(text) if self.spec.explain else "") or explain_log(text)

    async def _run_once(self) -> int:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log_file:
            if log_file.tell():
                log_file.write(f"\n--- started again at {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
            self._log_offset = log_file.tell()
            log_file.flush()
            self._guard = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                str(GUARD),
                str(self.spec.grace_s),
                *self.spec.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
                env={**os.environ, **self.spec.env},
                start_new_session=True,
            )
        self.state, self.waits_for, self.returncode = "starting", "", None
        self.started_at = time.time()
        self._was_ready = False
        self._not_ready_because = ""
        try:
            return await self._watch(self._guard)
        finally:
            with contextlib.suppress(ProcessLookupError):
                if self._guard.returncode is None:
                    self._guard.kill()
                    _kill_group(self.pid)
                    await self._guard.wait()
            if self._guard.stdin is not None:
                self._guard.stdin.close()

    async def _watch(self, guard: asyncio.subprocess.Process) -> int:
        assert guard.stdout is not None
        returncode: int | None = None
        getting_ready: asyncio.Task[None] | None = None
        try:
            if self._stop_ordered:
                self._tell_guard(b"stop\n")
            while line := (await guard.stdout.readline()).decode().split():
                if line[0] == "started":
                    self.pid = int(line[1])
                    self._events.add(
                        "started", f"{self.name} started (pid {self.pid})", process=self.name, pid=self.pid
                    )
                    getting_ready = asyncio.create_task(self._become_ready())
                else:
                    returncode = int(line[1])
            await guard.wait()
            if returncode is None:
                # The guardian itself was killed; its process dies with it, helpers may not.
                returncode = -signal.SIGKILL
                _kill_group(self.pid)
        finally:
            self.returncode = -signal.SIGKILL if returncode is None else returncode
            if getting_ready is not None:
                getting_ready.cancel()
                await asyncio.wait({getting_ready})
        return self.returncode

    async def _become_ready(self) -> None:
        if self.spec.is_ready is None:
            self.state = "running"
            self._ready.set()
            return
        try:
            await self.spec.is_ready(self)
        except AtroposError as error:
            log.warning("%s does not become ready: %s", self.name, error)
            if self.returncode is None:
                self._not_ready_because = str(error)
                self._tell_guard(b"stop\n")
            return
        self.state, self.waits_for = "running", ""
        self._has_been_ready = self._was_ready = True
        self._ready.set()
        self._events.add(
            "ready",
            f"{self.name} is ready",
            process=self.name,
            after_s=round(time.time() - self.started_at, 2),
        )

    def _tell_guard(self, order: bytes) -> bool:
        guard = self._guard
        if guard is None or guard.returncode is not None or guard.stdin is None or guard.stdin.is_closing():
            return False
        guard.stdin.write(order)
        return True


class Supervisor:
    """Owns every child: when `run` returns, whatever the reason, none is left.

    Args:
        log_dir: gets NAME.log for each child.
        events: told of every start, death, restart and end.
    """

    def __init__(self, log_dir: Path, events: EventLog) -> None:
        self.log_dir = log_dir
        self.events = events
        self.children: dict[str, Child] = {}
        self._failure: asyncio.Future[ChildFailedError] | None = None
        self._is_stopping = False

    def start(self, spec: ProcessSpec) -> Child:
        """Start a child and keep it alive from now on."""
        if self._failure is None:
            raise RuntimeError("children are started inside Supervisor.run")
        child = Child(spec, self.log_dir / f"{spec.name}.log", self.events)
        self.children[spec.name] = child
        child._keeper = asyncio.create_task(child.keep(), name=f"keep {spec.name}")
        child._keeper.add_done_callback(self._on_keeper_done)
        return child

    async def run(self, body: Coroutine[Any, Any, T]) -> T:
        """Run `body` beside the children it starts, then end them all.

        Raises:
            ChildFailedError: a child died for good; body was cancelled.
        """
        self._failure = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(body, name="run")
        try:
            watched: set[asyncio.Future[Any]] = {task, self._failure}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                raise self._failure.result()
            return await task
        finally:
            task.cancel()
            await _uncancelled(self._stop_all(task))

    def kill_all(self) -> None:
        """End every child now, without asking: for the impatient second Ctrl-C."""
        for child in self.children.values():
            child.kill()

    async def _stop_all(self, body: asyncio.Task[Any]) -> None:
        self._is_stopping = True
        await asyncio.wait([body])
        for rank in sorted({child.spec.stop_rank for child in self.children.values()}):
            ranked = [child for child in self.children.values() if child.spec.stop_rank == rank]
            await asyncio.gather(*(child.stop() for child in ranked))

    def _on_keeper_done(self, keeper: asyncio.Task[None]) -> None:
        if keeper.cancelled() or (error := keeper.exception()) is None:
            return
        if not isinstance(error, ChildFailedError):
            log.error("keeper of a process failed", exc_info=error)
            error = ChildFailedError(keeper.get_name(), f"failed: {error!r}", log_path=self.log_dir, tail="")
        if self._failure is not None and not self._failure.done() and not self._is_stopping:
            self._failure.set_result(error)


async def _uncancelled(work: Coroutine[Any, Any, None]) -> None:
    """Finish the work although our own task is cancelled meanwhile, then pass the cancellation on."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


def _kill_group(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


def explain_log(text: str) -> str:
    """The reason in a log's own words: its last `error:` line, else the last line of its last traceback."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("error: "):
            hint = next((line for line in lines[index + 1 :] if line.startswith("hint: ")), "")
            return lines[index].removeprefix("error: ") + (f" ({hint})" if hint else "")
    starts = [index for index, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if starts:
        return next((line for line in lines[starts[-1] + 1 :] if not line.startswith(" ")), "")
    return ""
