"""SIGKILL of trainers and of a real vLLM at random moments of weight publications: whoever is left serves the right weights.

Runs where CHAOS_TRAINER_KILLS says how many trainers are to die: `make chaos`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from atroposlib.launch.inference import InferenceConfig, has_gpu, vllm_command, wait_until_ready
from tests.chaos import pushing_trainer
from tests.end_to_end.conftest import MODEL, skip_without_vllm
from tests.processes import free_port
from trainer.weight_sync.config import WeightSyncConfig
from trainer.weight_sync.connect import connect
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.errors import WeightSyncError

TRAINER_KILLS = int(os.environ.get("CHAOS_TRAINER_KILLS", "0"))
ENGINE_KILL_EVERY = 10
"""Trainers that die between two deaths of an engine."""
TIMEOUT_S = 30.0
SECONDS_A_ROUND = 150.0
"""Far more than a round takes, an engine's start included; a run that needs longer hangs."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(TRAINER_KILLS == 0, reason="takes long: make chaos, or CHAOS_TRAINER_KILLS=20"),
    pytest.mark.timeout(300 + TRAINER_KILLS * SECONDS_A_ROUND),
]


class Engine:
    """A vLLM server that keeps its URL when it is killed and started again."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._config = InferenceConfig(
            model=str(MODEL), served_model_name=MODEL.name, port=free_port(), max_model_len=512, max_num_seqs=8
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.url = self._config.url

    def start(self) -> None:
        argv, env = vllm_command(self._config, has_gpu=has_gpu())
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                argv, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True
            )
        asyncio.run(wait_until_ready(self.url, self._process, self._log, timeout_s=240))

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[Engine]]:
    skip_without_vllm()
    engines = [Engine(tmp_path / f"engine-{i}.log") for i in range(2)]
    try:
        for engine in engines:
            engine.start()
        yield engines
    finally:
        for engine in engines:
            engine.kill()


def sampled_logprobs(url: str) -> list[float]:
    sampling = {"max_tokens": 6, "temperature": 0, "logprobs": 0}
    body = {"token_ids": [1, 4093, 198, 1780, 314, 260, 3575], "sampling_params": sampling}
    answer = httpx.post(f"{url}/inference/v1/generate", json=body, timeout=120).raise_for_status().json()
    return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]


def standing(urls: Sequence[str]) -> dict[str, tuple[str, bool]]:
    controls = [VllmControl(url) for url in urls]
    return {c.url: (c.weight_version(timeout_s=20), c.is_paused(timeout_s=20)) for c in controls}


def test_whoever_is_killed_every_live_server_ends_resumed_at_the_right_version(engines: list[Engine]) -> None:
    rng = random.Random(0)
    weights_path = MODEL / "model.safetensors"
    weights: dict[str, torch.Tensor] = load_file(weights_path)
    urls = [engine.url for engine in engines]
    expected = sampled_logprobs(urls[0])
    recoveries_s: list[float] = []
    left_paused = 0
    for round_number in range(TRAINER_KILLS):
        trainer = pushing_trainer.start(urls, weights_path, 1000 * round_number)
        time.sleep(rng.uniform(0.0, 4.0))
        trainer.kill()
        trainer.join()
        begin = time.monotonic()
        left_paused += any(paused for _, paused in standing(urls).values())
        doomed = engines[1] if round_number % ENGINE_KILL_EVERY == ENGINE_KILL_EVERY - 1 else None
        death = threading.Timer(rng.uniform(0.0, 3.0), doomed.kill if doomed else lambda: None)
        death.start()

        version = 1000 * round_number + 999
        successor = connect(urls, WeightSyncConfig(timeout_s=TIMEOUT_S))
        with contextlib.suppress(WeightSyncError):  # an engine died just then; publishing tries again
            successor.attach()
        result = successor.publish(version, weights.items())
        recoveries_s.append(time.monotonic() - begin)

        assert {failed.server for failed in result.failed} <= ({doomed.url} if doomed else set())
        death.join()
        if doomed is not None:
            doomed.start()
            assert successor.ensure_current(version, weights.items()).failed == ()
        assert standing(urls) == {url: (str(version), False) for url in urls}
        assert [sampled_logprobs(url) for url in urls] == [expected, expected]
        successor.close()
    print(
        f"{TRAINER_KILLS} trainers killed, {left_paused} of them while engines stood still; from the kill to new weights on"
        f" every live server: median {sorted(recoveries_s)[len(recoveries_s) // 2]:.1f} s, longest {max(recoveries_s):.1f} s"
    )
    assert left_paused or TRAINER_KILLS < 10, "no kill met a publication"
