"""The services of a local run: they come up together, and none is left, however the block ends."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from atroposlib.launch.config import InferenceSection, LaunchConfigError
from atroposlib.launch.inference import InferenceConfig
from atroposlib.launch.processes import ChildFailedError, RestartConfig
from atroposlib.launch.run_folder import RunFolder
from trainer.local import loop as loop_module
from trainer.local.loop import LocalLoop

ROOT = Path(__file__).parents[3]
DEADLINE_S = 20.0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def mock_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MOCK inference server in the place of vLLM."""

    def command(config: InferenceConfig, *, has_gpu: bool) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-m", "atroposlib.cli.main", "mock-inference", "--port", str(config.port)], {}

    monkeypatch.setattr(loop_module, "vllm_command", command)
    monkeypatch.setattr(loop_module, "has_gpu", lambda: False)


def an_engine() -> InferenceConfig:
    return InferenceSection(model="mock")


@pytest.mark.usefixtures("mock_engine")
def test_both_services_answer_inside_the_block_and_are_gone_after_it(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with LocalLoop(RunFolder(tmp_path), an_engine()) as loop:
        pids = loop.pids()
        family = {child.pid for child in psutil.Process().children(recursive=True)} - before
        answers = [httpx.get(f"{loop.rollout_server_url}/healthz"), httpx.get(f"{loop.inference_servers[0]}/health")]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert sorted(pids) == ["inference", "rollout-server"]
    assert set(pids.values()) <= family
    assert not any(map(is_alive, family))


@pytest.mark.usefixtures("mock_engine")
def test_two_runs_share_a_machine(tmp_path: Path) -> None:
    with LocalLoop(RunFolder(tmp_path / "a"), an_engine()) as a, LocalLoop(RunFolder(tmp_path / "b"), an_engine()) as b:
        urls = {a.rollout_server_url, b.rollout_server_url, *a.inference_servers, *b.inference_servers}

    assert len(urls) == 4


def test_a_port_in_use_is_named_as_the_user_knows_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        engine = InferenceSection(model="mock", port=taken.getsockname()[1])
        with pytest.raises(LaunchConfigError, match=r"^local\.inference\.port: cannot listen"):
            LocalLoop(RunFolder(tmp_path), engine)


async def test_it_starts_beside_an_event_loop_that_runs_as_in_a_notebook(tmp_path: Path) -> None:
    with LocalLoop(RunFolder(tmp_path), None) as loop:
        async with httpx.AsyncClient() as http:
            answer = await http.get(f"{loop.rollout_server_url}/healthz")

    assert answer.status_code == 200


def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LocalLoop(RunFolder(tmp_path), None)
    stop, impatient = loop._background.stop, iter([KeyboardInterrupt])

    def interrupted_once(timeout_s: float) -> bool:
        for error in impatient:
            raise error
        return stop(timeout_s)

    monkeypatch.setattr(loop._background, "stop", interrupted_once)

    with pytest.raises(KeyboardInterrupt), loop:
        # A service that does not listen to SIGTERM.
        os.kill(loop.pids()["rollout-server"], signal.SIGSTOP)

    assert not is_alive(loop.pids()["rollout-server"])


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    loop = LocalLoop(RunFolder(tmp_path), None)

    with pytest.raises(ZeroDivisionError), loop:
        raise ZeroDivisionError

    assert not is_alive(loop.pids()["rollout-server"])


@pytest.mark.usefixtures("mock_engine")
def test_a_service_that_does_not_come_up_is_named_and_takes_the_others_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [sys.executable, "-c", "raise SystemExit(\"ModuleNotFoundError: No module named 'vllm'\")"]
    monkeypatch.setattr(loop_module, "vllm_command", lambda config, has_gpu: (broken, {}))

    loop = LocalLoop(RunFolder(tmp_path), an_engine())
    with pytest.raises(ChildFailedError, match="vLLM is not installed"), loop:
        pass

    assert not any(is_alive(pid) for pid in loop.pids().values())


@pytest.mark.usefixtures("mock_engine")
def test_ctrl_c_before_the_services_answer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(loop_module, "vllm_command", lambda config, has_gpu: (silent, {}))

    def interrupt_when_started(text: str) -> None:
        if "inference" in loop.pids():
            raise KeyboardInterrupt

    loop = LocalLoop(RunFolder(tmp_path), an_engine(), show_progress=interrupt_when_started)
    with pytest.raises(KeyboardInterrupt), loop:
        pass

    assert sorted(loop.pids()) == ["inference", "rollout-server"]
    assert not any(is_alive(pid) for pid in loop.pids().values())


def test_a_service_that_dies_is_started_again_on_the_same_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "RESTART", RestartConfig(first_pause_s=0.01))
    with LocalLoop(RunFolder(tmp_path), None) as loop:
        first = loop.pids()["rollout-server"]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: loop.pids()["rollout-server"] != first)

        def answers() -> bool:
            try:
                return httpx.get(f"{loop.rollout_server_url}/healthz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers)


@pytest.mark.usefixtures("mock_engine")
def test_it_tells_since_when_the_engine_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "RESTART", RestartConfig(first_pause_s=0.01))
    with LocalLoop(RunFolder(tmp_path), an_engine()) as loop:
        first = loop.inference_up_since
        os.kill(loop.pids()["inference"], signal.SIGKILL)

        wait_until(lambda: loop.inference_up_since == math.inf)
        wait_until(lambda: first < loop.inference_up_since < math.inf)


def test_a_service_that_dies_for_good_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "RESTART", RestartConfig(max_restarts=0))
    told = threading.Event()
    with LocalLoop(RunFolder(tmp_path), None, on_failure=lambda error: told.set()) as loop:
        os.kill(loop.pids()["rollout-server"], signal.SIGKILL)
        assert told.wait(DEADLINE_S)

    assert isinstance(loop.failure, ChildFailedError)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_process_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import signal
        import time
        from pathlib import Path
        from atroposlib.launch.run_folder import RunFolder
        from trainer.local.loop import LocalLoop

        # Background jobs of a shell inherit that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with LocalLoop(RunFolder(Path({str(tmp_path)!r})), None) as loop:
            print(loop.pids()["rollout-server"], flush=True)
            time.sleep(60)
        """
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as user:
        assert user.stdout is not None
        pid = int(user.stdout.readline())
        user.send_signal(number)
        try:
            _, said = user.communicate(timeout=DEADLINE_S)
        finally:
            user.kill()

    wait_until(lambda: not is_alive(pid))
    assert user.returncode != 0
    assert (b"KeyboardInterrupt" in said) == (number == signal.SIGINT)
