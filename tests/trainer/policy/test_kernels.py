"""Liger's kernels are taken where they can run; those of the output layer have nothing to replace here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import transformers

from atroposlib.errors import ConfigError
from tests.trainer import fakes
from trainer.config.compose import load_config
from trainer.config.grpo import GRPOConfig
from trainer.grpo_trainer import GRPOTrainer
from trainer.policy import kernels


def a_config(**options: Any) -> GRPOConfig:
    config = GRPOConfig()
    for name, value in options.items():
        setattr(config, name, value)
    return config


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of a FAKE liger_kernel that knows Llama."""
    calls: list[dict[str, Any]] = []

    def patch_llama(
        *, model: Any, rope: bool = True, rms_norm: bool = True, cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
    ) -> None:  # fmt: skip
        calls.append(locals() | {"calls": None})

    package, transformers, patches = (ModuleType(name) for name in ("liger_kernel", "transformers", "monkey_patch"))
    patches.__dict__["MODEL_TYPE_TO_APPLY_LIGER_FN"] = {"llama": patch_llama}
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "liger_kernel" else found(name))
    return calls


def an_lm(kind: str) -> Any:
    return SimpleNamespace(config=SimpleNamespace(model_type=kind))


def test_kernels_that_cannot_run_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_config(use_liger_kernel=True)
    with pytest.raises(ConfigError, match="run on CUDA, which is not there"):
        kernels.check(config, has_cuda=False)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        kernels.check(config, has_cuda=True)


@pytest.mark.usefixtures("applied")
def test_kernels_of_the_output_layer_are_refused_with_the_reason() -> None:
    kernels.check(a_config(use_liger_kernel=True, liger_kernel_config={"rope": False}), has_cuda=True)

    for name in ("cross_entropy", "fused_linear_cross_entropy"):
        with pytest.raises(ConfigError, match="the logits of all tokens never exist"):
            kernels.check(a_config(use_liger_kernel=True, liger_kernel_config={name: True}), has_cuda=True)


def test_a_choice_among_kernels_needs_kernels(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="give use_liger_kernel=true as well"):
        load_config(None, [f"model_name_or_path={tmp_path}", "liger_kernel_config={rope: false}"])


def test_all_but_those_of_the_output_layer_are_put_into_the_model(applied: list[dict[str, Any]]) -> None:
    lm = an_lm("llama")

    kernels.use_kernels(lm, a_config(use_liger_kernel=True, liger_kernel_config={"rope": False}))
    kernels.use_kernels(lm, a_config())

    assert len(applied) == 1
    assert applied[0]["model"] is lm
    switches = {name: applied[0][name] for name in ("rope", "rms_norm", "cross_entropy", "fused_linear_cross_entropy")}
    assert switches == {"rope": False, "rms_norm": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def test_transformers_does_not_try_again(
    tmp_path: Path, applied: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda *_: pytest.fail("applied to a wrapper"))
    config = fakes.a_config(tmp_path, max_steps=1)
    config.use_liger_kernel = True

    told: list[dict[str, Any]] = []

    class Sink(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: GRPOConfig, *_: Any, **__: Any) -> None:
            told.append(args.to_dict())

    server = fakes.FakeRolloutServer()
    GRPOTrainer(config, model=fakes.tiny_llama(), connect=server.client, callbacks=[Sink()]).train()

    assert len(applied) == 1
    assert config.use_liger_kernel is True
    assert told[0]["use_liger_kernel"] is True


@pytest.mark.usefixtures("applied")
def test_a_model_or_a_kernel_that_it_does_not_know_is_named() -> None:
    with pytest.raises(ConfigError, match="no kernels for a model of type 'rwkv'"):
        kernels.apply_liger(an_lm("rwkv"), {})
    with pytest.raises(ConfigError, match=r"liger_kernel_config.geglu is no kernel .* there are rms_norm, rope"):
        kernels.apply_liger(an_lm("llama"), {"geglu": True})
