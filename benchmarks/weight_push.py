"""How long new weights take into a running vLLM server: idle, and with sequences in flight.

OMP_NUM_THREADS=1 python benchmarks/weight_push.py [MODEL_FOLDER]
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForCausalLM

from atroposlib.launch.inference import InferenceConfig, has_gpu, vllm_command, wait_until_ready
from trainer.policy_model import PolicyWeights, build_policy
from trainer.weight_sync.connect import connect

PUSHES = 10
IN_FLIGHT = 16
PORT = 9567


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "models/SmolLM2-135M-Instruct"
    config = InferenceConfig(model=model, served_model_name="policy", port=PORT, max_model_len=2048)
    argv, env = vllm_command(config, has_gpu=has_gpu())
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    with log.open("wb") as out:
        server = subprocess.Popen(argv, env={**os.environ, **env}, stdout=out, stderr=out, start_new_session=True)
    try:
        asyncio.run(wait_until_ready(config.url, server, log, timeout_s=300))
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        weights = PolicyWeights(build_policy(lm, logprob_chunk_size=256))
        size = sum(tensor.numel() for _, tensor in weights)
        publisher = connect([config.url])
        publisher.attach()
        versions = iter(range(1, 1000))
        push: Callable[[], float] = lambda: publisher.publish(next(versions), weights).seconds  # noqa: E731
        print(
            f"{size / 1e6:.0f} M parameters, float32 in the trainer, bfloat16 in the engine, load {os.getloadavg()[0]:.1f}"
        )
        push()
        report("idle server", [push() for _ in range(PUSHES)])
        stop = threading.Event()
        threads = [threading.Thread(target=generate, args=(config.url, stop)) for _ in range(IN_FLIGHT)]
        for thread in threads:
            thread.start()
        report(f"{IN_FLIGHT} sequences in flight", [push() for _ in range(PUSHES)])
        stop.set()
        for thread in threads:
            thread.join()
        publisher.close()
    finally:
        os.killpg(server.pid, signal.SIGKILL)


def generate(url: str, stop: threading.Event) -> None:
    """Keep one sequence in flight; every answer must be whole."""
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 200, "ignore_eos": True, "logprobs": 0}}
    with httpx.Client(timeout=120) as http:
        while not stop.is_set():
            (choice,) = http.post(f"{url}/inference/v1/generate", json=body).raise_for_status().json()["choices"]
            assert len(choice["token_ids"]) == 200, choice["finish_reason"]


def report(name: str, seconds: list[float]) -> None:
    load = os.getloadavg()[0]
    print(
        f"{name:24} median {statistics.median(seconds):.2f} s  min {min(seconds):.2f}  max {max(seconds):.2f}  load {load:.1f}"
    )


if __name__ == "__main__":
    main()
