"""How a vLLM server is started, waited for, and how its failures are told."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from atroposlib.launch.inference import (
    InferenceConfig,
    InferenceStartError,
    explain_failure,
    vllm_command,
    wait_until_ready,
)
from tests.processes import free_port


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_the_command_serves_the_model_with_the_rl_routes_open() -> None:
    config = InferenceConfig(model="models/smol", served_model_name="smol", port=8123, max_model_len=512)

    argv, env = vllm_command(config, has_gpu=False)

    assert argv[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert (option(argv, "--model"), option(argv, "--served-model-name")) == ("models/smol", "smol")
    assert (option(argv, "--host"), option(argv, "--port")) == ("127.0.0.1", "8123")
    assert option(argv, "--max-model-len") == "512"
    assert option(argv, "--logprobs-mode") == "processed_logprobs"
    assert "--enable-scale-out" in argv
    assert json.loads(option(argv, "--weight-transfer-config")) == {"backend": "gloo"}
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert env["HF_HUB_OFFLINE"] == "1"


def test_on_a_cpu_the_engine_shares_the_cores_with_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))

    argv, env = vllm_command(InferenceConfig(model="smol", kv_cache_gib=2), has_gpu=False)

    assert "--enforce-eager" in argv
    assert option(argv, "--block-size") == "32"
    assert option(argv, "--distributed-executor-backend").endswith("UniProcExecutor")
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert (env["KMP_BLOCKTIME"], env["OMP_NUM_THREADS"]) == ("1", "3")


def test_on_a_gpu_none_of_the_cpu_settings_appear() -> None:
    argv, env = vllm_command(InferenceConfig(model="smol", gpu_memory_utilization=0.5), has_gpu=True)

    assert option(argv, "--gpu-memory-utilization") == "0.5"
    assert not {"--enforce-eager", "--distributed-executor-backend"} & set(argv)
    assert not any(name.startswith(("VLLM_CPU", "KMP", "OMP", "LD_PRELOAD")) for name in env)


def test_intels_openmp_is_preloaded_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert "LD_PRELOAD" not in vllm_command(InferenceConfig(model="smol"), has_gpu=False)[1]

    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()

    assert vllm_command(InferenceConfig(model="smol"), has_gpu=False)[1]["LD_PRELOAD"] == str(library)


def test_extra_arguments_come_last_so_they_win() -> None:
    argv, _ = vllm_command(InferenceConfig(model="smol", extra_args=["--max-num-seqs", "4"]), has_gpu=False)

    assert argv[-2:] == ["--max-num-seqs", "4"]


def test_a_server_on_all_interfaces_is_reached_through_loopback() -> None:
    assert InferenceConfig(model="smol", host="0.0.0.0", port=8000).url == "http://127.0.0.1:8000"


def test_a_misspelt_option_is_an_error() -> None:
    with pytest.raises(ValidationError, match="max_len"):
        InferenceConfig.model_validate({"model": "smol", "max_len": 5})


def start(code: str, log_path: Path) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=log, stderr=log)


async def test_waiting_ends_when_the_server_answers(tmp_path: Path) -> None:
    port = free_port()
    process = start(
        f"""
        import http.server, time
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path == "/health" else 404)
                self.end_headers()
        time.sleep(0.3)
        http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
        """,
        tmp_path / "log",
    )

    await wait_until_ready(f"http://127.0.0.1:{port}", process, tmp_path / "log", timeout_s=20)

    process.kill()
    process.wait()


async def test_a_server_that_ends_is_noticed_at_once_and_its_log_explained(tmp_path: Path) -> None:
    process = start("raise SystemExit('OSError: [Errno 98] Address already in use')", tmp_path / "log")
    begin = time.monotonic()

    with pytest.raises(InferenceStartError, match=r"status 1: its port is in use.*\(log: .*log\)"):
        await wait_until_ready("http://127.0.0.1:9", process, tmp_path / "log", timeout_s=60)

    assert time.monotonic() - begin < 10


async def test_a_server_of_asyncio_is_noticed_as_well(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(3)")

    with pytest.raises(InferenceStartError, match="status 3: it wrote nothing"):
        await wait_until_ready("http://127.0.0.1:9", process, tmp_path / "no log", timeout_s=60)


async def test_a_server_that_never_answers_costs_the_deadline(tmp_path: Path) -> None:
    process = start("import time; print('Loading weights', flush=True); time.sleep(60)", tmp_path / "log")

    with pytest.raises(InferenceStartError, match=r"did not answer within 1 s"):
        await wait_until_ready("http://127.0.0.1:9", process, tmp_path / "log", timeout_s=1)

    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("log_text", "explanation"),
    [
        ("OSError: [Errno 98] Address already in use", "its port is in use"),
        (
            "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
            "'namespace/repo_name': '/runs/models/nope'. Use `repo_type` argument if needed.",
            "the model folder /runs/models/nope is missing",
        ),
        (
            "OSError: We couldn't connect to 'https://huggingface.co' to load the files",
            "the model folder is missing",
        ),
        ("api_server.py: error: unrecognized arguments: --frobnicate 3", "does not know the argument --frobnicate 3"),
        ("api_server.py: error: argument --dtype: invalid choice: 'int3'", "refuses an argument: argument --dtype"),
        (
            "User-specified max_model_len (100000) is greater than the derived max_model_len "
            "(max_position_embeddings=8192)",
            "max_model_len=100000 is more than the model was made for",
        ),
        (
            "ValueError: Available memory on node 0 (3.1/23.4 GiB) on kv cache allocation is less than requested",
            "not enough memory",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "not enough memory"),
        (
            "ValueError: To serve at least one request with the models's max seq len (8192), 0.18 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (0.0 GiB).",
            "the key-value cache is too small",
        ),
        (
            "ValueError: Invalid weight transfer backend: gloo. Available engines: ['nccl', 'ipc']",
            "no weight transfer backend gloo; install this project",
        ),
        (
            "AttributeError: '_OpNamespace' '_C' object has no attribute 'init_cpu_memory_env'",
            "the compiled kernels of this vLLM",
        ),
        ("ModuleNotFoundError: No module named 'vllm'", "run scripts/install_vllm.sh"),
        (
            "WARNING 11-21 Found ulimit of 20000: OSError: [Errno 24] Too many open files\n"
            "(EngineCore pid=7) ValueError: rope_scaling is odd\n"
            "RuntimeError: Engine core initialization failed.",
            "ValueError: rope_scaling is odd",
        ),
        ("INFO starting\nINFO loading weights\n", "its last words were: INFO loading weights"),
        ("", "it wrote nothing"),
    ],
)
def test_a_failure_is_told_in_one_sentence_with_its_fix(log_text: str, explanation: str) -> None:
    assert explanation in explain_failure(log_text)
    assert "{" not in explain_failure(log_text)


def test_the_launcher_is_light_to_import() -> None:
    code = (
        "import sys, atroposlib.launch.inference; print([m for m in ('torch', 'vllm', 'trainer') if m in sys.modules])"
    )

    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "[]"
