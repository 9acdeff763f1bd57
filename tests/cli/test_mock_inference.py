"""atropos mock-inference: its options describe the server, and the process serves until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import sys
from pathlib import Path

import httpx
import pytest

from atroposlib.cli import mock_inference
from atroposlib.cli.main import main
from atroposlib.testing.mock.policies import Echo, OneOf, RandomWords, Rules, Script
from atroposlib.testing.mock_inference import FaultRates, Latency, MockInferenceServer


def server_of(*flags: str) -> MockInferenceServer:
    parser = argparse.ArgumentParser()
    mock_inference.add_parser(parser.add_subparsers())
    return mock_inference.build_server(parser.parse_args(["mock-inference", *flags]))


def test_options_describe_time_faults_and_size() -> None:
    server = server_of(
        "--latency", "2", "--sigma", "0.8", "--per-token", "0.01", "--stragglers", "0.1", "--straggler-factor", "5",
        "--fault", "refuse=0.1", "--fault", "hang=0.01", "--weight-version", "7", "--port", "0",
    )  # fmt: skip

    assert server.latency_s == Latency(2.0, 0.8, 0.01, 0.1, 5.0)
    assert server.fault_rates == FaultRates(refuse=0.1, hang=0.01)
    assert server.weight_version == "7"
    assert not server.keeps_requests


def test_each_kind_of_answer() -> None:
    assert server_of().policy == RandomWords()
    assert server_of("--text", "a", "--text", "b").policy == Script(("a", "b"))
    assert server_of("--one-of", "a", "--one-of", "b").policy == OneOf(("a", "b"))
    assert server_of("--echo").policy == Echo()
    assert server_of("--random", "3").policy == RandomWords(3)
    assert isinstance(server_of("--rule", "a=>b").policy, Rules)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--echo", "--text", "a"], "--text and --echo are different kinds"),
        (["--fault", "explode=0.1"], "unknown fault 'explode'"),
        (["--fault", "refuse"], "KIND=P"),
        (["--latency", "-1"], "must not be negative"),
        (["--policy", "nowhere.py"], "no Python file"),
    ],
)
def test_a_mistake_is_told_with_exit_status_2(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mock-inference", *flags]) == 2
    assert words in capsys.readouterr().err


async def test_a_port_in_use_is_told() -> None:
    async with MockInferenceServer() as other:
        status = await asyncio.to_thread(_main_off_the_main_thread, other.port)

    assert "cannot listen" in status


def _main_off_the_main_thread(port: int) -> str:
    import subprocess

    result = subprocess.run(
        [sys.executable, "-m", "atroposlib.cli.main", "mock-inference", "--port", str(port)],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert result.returncode == 2
    return result.stderr


async def test_the_process_serves_and_ends_on_sigterm(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "atroposlib.cli.main", "mock-inference", "--port", "0", "--text", "hello",
        "--save-tokenizer", str(tmp_path / "tokenizer"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while (found := re.search(rb"on (http://\S+)/v1", await process.stdout.readline())) is None:
            pass
        async with httpx.AsyncClient(base_url=found[1].decode()) as http:
            answer = await http.post("/v1/completions", json={"prompt": "a"})
        process.send_signal(signal.SIGTERM)
        _, errors = await process.communicate()

    assert answer.json()["choices"][0]["text"] == "hello"
    assert process.returncode == 0, errors
    assert errors == b""
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
