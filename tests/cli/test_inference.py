"""atropos inference, as a user starts it: a real process around a FAKE engine, and the options it takes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import psutil
import pytest

from atroposlib.cli import inference
from atroposlib.cli.main import build_parser, main
from atroposlib.client import RolloutClient
from atroposlib.launch.engine_look import EngineName
from atroposlib.launch.inference import InferenceConfig
from atroposlib.launch.serve_inference import InferenceService
from atroposlib.wire.models import InferenceServer, Role
from tests.processes import RolloutServerProcess, free_port
from trainer.run.publication import longest_s
from trainer.weight_sync.config import WeightSyncConfig

FAKE_ENGINE = Path(__file__).parents[1] / "launch" / "fakes" / "engine.py"
DEADLINE_S = 20.0


class Running:
    """A running `atropos inference`."""

    def __init__(self, folder: Path, *options: str, behaviour: str = "") -> None:
        interpreter = folder / "python"
        interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE_ENGINE} "$@"\n')
        interpreter.chmod(0o755)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "logs" / "inference.log"
        self.output = folder / "output"
        command = [
            sys.executable, "-m", "atroposlib.cli.main", "inference", "some/model", "--port", str(self.port),
            "--python", str(interpreter), "--log-dir", str(folder / "logs"), *options,
        ]  # fmt: skip
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "FAKE_ENGINE": behaviour}
            )

    def wait_for(self, text: str) -> None:
        """Until it has said so."""
        self.wait_until(lambda: text in self.said)

    def wait_until(self, condition: Any) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    @property
    def said(self) -> str:
        return self.output.read_text()

    def engine_pid(self) -> int:
        self.wait_until(lambda: self.log.exists() and "pid " in self.log.read_text())
        found = re.search(r"pid (\d+)", self.log.read_text())
        assert found is not None
        return int(found[1])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def begin(*options: str, **kwargs: Any) -> Running:
            running = Running(tmp_path, *options, **kwargs)
            stack.callback(running.end)
            return running

        yield begin


def listed(rollout_server: RolloutServerProcess) -> list[InferenceServer]:
    async def ask() -> list[InferenceServer]:
        async with RolloutClient(rollout_server.url, deadline_s=5) as client:
            return [entry.server for entry in await client.servers()]

    return asyncio.run(ask())


def test_a_server_is_listed_while_it_runs_with_the_version_that_it_reports(
    start: Any, rollout_server: RolloutServerProcess
) -> None:
    running = start("--rollout-server", rollout_server.url, "--served-model-name", "smol")
    running.wait_for("ready: ")
    running.wait_until(lambda: listed(rollout_server))
    assert listed(rollout_server) == [InferenceServer(url=running.url, model_name="smol")]

    httpx.post(f"{running.url}/update_weight_version", json={"new_version": "4"}).raise_for_status()
    running.wait_until(lambda: listed(rollout_server)[0].policy_version == 4)

    running.process.terminate()
    assert running.process.wait(timeout=DEADLINE_S) == 0
    assert listed(rollout_server) == []


def test_an_orphan_pause_is_ended(start: Any) -> None:
    running = start("--max-pause", "0.1")
    running.wait_for("ready: ")

    httpx.post(f"{running.url}/pause").raise_for_status()

    running.wait_for("THE ENGINE WAS LEFT PAUSED")
    assert not httpx.get(f"{running.url}/is_paused").json()["is_paused"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_engine_is_left_behind_whatever_ends_the_command(start: Any, number: signal.Signals) -> None:
    running = start()
    running.wait_for("ready: ")
    engine = psutil.Process(running.engine_pid())

    running.process.send_signal(number)

    status = running.process.wait(timeout=DEADLINE_S)
    running.wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 0)


def test_the_second_signal_ends_even_a_stubborn_engine_and_its_helpers_at_once(start: Any) -> None:
    running = start(behaviour="stubborn")
    running.wait_for("ready: ")
    engine = psutil.Process(running.engine_pid())
    helpers = engine.children(recursive=True)
    assert helpers

    running.process.terminate()
    time.sleep(0.1)
    running.process.terminate()

    assert running.process.wait(timeout=10) == 0, "the grace alone is longer"
    assert not any(process.is_running() for process in [engine, *helpers])


def test_an_engine_that_is_still_loading_can_be_stopped(start: Any) -> None:
    running = start(behaviour="slow")
    running.wait_for("waiting for the engine")

    running.process.terminate()

    assert running.process.wait(timeout=DEADLINE_S) == 0


def test_a_failure_is_explained_from_the_engines_log_and_nothing_is_started_again(start: Any) -> None:
    running = start(behaviour="fail")

    assert running.process.wait(timeout=DEADLINE_S) == 1

    assert "there is not enough memory; stop other processes" in running.said
    assert "  | torch.OutOfMemoryError" in running.said
    assert running.log.read_text().count("FAKE engine") == 1


def test_an_engine_that_dies_ends_the_command_and_its_entry(start: Any, rollout_server: RolloutServerProcess) -> None:
    running = start("--rollout-server", rollout_server.url)
    running.wait_for("ready: ")
    running.wait_until(lambda: listed(rollout_server))

    os.kill(running.engine_pid(), signal.SIGKILL)

    assert running.process.wait(timeout=DEADLINE_S) == 1
    assert "was killed by SIGKILL" in running.said
    assert listed(rollout_server) == []


def test_an_engine_that_never_answers_is_given_up(start: Any) -> None:
    running = start("--ready-timeout", "0.3", behaviour="slow")

    assert running.process.wait(timeout=DEADLINE_S) == 1
    assert "did not answer within 0 s" in running.said


def test_a_port_in_use_is_named_with_its_holder(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    running = start()
    running.wait_for("ready: ")

    assert main(["inference", "m", "--port", str(running.port)]) == 2

    assert f"in use by python (pid {running.engine_pid()})" in capsys.readouterr().err.replace("python3.11", "python")


def test_a_dry_run_prints_the_command_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lora", "--max-lora-rank", "32", "--dry-run", "--", "--max-num-batched-tokens", "8192"]

    assert main(["inference", "models/m", *options]) == 0

    output = capsys.readouterr().out
    assert "VLLM_SERVER_DEV_MODE=1" in output
    assert "-m vllm.entrypoints.openai.api_server --model models/m" in output
    assert "--enable-lora --max-lora-rank 32" in output
    assert output.splitlines()[0].endswith("--max-num-batched-tokens 8192")


def test_a_teacher_keeps_its_weight_routes_closed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inference", "m", "--role", "teacher", "--dry-run"]) == 0

    assert "VLLM_SERVER_DEV_MODE" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-lora-rank", "9"], "--max-lora-rank=9: input should be 1, 8, 16"),
        (["--port", "70000"], "--port=70000: input should be less than or equal to 65535"),
        (["--dtype", "int3"], "--dtype=int3: input should be 'auto', 'bfloat16'"),
        (["--host", "::"], "host=::: IPv4 addresses and names only; 0.0.0.0 is any interface"),
        (["--role", "judge", "--weight-transfer", "gloo"], "a judge server never gets weights"),
    ],
)
def test_a_bad_option_is_an_error_in_the_users_words(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inference", "m", "--dry-run", *options]) == 2

    assert message in capsys.readouterr().err


def test_the_options_are_those_of_the_config_with_its_defaults() -> None:
    assert inference.FIELDS.keys() <= InferenceConfig.model_fields.keys()
    for name, (_, text) in inference.FIELDS.items():
        default = InferenceConfig.model_fields[name].default
        assert default is None or str(default) in text, name


def test_a_pause_may_last_as_long_as_a_publication() -> None:
    default = InferenceService(InferenceConfig(model="m")).max_pause_s
    arguments = build_parser().parse_args(["inference", "m"])
    arguments.extra = []

    assert default > longest_s(WeightSyncConfig().timeout_s)
    assert inference.service_of(arguments).max_pause_s == default
    assert f"default: {default:.0f}" in help_text()


def help_text() -> str:
    parser = argparse.ArgumentParser()
    inference.add_parser(parser.add_subparsers())
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
        parser.parse_args(["inference", "--help"])
    return " ".join(output.getvalue().split())


def test_the_choices_are_those_of_the_wire() -> None:
    assert get_args(Role) == inference.ROLES
    assert get_args(EngineName) == inference.ENGINES


def test_an_option_like_a_port_of_none_is_drawn_later() -> None:
    arguments = build_parser().parse_args(["inference", "m", "--port", "0"])
    arguments.extra = []

    assert inference.service_of(arguments).config.port == 0
