"""`atropos inference` with a real vLLM: listed, watched, and gone without a trace."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from atroposlib.client import RolloutClient
from atroposlib.wire.models import InferenceServer
from tests.end_to_end.conftest import MODEL, skip_without_vllm
from tests.processes import RolloutServerProcess, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def command(tmp_path: Path, rollout_server: RolloutServerProcess, port: int) -> Iterator[subprocess.Popen[bytes]]:
    skip_without_vllm()
    argv = [
        *(sys.executable, "-m", "atroposlib.cli.main", "inference", str(MODEL)),
        *("--served-model-name", MODEL.name, "--port", str(port), "--max-model-len", "512", "--lora"),
        *("--rollout-server", rollout_server.url, "--max-pause", "1", "--log-dir", str(tmp_path)),
    ]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output)
    yield process
    process.kill()
    process.wait()


def wait_until(condition: Callable[[], bool], *, within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_real_server_is_listed_freed_from_an_orphan_pause_and_ended(
    command: subprocess.Popen[bytes], rollout_server: RolloutServerProcess, port: int, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{port}"

    def listed() -> list[InferenceServer]:
        async def ask() -> list[InferenceServer]:
            async with RolloutClient(rollout_server.url, deadline_s=10) as client:
                return [entry.server for entry in await client.servers()]

        return asyncio.run(ask())

    def said() -> str:
        return (tmp_path / "output").read_text()

    wait_until(lambda: bool(listed()) or command.poll() is not None, within_s=240)
    assert listed() == [InferenceServer(url=url, model_name=MODEL.name)], said()

    with httpx.Client(base_url=url, timeout=60) as http:
        http.post("/update_weight_version", json={"new_version": "3"}).raise_for_status()
        wait_until(lambda: listed()[0].policy_version == 3, within_s=30)

        http.post("/pause", params={"mode": "keep"}).raise_for_status()
        wait_until(lambda: "THE ENGINE WAS LEFT PAUSED" in said(), within_s=30)
        body = {"model": MODEL.name, "prompt": [1, 2, 3], "max_tokens": 2}
        assert http.post("/v1/completions", json=body).raise_for_status().json()["choices"]

    family = psutil.Process(command.pid).children(recursive=True)
    assert len(family) >= 2
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait(timeout=60) == 0
    assert listed() == []
    assert not [process for process in family if process.is_running()]
