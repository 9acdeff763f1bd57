"""What the supervisor promises, with tiny real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from atroposlib.errors import AtroposError
from atroposlib.launch.events import EventLog
from atroposlib.launch.processes import (
    Child,
    ChildFailedError,
    ProcessSpec,
    RestartConfig,
    Supervisor,
    explain_log,
)

FOREVER = "import time\nwhile True: time.sleep(1)"
# Leaves the process group and ignores SIGTERM: the worst kind of helper.
STUBBORN_HELPER = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
WITH_HELPER = f"""
import subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", {STUBBORN_HELPER!r}], start_new_session=True)
print("helper", helper.pid, flush=True)
while True: time.sleep(1)
"""
QUICK = RestartConfig(first_pause_s=0.01, max_restarts=3, max_restarts_before_ready=3)


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    return Supervisor(tmp_path / "logs", EventLog(tmp_path / "events.jsonl"))


def python(name: str, code: str, **kwargs: object) -> ProcessSpec:
    settings: dict[str, object] = {"grace_s": 3.0, "restart": QUICK, **kwargs}
    return ProcessSpec(name=name, argv=(sys.executable, "-c", textwrap.dedent(code)), **settings)  # type: ignore[arg-type]


async def until(condition: Callable[[], bool], *, timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  files and foreign processes send no event
            await asyncio.sleep(0.02)


def helper_pid(child: Child) -> int:
    return int(child.log_text().split("helper ")[1].split()[0])


def events(supervisor: Supervisor, name: str) -> list[dict[str, object]]:
    return [event for event in supervisor.events.events if event["event"] == name]


async def test_a_service_that_dies_is_started_again_and_named(supervisor: Supervisor) -> None:
    async def body() -> Child:
        child = supervisor.start(python("server", FOREVER))
        await child.ready()
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: child.restarts == 1 and child.state == "running" and child.pid != first)
        return child

    child = await supervisor.run(body())

    assert child.state == "stopped"
    (died,) = events(supervisor, "died")
    assert died["process"] == "server"
    assert "SIGKILL" in str(died["text"])


async def test_a_service_that_ends_by_itself_is_started_again(supervisor: Supervisor) -> None:
    async def body() -> int:
        child = supervisor.start(python("server", "pass"))
        await until(lambda: child.restarts >= 1)
        return child.restarts

    assert await supervisor.run(body()) >= 1


async def test_a_job_that_ends_with_status_0_is_finished(supervisor: Supervisor) -> None:
    async def body() -> Child:
        child = supervisor.start(python("job", "print('done')", is_finished=lambda: True))
        await child.finished()
        return child

    child = await supervisor.run(body())

    assert (child.state, child.restarts) == ("finished", 0)
    assert "done" in child.log_text()


def test_the_pause_before_a_restart_doubles_up_to_a_limit() -> None:
    policy = RestartConfig(first_pause_s=1.0, max_pause_s=5.0)

    assert [policy.pause_s(n) for n in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]


async def test_a_child_that_dies_too_often_ends_the_run_with_its_last_words(supervisor: Supervisor) -> None:
    code = "import sys\nprint('loading')\nraise RuntimeError('the disk is full')"

    with pytest.raises(ChildFailedError, match=r"trainer ended with status 1 4 times.*the disk is full") as caught:
        await supervisor.run(wait_for_ever(supervisor, python("trainer", code)))

    assert "RuntimeError: the disk is full" in caught.value.tail
    assert caught.value.log_path.name == "trainer.log"


async def wait_for_ever(supervisor: Supervisor, *specs: ProcessSpec) -> None:
    for spec in specs:
        supervisor.start(spec)
    await asyncio.Event().wait()


async def test_a_usage_error_is_not_tried_again(supervisor: Supervisor) -> None:
    code = "import sys\nprint('error: no such option --colour\\nhint: see --help', file=sys.stderr)\nsys.exit(2)"

    with pytest.raises(ChildFailedError, match="no such option --colour"):
        await supervisor.run(wait_for_ever(supervisor, python("env", code)))

    assert supervisor.children["env"].restarts == 0


async def test_a_missing_command_fails_by_name(supervisor: Supervisor) -> None:
    spec = ProcessSpec("env", ("no-such-command-here",), restart=QUICK)

    with pytest.raises(ChildFailedError, match="cannot start no-such-command-here"):
        await supervisor.run(wait_for_ever(supervisor, spec))


async def test_when_one_child_fails_the_others_end_with_it(supervisor: Supervisor) -> None:
    failing = python("env", "import sys; sys.exit(2)")

    with pytest.raises(ChildFailedError):
        await supervisor.run(wait_for_ever(supervisor, python("server", FOREVER), failing))

    pid = supervisor.children["server"].pid
    assert pid is None or not psutil.pid_exists(pid)


async def test_ending_ends_helpers_that_left_the_group_and_ignore_sigterm(supervisor: Supervisor) -> None:
    async def body() -> int:
        child = supervisor.start(python("inference", WITH_HELPER))
        await until(lambda: "helper" in child.log_text())
        return helper_pid(child)

    helper = await supervisor.run(body())

    assert not psutil.pid_exists(helper)


async def test_helpers_of_a_killed_process_end_before_it_starts_again(supervisor: Supervisor) -> None:
    async def body() -> None:
        child = supervisor.start(python("inference", WITH_HELPER))
        await until(lambda: "helper" in child.log_text())
        helper = helper_pid(child)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: child.restarts == 1)
        assert not psutil.pid_exists(helper)

    await supervisor.run(body())


async def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(supervisor: Supervisor) -> None:
    async def body() -> Child:
        child = supervisor.start(python("env", "print('up', flush=True)\n" + STUBBORN_HELPER, grace_s=0.5))
        await until(lambda: "up" in child.log_text())
        await asyncio.sleep(0.2)
        return child

    child = await supervisor.run(body())

    assert child.returncode == -signal.SIGKILL


async def test_callers_end_before_the_services_they_call(supervisor: Supervisor) -> None:
    async def body() -> None:
        for name, rank in (("server", 1), ("trainer", 0)):
            await supervisor.start(python(name, FOREVER, stop_rank=rank)).ready()

    await supervisor.run(body())

    assert [event["process"] for event in events(supervisor, "stopped")] == ["trainer", "server"]


async def test_a_cancelled_run_leaves_no_child(supervisor: Supervisor) -> None:
    run = asyncio.create_task(supervisor.run(wait_for_ever(supervisor, python("server", FOREVER))))
    await until(lambda: "server" in supervisor.children and supervisor.children["server"].pid is not None)

    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run

    pid = supervisor.children["server"].pid
    assert pid is not None
    assert not psutil.pid_exists(pid)


async def test_a_child_is_ready_when_its_check_says_so(supervisor: Supervisor, tmp_path: Path) -> None:
    flag = tmp_path / "flag"

    async def flag_is_there(child: Child) -> None:
        child.waits_for = "its flag"
        await until(flag.exists)

    async def body() -> Child:
        child = supervisor.start(python("server", FOREVER, is_ready=flag_is_there))
        await until(lambda: child.waits_for == "its flag")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(child.ready(), 0.1)
        assert child.state == "starting"
        flag.touch()
        await child.ready()
        return child

    await supervisor.run(body())


async def test_a_child_that_never_gets_ready_fails_with_the_reason(supervisor: Supervisor) -> None:
    async def never(child: Child) -> None:
        raise AtroposError("not ready within 1 s")

    spec = python("inference", FOREVER, is_ready=never, restart=RestartConfig(max_restarts_before_ready=0))

    with pytest.raises(ChildFailedError, match="not ready within 1 s"):
        await supervisor.run(wait_for_ever(supervisor, spec))


async def test_an_ordered_restart_is_no_failure_and_can_change_the_command(supervisor: Supervisor) -> None:
    async def body() -> tuple[int, str]:
        child = supervisor.start(python("inference", FOREVER))
        await child.ready()
        child.replace_argv((sys.executable, "-c", "print('second', flush=True)\n" + FOREVER))
        await child.restart("serves the final weights")
        await until(lambda: "second" in child.log_text())
        return child.restarts, child.state

    assert await supervisor.run(body()) == (0, "running")


def test_no_orphan_is_left_when_the_supervisor_itself_is_killed(tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
from pathlib import Path
from atroposlib.launch.events import EventLog
from atroposlib.launch.processes import ProcessSpec, Supervisor
supervisor = Supervisor(Path({str(tmp_path)!r}), EventLog(Path({str(tmp_path / "events.jsonl")!r})))
async def body():
    supervisor.start(ProcessSpec("inference", (sys.executable, "-c", {WITH_HELPER!r}), grace_s=2.0))
    await asyncio.Event().wait()
asyncio.run(supervisor.run(body()))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    log = tmp_path / "inference.log"
    wait_until(lambda: log.exists() and "helper" in log.read_text())
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3  # the guardian, the process, its helper

    process.kill()
    process.wait()

    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not become true"
        time.sleep(0.05)


def test_the_event_log_is_one_json_line_an_event(tmp_path: Path) -> None:
    seen: list[dict[str, object]] = []
    log = EventLog(tmp_path / "events.jsonl", on_event=seen.append)

    log.add("died", "trainer was killed by SIGKILL", process="trainer")

    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line) == seen[0]
    assert seen[0]["process"] == "trainer"


@pytest.mark.parametrize(
    ("log_text", "reason"),
    [
        ("starting\nerror: no model\nhint: make demo\n", "no model (hint: make demo)"),
        ("Traceback (most recent call last):\n  File x\nValueError: bad value\n\nbye\n", "ValueError: bad value"),
        ("all is well\n", ""),
        ("", ""),
    ],
)
def test_a_log_is_explained_in_its_own_words(log_text: str, reason: str) -> None:
    assert explain_log(log_text) == reason
