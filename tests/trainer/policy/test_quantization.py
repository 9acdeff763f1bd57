"""QLoRA is taken where an adapter is trained and sent, and refused with what it lacks elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from trainer.config.compose import load_config
from trainer.config.grpo import GRPOConfig
from trainer.policy import quantization
from trainer.run import setup as run_setup
from trainer.weight_sync.config import WeightSyncConfig


def on_an_accelerator(**options: Any) -> GRPOConfig:
    """A resolved configuration of QLoRA, as it would be with CUDA."""
    config = GRPOConfig(use_peft=True)
    for name, value in {"use_cpu": False, "load_in_4bit": True, **options}.items():
        setattr(config, name, value)
    return config


@pytest.fixture
def _has_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "bitsandbytes" else found(name))


@pytest.mark.usefixtures("_has_bitsandbytes")
def test_an_adapter_over_4_bits_is_taken_where_the_adapter_is_what_is_sent() -> None:
    quantization.check(on_an_accelerator())
    quantization.check(on_an_accelerator(weight_sync=WeightSyncConfig(transport="lora")))
    quantization.check(on_an_accelerator(deepspeed={"zero_optimization": {"stage": 2}}))


@pytest.mark.usefixtures("_has_bitsandbytes")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_peft": False}, "cannot be trained themselves: give use_peft=true as well"),
        ({"weight_sync": WeightSyncConfig(transport="gloo")}, "weight_sync.transport=gloo sends whole weights"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "stage 3 cannot split weights in 4 bits: give zero2"),
        ({"use_cpu": True}, "trains on an accelerator alone"),
    ],
)
def test_what_4_bits_need_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        quantization.check(on_an_accelerator(**options))

    assert message in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))

    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        quantization.check(on_an_accelerator())


def test_the_configuration_is_checked_when_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give use_peft=true as well"):
        load_config(None, [f"model_name_or_path={tmp_path}", "load_in_4bit=true"])


def test_a_model_in_memory_is_not_taken_for_one_in_4_bits() -> None:
    config = on_an_accelerator()

    with pytest.raises(ConfigError, match="rounds weights as they are loaded, and this model is in memory"):
        run_setup.policy_of(config, SimpleNamespace())
    quantization.check_in_memory(config, SimpleNamespace(is_loaded_in_4bit=True))
    quantization.check_in_memory(GRPOConfig(), SimpleNamespace())


def test_a_model_that_is_named_is_loaded_with_what_the_configuration_says_of_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(run_setup, "load_policy", lambda _, **options: given.update(options))
    monkeypatch.setattr(run_setup, "quantization_of", lambda config: f"4 bits: {config.load_in_4bit}")
    monkeypatch.setattr(run_setup, "use_kernels", lambda lm, config: given.update(kernels_for=lm))

    run_setup.policy_of(on_an_accelerator(), None)
    given["prepare"]("model")

    assert (given["quantization"], given["kernels_for"]) == ("4 bits: True", "model")


def test_whole_weights_are_not_quantized() -> None:
    assert quantization.quantization_of(GRPOConfig()) is None
