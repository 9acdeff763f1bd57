"""Start a vLLM server: its command line and environment, the wait until it answers, and why it did not."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field

from atroposlib.errors import AtroposError

_IN_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


class InferenceStartError(AtroposError):
    """The inference server did not come up."""

    code = "inference_start"


class InferenceConfig(BaseModel):
    """One vLLM server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Folder of a Hugging Face checkpoint, or a name on the Hub."""
    served_model_name: str | None = None
    """What clients put in `model`; the same as `model` if absent."""
    host: str = "127.0.0.1"
    """Address to listen on. The RL routes are open to whoever reaches it: keep it inside."""
    port: int = Field(default=9001, ge=1, le=65535)
    """TCP port."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Of the weights in the engine."""
    max_model_len: int = Field(default=2048, ge=1)
    """Tokens of prompt and completion together."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Sequences decoded together."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Memory for keys and values. CPU build only; on a GPU vLLM takes `gpu_memory_utilization`."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for the engine."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs for one copy of the model."""
    omp_threads: int | None = Field(default=None, ge=1)
    """CPU build only: threads of the engine; half of the cores if absent. More than the cores that are left by
    the trainer is slower than fewer, because the threads of a step wait for the last of them."""
    weight_transfer: Literal["gloo", "nccl", "ipc", "delta", "none"] = "gloo"
    """vLLM's backend for new weights. gloo, nccl: over the network. ipc: trainer and engine on the same GPU. delta: files
    of what changed. A trainer that writes whole folders or adapters needs none of them in particular. none: the server
    never gets weights, and its RL routes stay closed."""
    lora: bool = False
    """Whether LoRA adapters can be loaded while it runs. On the CPU build a request for prompt_logprobs then ends the
    engine."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    """lora: the highest rank of an adapter; memory is kept free for it."""
    is_offline: bool = True
    """Whether the Hugging Face Hub stays out of reach: the model is a local folder."""
    extra_args: list[str] = []
    """Further arguments of `vllm serve`; they win over ours."""

    @property
    def url(self) -> str:
        """Base URL for clients on this machine."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"


def vllm_command(config: InferenceConfig, *, has_gpu: bool) -> tuple[list[str], dict[str, str]]:
    """Return the arguments that start the server, and what to add to its environment.

    `python -m` rather than the command `vllm`, which the CPU build breaks: it looks for another distribution.
    """
    argv = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", config.model),
        *("--served-model-name", config.served_model_name or config.model),
        *("--host", config.host),
        *("--port", str(config.port)),
        *("--dtype", config.dtype),
        *("--max-model-len", str(config.max_model_len)),
        *("--max-num-seqs", str(config.max_num_seqs)),
        *("--tensor-parallel-size", str(config.tensor_parallel_size)),
        # Opens /inference/v1/generate: tokens in, tokens out, and the weight version of each.
        "--enable-scale-out",
        # Log-probabilities after temperature and top-p: those of the distribution that was sampled from.
        *("--logprobs-mode", "processed_logprobs"),
    ]
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if config.weight_transfer != "none":
        argv += ["--weight-transfer-config", json.dumps({"backend": config.weight_transfer})]
        env["VLLM_SERVER_DEV_MODE"] = "1"  # opens the RL routes
    if config.weight_transfer == "ipc":
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the handles of the trainer's buffers come pickled
    if config.lora:
        argv += ["--enable-lora", "--max-lora-rank", str(config.max_lora_rank)]
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if config.is_offline:
        env["HF_HUB_OFFLINE"] = "1"
    if has_gpu:
        argv += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    else:
        argv += _cpu_arguments(config)
        env |= _cpu_environment(config)
    return [*argv, *config.extra_args], env


def _cpu_arguments(config: InferenceConfig) -> list[str]:
    arguments = ["--enforce-eager"]  # compiling takes a minute or two and then uses one core
    # Whole blocks are what the completions of a group share of their prompt; the default of 128 shares nothing of a
    # short one. 16 is not supported.
    arguments += ["--block-size", "32"]
    if config.tensor_parallel_size == 1:
        # By its path, since vLLM turns the short name "uni" into "mp" on a CPU. In processes of their own,
        # worker and scheduler spin while they wait for each other, on the cores that the model needs.
        arguments += ["--distributed-executor-backend", _IN_ONE_PROCESS]
    return arguments


