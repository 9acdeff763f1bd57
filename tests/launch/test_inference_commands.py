"""The command lines of inference servers that follow from roles, weight transfers, adapters and engines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from atroposlib.launch import serve_inference
from atroposlib.launch.inference import InferenceConfig, explain_failure, vllm_command
from atroposlib.launch.serve_inference import InferenceService
from atroposlib.launch.sglang import sglang_command


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


@pytest.mark.parametrize("backend", ["gloo", "nccl", "ipc", "delta"])
def test_every_backend_reaches_the_engine(backend: str) -> None:
    argv, env = vllm_command(InferenceConfig.model_validate({"model": "m", "weight_transfer": backend}), has_gpu=True)

    assert json.loads(option(argv, "--weight-transfer-config")) == {"backend": backend}
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in env) == (backend == "ipc")


def test_a_server_that_never_gets_weights_keeps_its_rl_routes_closed() -> None:
    argv, env = vllm_command(InferenceConfig(model="m", weight_transfer="none"), has_gpu=False)

    assert "--weight-transfer-config" not in argv
    assert "VLLM_SERVER_DEV_MODE" not in env


def test_adapters_can_be_loaded_only_where_that_was_asked_for() -> None:
    without, env_without = vllm_command(InferenceConfig(model="m"), has_gpu=False)
    argv, env = vllm_command(InferenceConfig(model="m", lora=True, max_lora_rank=32), has_gpu=False)

    assert "--enable-lora" not in without
    assert "--enable-lora" in argv
    assert option(argv, "--max-lora-rank") == "32"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in env_without
    assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_sglang_is_told_the_same_in_its_own_words() -> None:
    config = InferenceConfig(
        model="models/m", served_model_name="m", port=8123, max_model_len=512, lora=True, tensor_parallel_size=2,
        extra_args=["--mem-fraction-static", "0.5"],
    )  # fmt: skip

    argv, env = sglang_command(config, has_gpu=True)

    assert argv[1:3] == ["-m", "sglang.launch_server"]
    assert (option(argv, "--model-path"), option(argv, "--served-model-name")) == ("models/m", "m")
    assert (option(argv, "--port"), option(argv, "--context-length")) == ("8123", "512")
    assert option(argv, "--tensor-parallel-size") == "2"
    assert option(argv, "--max-lora-rank") == "16"
    assert argv[-2:] == ["--mem-fraction-static", "0.5"]
    assert env == {"HF_HUB_OFFLINE": "1"}
    assert "cpu" in sglang_command(config, has_gpu=False)[0]


@pytest.mark.parametrize("role", ["frozen", "teacher", "judge"])
def test_weights_for_a_server_that_never_gets_any_are_refused(role: Any) -> None:
    with pytest.raises(ConfigError, match=f"a {role} server never gets weights; use weight_transfer=none"):
        InferenceService(InferenceConfig(model="m"), role=role)


@pytest.mark.parametrize(
    ("host", "address", "url"),
    [
        ("127.0.0.1", "", "http://127.0.0.1:9001"),
        ("0.0.0.0", "", "http://this-machine:9001"),
        ("10.0.0.7", "", "http://10.0.0.7:9001"),
        ("0.0.0.0", "http://gpu-3:9001/v1/", "http://gpu-3:9001"),
    ],
)
def test_others_are_told_an_address_that_they_can_reach(
    monkeypatch: pytest.MonkeyPatch, host: str, address: str, url: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "this-machine")

    assert InferenceService(InferenceConfig(model="m", host=host), address=address).url == url


def test_what_is_not_installed_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_inference, "find_spec", lambda name: None)
    config = InferenceConfig(model="m")

    assert "run scripts/install_vllm.sh" in InferenceService(config).missing
    assert "--python" in InferenceService(config, engine="sglang").missing
    assert InferenceService(config, engine="sglang", python="/opt/sglang/bin/python").missing == ""


def test_another_interpreter_replaces_ours() -> None:
    service = InferenceService(InferenceConfig(model="m"), engine="sglang", python="/opt/sglang/bin/python")

    assert service.command(has_gpu=True).argv[:3] == ("/opt/sglang/bin/python", "-m", "sglang.launch_server")


def test_a_missing_sglang_is_told_from_its_log() -> None:
    assert "SGLang is not installed" in explain_failure("/usr/bin/python: No module named sglang")
