"""A recorded run served by `atropos replay`, and trainers on it that may be killed at any time."""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file
from torch import Tensor

from atroposlib.wire.columns import encode_group, read_blobs
from atroposlib.wire.models import EnvRequest, RunRequest
from rollout_server.stores.base import Batch, StoreLimits
from rollout_server.stores.embedded import SQLiteStore
from tests.processes import START_TIMEOUT_S, free_port
from tests.trainer.fakes import random_groups, tiny_llama

BATCH_SIZE = 8
COMPARED = ("loss/total", "grad_norm", "reward/mean", "learning_rate", "ratio/mean", "entropy")

# Forked from a server that has imported torch once, and that has no threads yet.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.trainer.fakes", "trainer.grpo_trainer", __name__])


async def record(folder: Path, steps: int) -> None:
    """As a rollout server records a run of so many steps."""
    store = await SQLiteStore.open(folder, StoreLimits(), synchronous="normal")
    run = await store.open_run(RunRequest(run_name="recorded", batch_size=BATCH_SIZE, num_steps=steps, max_staleness=4))
    await store.register_env(EnvRequest(name="env", group_size=4))
    await store.set_policy(0, run.session)
    for step in range(steps):
        groups = random_groups(step, sequences=BATCH_SIZE)
        await store.append(list(read_blobs(b"".join(encode_group(group) for group in groups))))
        assert isinstance(await store.lease(step, run.session), Batch)
        await store.ack(step, run.session, step + 1)
    await store.close()


@contextmanager
def replaying(folder: Path) -> Iterator[str]:
    """The recorded run on a server of its own; gives its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "rollout_server.run_database.replay", str(folder), "--port", str(port)]
    with (folder.parent / "replay.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_TIMEOUT_S
        while not _answers(url):
            assert process.poll() is None, (folder.parent / "replay.log").read_text()
            assert time.monotonic() < end, "the replay does not answer"
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=1.0).status_code == 200
    except httpx.TransportError:
        return False


def save_model(folder: Path) -> None:
    """The policy that every trainer starts from."""
    tiny_llama().save_pretrained(folder)


def options_of(run_dir: Path, url: str, model: Path, steps: int) -> dict[str, Any]:
    """Of a run in which every state counts: momentum, schedule, decay, cuts by chance, several optimizer steps."""
    return {
        "run_dir": str(run_dir),
        "run_name": run_dir.name,
        "rollout_server_url": url,
        "model_name_or_path": str(model),
        "batch_size": BATCH_SIZE,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "num_minibatches": 2,
        "save_steps": 3,
        "save_total_limit": 2,
        "max_tokens_per_micro_batch": 24,
        "batch_deadline_s": 20.0,
    }


def start_trainer(options: dict[str, Any]) -> BaseProcess:
    """A trainer in a process of its own, from its newest checkpoint to the end."""
    process = _processes.Process(target=_train, args=(options,), daemon=True)
    process.start()
    return process


def _train(options: dict[str, Any]) -> None:
    import torch

    from trainer.config.grpo import GRPOConfig
    from trainer.grpo_trainer import GRPOTrainer

    torch.set_num_threads(1)
    GRPOTrainer(GRPOConfig(**options)).train()


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics, as they were written."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def curve_of(run_dir: Path) -> dict[int, list[float]]:
    """What each step showed, the last time that it was taken."""
    return {line["step"]: [line[name] for name in COMPARED] for line in lines_of(run_dir)}


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    """Of the final model."""
    weights: dict[str, Tensor] = load_file(run_dir / "final" / "model.safetensors")
    return weights


def largest_difference(first: dict[int, list[float]], second: dict[int, list[float]]) -> float:
    """Between two curves, relative to what is no smaller than 0.01: losses pass through 0."""
    assert first.keys() == second.keys()
    pairs = [pair for step in first for pair in zip(first[step], second[step], strict=True)]
    return max(abs(a - b) / max(0.01, abs(a)) if math.isfinite(a) else math.inf for a, b in pairs)
