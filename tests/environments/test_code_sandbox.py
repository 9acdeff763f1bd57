"""The sandbox: each limit holds, whatever the code does is an outcome, and only its own failure is an error."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from atroposlib.errors import RolloutError
from environments.code_execution import sandbox
from environments.code_execution.sandbox import Execution, Limits, Outcome, SandboxError, execute

QUICK = Limits(wall_s=10.0, cpu_s=5)
NETWORK = """
import json, os, socket, sys

def tried(call):
    try:
        call()
    except OSError as error:
        return error.strerror or str(error)
    return "done"

port, place, secret = json.loads(sys.stdin.read())
facts = json.loads(sys.argv[1])
print(json.dumps({
    "landlock": facts["landlock"], "namespaces": facts["namespaces"],
    "connect": tried(lambda: socket.create_connection(("127.0.0.1", port), 1)),
    "write": tried(lambda: open(place, "w").write("x")),
    "read": tried(lambda: open(secret).read()),
    "signal": tried(lambda: os.kill(os.getppid(), 0)),
    "own": tried(lambda: open("mine", "w").write("x")),
}))
"""


async def run(body: str, calls: list[list[object]] | None = None, limits: Limits = QUICK) -> Execution:
    return await execute(body, "f", [[]] if calls is None else calls, limits)


def error_of(execution: Execution) -> str:
    [outcome] = execution.outcomes
    return outcome.error


async def test_values_and_errors_come_back_by_call() -> None:
    execution = await run("def f(a, b): return [a, a / b]", [[1, 2], [1, 0], [{"x": None}, 1]])

    assert execution.outcomes[0] == Outcome([1, 0.5])
    assert execution.outcomes[1].error == "ZeroDivisionError: division by zero"
    assert execution.outcomes[2].error.startswith("TypeError")
    assert (execution.failure, execution.stopped_by) == ("", "")


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("def f(:", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("g = 1", "NameError: the code defines no function 'f'"),
        ("import numpy\ndef f(): pass", "ModuleNotFoundError"),
    ],
)
async def test_code_that_cannot_be_loaded_is_a_failure_of_the_code(code: str, failure: str) -> None:
    execution = await run(code)

    assert execution.failure.startswith(failure)
    assert execution.outcomes == ()


async def test_waiting_ends_with_the_wall_clock_and_earlier_results_stay() -> None:
    code = "import time\ndef f(s):\n    time.sleep(s)\n    return s"

    execution = await run(code, [[0], [60]], Limits(wall_s=0.4))

    assert (execution.stopped_by, execution.outcomes) == ("time", (Outcome(0),))


async def test_computing_ends_with_the_cpu_limit() -> None:
    assert (await run("def f():\n    while True: pass", limits=Limits(wall_s=15, cpu_s=1))).stopped_by == "cpu"


async def test_memory_is_limited() -> None:
    execution = await run("def f(n): return len(bytearray(n))", [[1 << 20], [1 << 28]], Limits(memory_bytes=1 << 27))

    assert execution.outcomes == (Outcome(1 << 20), Outcome(None, "MemoryError: "))


@pytest.mark.parametrize(
    "body", ["while True: print('x' * 1000)", "import sys\n    while True: sys.stderr.write('x')", "return 'x' * 10**6"]
)
async def test_output_is_limited(body: str) -> None:
    execution = await run(f"def f():\n    {body}", limits=Limits(output_bytes=100_000))

    assert execution.stopped_by == "output"


async def test_files_are_limited_in_size_and_kept_to_the_folder(tmp_path: Path) -> None:
    place = tmp_path / "outside"
    code = "def f(path, n):\n    open(path, 'w').write('x' * n)\n    return open(path).read()"

    execution = await run(code, [["inside", 2], ["inside", 1 << 22], [str(place), 1]])

    assert execution.outcomes[0] == Outcome("xx")
    assert "File too large" in execution.outcomes[1].error
    assert "PermissionError" in execution.outcomes[2].error
    assert not place.exists()


@pytest.mark.parametrize(
    "body",
    [
        "import socket\n    socket.create_connection(('127.0.0.1', 80), 1)",
        "import socket\n    socket.getaddrinfo('example.org', 80)",
        "import os\n    os.fork()",
        "import os\n    os.system('true')",
        "import os\n    os.posix_spawn('/bin/true', ['true'], {})",
        "import os\n    os.kill(os.getppid(), 9)",
        "import subprocess",
        "import _signal",
        "import ctypes",
        "open('/etc/passwd').read()",
        f"open({str(Path(sandbox.__file__).parent / 'data' / 'tasks.jsonl')!r}).read()",
        "import os\n    os.remove('/etc/hostname')",
        "import os\n    os.mkdir('/tmp/atropos-escape')",
    ],
)
async def test_what_reaches_outside_is_refused(body: str) -> None:
    assert error_of(await run(f"def f():\n    {body}\n    return 'done'")).startswith("PermissionError")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_the_kernel_refuses_it_too_where_it_can(listener: socket.socket, tmp_path: Path) -> None:
    """Without the runner's hook: what confine.py alone does to a program."""
    folder, secret, place, probe = (tmp_path / name for name in ("box", "secret", "outside", "probe.py"))
    folder.mkdir()
    secret.write_text("s")
    probe.write_text(NETWORK)
    command = [sys.executable, "-I", "-S", "-B", str(sandbox.CONFINE), str(probe), json.dumps(QUICK.by_name)]
    asked = json.dumps([listener.getsockname()[1], str(place), str(secret)])

    done = subprocess.run(command, cwd=folder, input=asked, capture_output=True, text=True, check=False, timeout=20)
    found = json.loads(done.stdout)

    if not found["namespaces"] and not found["landlock"]:
        pytest.skip("this kernel offers neither namespaces nor Landlock here")
    assert found["own"] == "done"
    if found["namespaces"] or found["landlock"] >= 4:
        assert found["connect"] != "done"
    if found["landlock"]:
        assert (found["write"], found["read"], place.exists()) == ("Permission denied", "Permission denied", False)
    if found["landlock"] >= 6:
        assert found["signal"] == "Operation not permitted"