def _cpu_environment(config: InferenceConfig) -> dict[str, str]:
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        # Pinned threads and a trainer on the same cores starve each other.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        # Milliseconds that an idle thread spins before it sleeps; the default is 200.
        "KMP_BLOCKTIME": "1",
        "OMP_NUM_THREADS": str(config.omp_threads or max(1, len(os.sched_getaffinity(0)) // 2)),
    }
    intel_openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if intel_openmp.exists():
        env["LD_PRELOAD"] = str(intel_openmp)
    return env


def has_gpu() -> bool:
    """Return whether an NVIDIA GPU answers on this machine."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and b"GPU" in listing.stdout


async def wait_until_ready(
    url: str,
    process: asyncio.subprocess.Process | subprocess.Popen[bytes],
    log_path: Path,
    timeout_s: float,
) -> None:
    """Return when the server answers `/health`.

    Raises:
        InferenceStartError: the process ended, or did not answer in time. The text explains its log.
    """
    deadline = time.monotonic() + timeout_s
    async with httpx.AsyncClient(trust_env=False, timeout=2.0) as http:
        while True:
            # Asked first: a port may be answered by somebody else while our server dies of it.
            if (status := _exit_status(process)) is not None:
                raise InferenceStartError(
                    f"the inference server at {url} ended with status {status}: "
                    f"{explain_failure(_read(log_path))} (log: {log_path})"
                )
            if time.monotonic() > deadline:
                raise InferenceStartError(
                    f"the inference server at {url} did not answer within {timeout_s:.0f} s: "
                    f"{explain_failure(_read(log_path))} (log: {log_path})"
                )
            try:
                if (await http.get(f"{url}/health")).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.25)


# Looked for in this order: a cause first, then what follows from it. `{what}` is the group of that name.
_KNOWN_FAILURES = (
    (
        r"No module named '?vllm\b",
        "vLLM is not installed in this Python environment; run scripts/install_vllm.sh",
    ),
    (
        r"No module named '?sglang\b",
        "SGLang is not installed in this Python environment; give it one of its own and name its interpreter with --python",
    ),
    (
        r"[Aa]ddress already in use",
        "its port is in use; stop the other process (`ss -ltnp` names it) or choose another port",
    ),
    (
        r"unrecognized arguments: (?P<what>.+)",
        "this vLLM does not know the argument {what}; remove it from extra_args",
    ),
    (
        r"error: (?P<what>argument .+)",
        "vLLM refuses an argument: {what}",
    ),
    (
        r"Invalid weight transfer backend: (?P<what>\w+)",
        "this vLLM has no weight transfer backend {what}; install this project into the Python environment "
        "that runs vLLM (`pip install -e .`): it brings the plugin",
    ),
    (
        r"(?:Invalid repository ID or local directory specified|Repo id must be in the form[^:\n]*): '(?P<what>[^']*)'"
        r"|LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect to '?https://huggingface",
        "the model folder {what} is missing or holds no checkpoint; run scripts/prepare_model.py, or correct the path",
    ),
    (
        r"max_model_len \((?P<what>\d+)\) is greater than the derived max_model_len",
        "max_model_len={what} is more than the model was made for; lower it",
    ),
    (
        r"larger than the available KV cache memory|No available memory for the cache blocks"
        r"|estimated maximum model length",
        "the key-value cache is too small for one sequence; raise kv_cache_gib (on a GPU "
        "gpu_memory_utilization), or lower max_model_len",
    ),
    (
        r"MemoryError|OutOfMemoryError|out of memory|Cannot allocate memory|DefaultCPUAllocator"
        r"|Available memory on node|Free memory on device",
        "there is not enough memory; stop other processes, or lower kv_cache_gib, max_num_seqs or max_model_len",
    ),
    (
        r"undefined symbol: |Failed to import from vllm\._C|_OpNamespace' '_C\w*' object has no"
        r"|Illegal instruction",
        "the compiled kernels of this vLLM fit neither the machine nor its torch; run scripts/install_vllm.sh again",
    ),
)


def explain_failure(log_text: str) -> str:
    """Turn the log of a server that did not start into one message with the fix."""
    for pattern, message in _KNOWN_FAILURES:
        if match := re.search(pattern, log_text):
            found = match.groupdict().get("what") or ""
            return " ".join(message.format(what=found.strip()).split())
    lines = [line.strip() for line in log_text.splitlines() if line.strip() and "WARNING" not in line]
    # Of several errors the first is the engine's own; the others report its death.
    for line in lines:
        if error := re.search(r"\b\w+(?:Error|Exception): .+", line):
            return error.group()
    return f"its last words were: {lines[-1]}" if lines else "it wrote nothing"


def _exit_status(process: asyncio.subprocess.Process | subprocess.Popen[bytes]) -> int | None:
    return process.poll() if isinstance(process, subprocess.Popen) else process.returncode


def _read(log_path: Path, last_bytes: int = 200_000) -> str:
    try:
        return log_path.read_bytes()[-last_bytes:].decode(errors="replace")
    except FileNotFoundError:
        return ""
