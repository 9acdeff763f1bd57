"""What the benchmarks of weight sync share: a running vLLM server, a model to serve, and where a push spends its time."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from atroposlib.launch.inference import InferenceConfig, has_gpu, vllm_command, wait_until_ready
from trainer.policy.loading import build_policy
from trainer.weight_sync.engines.vllm import VllmControl
from trainer.weight_sync.sources import weight_source
from trainer.weight_sync.transports.base import NamedWeights

SMOL = "models/SmolLM2-135M-Instruct"


@contextmanager
def running_server(model: str, **options: Any) -> Iterator[str]:
    """Start vLLM on a free port as `atropos up` does, and kill it in the end. Yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = InferenceConfig(model=model, served_model_name="policy", port=port, max_model_len=2048, **options)
    argv, env = vllm_command(config, has_gpu=has_gpu())
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    with log.open("wb") as out:
        server = subprocess.Popen(argv, env={**os.environ, **env}, stdout=out, stderr=out, start_new_session=True)
    try:
        asyncio.run(wait_until_ready(config.url, server, log, timeout_s=300))
        yield config.url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def model_folder(name: str) -> Iterator[str]:
    """Yield the folder of a model: the demo's (135m), a random one that is deleted again (1b), or the folder so named."""
    if name != "1b":
        yield SMOL if name == "135m" else name
        return
    with tempfile.TemporaryDirectory() as folder:
        make_random_model(folder)
        yield folder


def make_random_model(folder: str) -> None:
    """Write a Llama of 1.07 billion random parameters in bfloat16, with the demo's tokenizer."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in Path(SMOL).glob("*token*"):
        shutil.copy(file, folder)


def trainer_weights(folder: str, dtype: torch.dtype) -> NamedWeights:
    """The weights as a trainer holds them."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    weights = weight_source(build_policy(lm, logprob_chunk_size=256), is_rank_0=True).gather()
    assert weights is not None
    return weights


class CallTimes:
    """Seconds that the calls to a server took, by route, since the last `take`. `commit` is the engine's own loading."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)
        self._transfer: list[float] = []
        original = VllmControl._call

        def timed(control: VllmControl, method: str, path: str, *args: Any, **request: Any) -> dict[str, Any]:
            start = time.monotonic()
            try:
                return original(control, method, path, *args, **request)
            finally:
                is_commit = (request.get("json") or {}).get("update_info", {}).get("commit")
                self._note("commit" if is_commit else path, start)

        VllmControl._call = timed  # type: ignore[method-assign]

    def take(self) -> tuple[dict[str, float], float]:
        """Return seconds by route, and from the start of the update to its end."""
        with self._lock:
            seconds, self._seconds = dict(self._seconds), defaultdict(float)
            transfer, self._transfer = self._transfer, []
        return seconds, max(transfer) - min(transfer) if transfer else 0.0

    def _note(self, name: str, start: float) -> None:
        end = time.monotonic()
        with self._lock:
            self._seconds[name] += end - start
            if name in ("/start_weight_update", "/finish_weight_update"):
                self._transfer += [start, end]