async def test_the_environment_s_secrets_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")

    [outcome] = (await run("import os\ndef f(): return sorted(os.environ)")).outcomes

    assert set(outcome.value) <= {"HOME", "LANG", "LC_CTYPE", "PATH", "TMPDIR"}


async def test_ending_the_process_is_the_code_s_own_doing() -> None:
    execution = await run("import os\ndef f(n):\n    os._exit(0) if n else None\n    return n", [[0], [1], [0]])

    assert (execution.stopped_by, execution.outcomes) == ("exit", (Outcome(0),))


async def test_a_forged_report_is_read_as_results_and_nothing_more() -> None:
    writes = "for fd in range(3, 9):\n        try: os.write(fd, b'[' * 5000 + b'\\n')\n        except OSError: pass"
    code = f"import os\ndef f():\n    {writes}\n    os._exit(0)"

    assert (await run(code)).outcomes == ()


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def is_at_work(process: psutil.Process) -> bool:
    """Whether the code has made its file: foreign code runs."""
    try:
        return Path(process.cwd(), "here").exists()
    except psutil.NoSuchProcess:
        return False


async def at_work(task: asyncio.Task[Execution], others: set[psutil.Process]) -> psutil.Process:
    """The sandbox's process, once foreign code runs in it."""
    async with asyncio.timeout(10):
        while not (found := [child for child in children() - others if is_at_work(child)]):
            assert not task.done()
            await asyncio.sleep(0.01)
    return found[0]


WAITING = "import time\ndef f():\n    open('here', 'w')\n    time.sleep(60)"


async def test_nothing_is_left_behind_when_it_is_cancelled() -> None:
    others = children()
    task = asyncio.create_task(run(WAITING))
    process = await at_work(task, others)
    folder = process.cwd()

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert not process.is_running()
    assert not os.path.exists(folder)  # noqa: ASYNC240 - in a test


async def test_a_sandbox_that_does_not_start_is_an_error_of_the_infrastructure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "RUNNER", Path("/nowhere/runner.py"))

    with pytest.raises(SandboxError, match="did not start"):
        await run("def f(): return 1")
    assert issubclass(SandboxError, RolloutError)


@pytest.mark.parametrize("body", ["signal.raise_signal(9)", "signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 9)"])
async def test_the_code_cannot_kill_itself_by_a_signal(body: str) -> None:
    assert "AttributeError" in error_of(await run(f"import os, signal\ndef f():\n    {body}"))


async def killed(times: int) -> Execution:
    """What becomes of waiting code that somebody kills so many times."""
    task = asyncio.create_task(run(WAITING, limits=Limits(wall_s=2.0)))
    dead: set[psutil.Process] = children()
    for _ in range(times):
        process = await at_work(task, dead)
        dead.add(process)
        process.kill()
    return await task


async def test_a_sandbox_that_somebody_kills_runs_once_more() -> None:
    assert (await killed(times=1)).stopped_by == "time"


async def test_killed_again_it_is_the_code_s_own_doing() -> None:
    assert (await killed(times=2)).stopped_by == "exit"
