"""Runs a function that nobody trusts on given arguments: a process of its own with limits, which is killed whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from atroposlib.errors import RolloutError

log = logging.getLogger(__name__)

CONFINE = Path(__file__).with_name("confine.py")
RUNNER = Path(__file__).with_name("runner.py")
START_DEADLINE_S = 20.0
OPEN_FILES = 32

T = TypeVar("T")

StoppedBy = Literal["", "time", "cpu", "output", "exit", "kill"]


class SandboxError(RolloutError):
    """The sandbox itself failed: nothing is known about the code."""


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    wall_s: float = 8.0
    cpu_s: int = 4
    memory_bytes: int = 256 << 20
    """Address space, that of the interpreter (about 30 MB) included."""
    output_bytes: int = 1 << 18
    """Of what is printed, and of the results."""
    file_bytes: int = 1 << 20
    """Of each file in its folder."""

    @property
    def by_name(self) -> dict[str, int]:
        """The limits that the kernel keeps, by the end of their RLIMIT_ name."""
        return {
            "CPU": self.cpu_s, "AS": self.memory_bytes, "FSIZE": self.file_bytes,
            "NOFILE": OPEN_FILES, "NPROC": 0, "CORE": 0,
        }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of one call: a value, or an error."""

    value: Any = None
    error: str = ""


@dataclass(frozen=True)
class Execution:
    """What became of the code."""

    outcomes: tuple[Outcome, ...]
    """Of the calls that ended, in order."""
    failure: str = ""
    """Why the code could not even be loaded."""
    stopped_by: StoppedBy = ""
    """The limit that ended it early; exit: it ended itself; kill: somebody killed it, perhaps itself."""
    has_namespaces: bool = False
    """Whether it had no network by the kernel's doing."""
    landlock: int = 0
    """Version of Landlock that kept it to its folder; 0: none."""


async def execute(code: str, function: str, calls: Sequence[Sequence[Any]], limits: Limits) -> Execution:
    """Call a function that the code defines with each list of arguments; values pass through JSON both ways.

    Code that was killed runs once more. Killed again, it counts as code that ended itself: whoever finds a way to kill
    the sandbox must not be able to choose that a bad reply goes unpaid.

    Raises:
        SandboxError: the sandbox did not start.
    """
    request = json.dumps({"code": code, "function": function, "calls": calls}).encode()
    execution = await _run(request, limits, n_calls=len(calls))
    if execution.stopped_by == "kill":
        log.warning("the sandbox was killed: has the machine run out of memory? Running the code once more")
        execution = await _run(request, limits, n_calls=len(calls))
    return replace(execution, stopped_by="exit") if execution.stopped_by == "kill" else execution


async def _run(request: bytes, limits: Limits, *, n_calls: int) -> Execution:
    with tempfile.TemporaryDirectory(prefix="atropos-code-", ignore_cleanup_errors=True) as folder:
        process = await _start(folder, limits)
        try:
            return await _observe(process, request, limits, n_calls=n_calls)
        finally:
            _kill_group(process.pid)
            await process.wait()


async def _start(folder: str, limits: Limits) -> asyncio.subprocess.Process:
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    try:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-B", str(CONFINE), str(RUNNER), json.dumps(limits.by_name)),
            cwd=folder,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=max(limits.output_bytes, 1 << 16),
        )
    except OSError as error:
        raise SandboxError(f"cannot start the sandbox: {error}") from error


async def _observe(process: asyncio.subprocess.Process, request: bytes, limits: Limits, *, n_calls: int) -> Execution:
    facts = await _hand_over(process, request)
    started = time.monotonic()
    report = bytearray()
    stopped_by: StoppedBy = ""
    try:
        async with asyncio.timeout(limits.wall_s):
            streams = ((_opened(process.stdout), report), (_opened(process.stderr), bytearray()))
            reading = [_read(stream, kept, limits.output_bytes, process.pid) for stream, kept in streams]
            if not all(await asyncio.gather(*reading)):
                stopped_by = "output"
            await process.wait()
    except TimeoutError:
        stopped_by = "time"
    failure, outcomes = _parse(bytes(report), n_calls)
    if not stopped_by and not failure and len(outcomes) < n_calls:
        stopped_by = _reason(process.returncode, time.monotonic() - started, limits)
    return Execution(outcomes, failure, stopped_by, bool(facts["namespaces"]), int(facts["landlock"]))


async def _hand_over(process: asyncio.subprocess.Process, request: bytes) -> dict[str, Any]:
    """Send the request; returns the runner's first line, which it writes before any foreign code runs."""
    stdin, stdout, stderr = _opened(process.stdin), _opened(process.stdout), _opened(process.stderr)
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            stdin.write(request)
            with contextlib.suppress(ConnectionError):
                await stdin.drain()
            stdin.close()
            line = await stdout.readline()
            if line:
                return dict(json.loads(line))
            said = (await stderr.read(4096)).decode(errors="replace").strip()
    except TimeoutError as error:
        raise SandboxError(
            f"the sandbox did not start within {START_DEADLINE_S} s; is the machine overloaded?"
        ) from error
    raise SandboxError(f"the sandbox did not start: {said.splitlines()[-1] if said else 'it said nothing'}")


def _opened(stream: T | None) -> T:
    assert stream is not None, "every stream is a pipe"
    return stream


async def _read(stream: asyncio.StreamReader, kept: bytearray, limit: int, pid: int) -> bool:
    """Read to the end; where it is more than allowed, end the writer and return False."""
    while part := await stream.read(1 << 16):
        kept += part
        if len(kept) > limit:
            _kill_group(pid)
            return False
    return True


def _parse(report: bytes, n_calls: int) -> tuple[str, tuple[Outcome, ...]]:
    """The failure, if any, and the outcomes up to the first line that cannot be read."""
    outcomes: list[Outcome] = []
    for line in report.splitlines():
        try:
            entry = json.loads(line)
            if "failure" in entry:
                return str(entry["failure"]), ()
            outcomes.append(Outcome(entry.get("value"), str(entry.get("error", ""))))
        # The code can write here what it likes; it gains nothing by it.
        except (ValueError, TypeError, AttributeError, RecursionError):
            break
    return "", tuple(outcomes[:n_calls])


def _reason(status: int | None, seconds: float, limits: Limits) -> StoppedBy:
    """Why there are too few results."""
    if status == -signal.SIGXCPU or (status == -signal.SIGKILL and seconds >= limits.cpu_s):
        return "cpu"
    return "kill" if status == -signal.SIGKILL else "exit"


def _kill_group(pid: int) -> None:
    # By the group, which lives on when its first process has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
