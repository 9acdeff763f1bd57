"""Real vLLM servers for tests, started as `atropos up` starts them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atroposlib.launch.inference import InferenceConfig, has_gpu, vllm_command, wait_until_ready
from tests.processes import free_port

Weights = dict[str, torch.Tensor]

PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
"""A question in the model's chat template."""

MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class VllmProcess:
    """A running server and the processes behind it."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End all of its processes at once, as a failing machine would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running_vllm(log_path: Path, **options: Any) -> Iterator[VllmProcess]:
    """A server as long as the block lasts.

    Args:
        options: further ones of InferenceConfig.
    """
    skip_without_vllm()
    config = InferenceConfig(
        model=str(MODEL), served_model_name=MODEL.name, port=free_port(), max_model_len=1024, max_num_seqs=16, **options
    )
    argv, env = vllm_command(config, has_gpu=has_gpu())
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            argv, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = VllmProcess(config.url, process)
    try:
        asyncio.run(wait_until_ready(config.url, process, log_path, timeout_s=240))
        yield server
    finally:
        server.kill()


def skip_without_vllm() -> None:
    """Skip at a desk where vLLM or the model is missing; fail in CI, where both must be there."""
    for missing in [
        *([] if find_spec("vllm") else ["vLLM is not installed; run scripts/install_vllm.sh"]),
        *([] if MODEL.exists() else [f"{MODEL} is missing; run scripts/prepare_model.py"]),
    ]:
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.fixture(scope="session")
def start_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], VllmProcess]]:
    """Start one more server. All are killed at the end of the session."""
    with ExitStack() as servers:
        yield lambda: servers.enter_context(running_vllm(tmp_path_factory.mktemp("vllm") / "server.log"))


@pytest.fixture(scope="session")
def vllm_server(start_vllm: Callable[[], VllmProcess]) -> str:
    """Base URL of a real vLLM server, one for the whole session."""
    return start_vllm().url


@pytest.fixture(scope="module")
def original() -> Weights:
    """The model's weights in float32, as a trainer holds them."""
    return {name: tensor.float() for name, tensor in load_file(MODEL / "model.safetensors").items()}


@pytest.fixture(scope="module")
def changed(original: Weights) -> Weights:
    """The same, each moved a little."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in original.items()
    }
