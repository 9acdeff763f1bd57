"""Options of SFT and GKD: what follows from what, and one failing example for each rule."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from trainer.config.compose import load_config
from trainer.supervised.config import GKDConfig, SFTConfig

GKD_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"seq_kd": True}, "with lmbda=1 there are none"),
    ({"lmbda": 1.5}, r"lmbda must be in \[0, 1\]"),
    ({"beta": -0.1}, r"beta must be in \[0, 1\]"),
    ({"beta": 1.0, "jsd_rescale": True}, "jsd_rescale=true divides by"),
    ({"kd_temperature": 0.0}, "kd_temperature must be over 0"),
    ({"temperature": 0.0}, "temperature must be over 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"disable_dropout": False}, "disable_dropout=false is not taken"),
    ({"completion_only_training": False}, "is for SFT"),
    ({"align_teacher_template": "yes"}, "align_teacher_template must be one of"),
    ({"baseline_success": 1.2}, r"baseline_success must be in \[0, 1\]"),
    ({"baseline_tokens": 0}, "baseline_tokens must be at least 1"),
    ({"teacher_model_init_kwargs": {"token": "hf_x"}}, r"teacher_model_init_kwargs\.token would be written .*HF_TOKEN"),
    ({"deepspeed": "zero2", "teacher_model_init_kwargs": {"device_map": "auto"}}, "device_map and deepspeed exclude"),
    ({"deepspeed": "zero3"}, "lmbda=0 and eval_samples=0"),
    ({"metric_for_best_model": "eval_success_rate", "eval_samples": 0}, "measured by nobody"),
    ({"teacher_model_name_or_path": "./nowhere"}, "teacher_model_name_or_path='./nowhere' does not exist"),
]
SFT_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"max_seq_length": 1}, "max_seq_length must be at least 2"),
    ({"max_steps": 0}, "max_steps must be over 0, or -1"),
    ({"num_train_epochs": 0}, "num_train_epochs must be over 0"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end=true needs evaluations"),
    ({"eval_steps": 20, "load_best_model_at_end": True}, "save_steps=50 must be eval_steps=20"),
    ({"eval_steps": 50, "save_strategy": "epoch", "load_best_model_at_end": True}, "a checkpoint at each evaluation"),
    ({"eval_steps": 50, "metric_for_best_model": "eval_reward"}, "eval_reward' is measured by nobody"),
    ({"greater_is_better": True}, "contradicts metric_for_best_model=eval_loss"),
    ({"completion_only_training": False, "train_on_last_turn_only": True}, "give one of them"),
    ({"custom_start_of_response": ""}, "custom_start_of_response is empty"),
    ({"lora_r": 8}, "lora_r is an option of LoRA"),
    ({"use_peft": True, "lora_target_modules": []}, "lora_target_modules is empty"),
    ({"use_peft": True, "lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
    ({"push_to_hub": True}, "push_to_hub needs hub_model_id"),
    ({"model_name_or_path": "./nowhere"}, "model_name_or_path='./nowhere' does not exist"),
    ({"save_strategy": "best"}, "save_strategy must be one of"),
    ({"model_init_kwargs": {"torch_dtype": "bfloat16"}, "torch_dtype": "float32"}, "are the same option"),
]


@pytest.mark.parametrize(("options", "message"), SFT_FAULTS, ids=lambda value: str(value)[:40])
def test_an_impossible_sft_configuration_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SFTConfig(run_dir=str(tmp_path), **options)


@pytest.mark.parametrize(("options", "message"), GKD_FAULTS, ids=lambda value: str(value)[:40])
def test_an_impossible_gkd_configuration_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GKDConfig(run_dir=str(tmp_path), **options)


def test_the_learning_rate_follows_from_what_is_trained(tmp_path: Path) -> None:
    run_dir = str(tmp_path)

    assert SFTConfig(run_dir=run_dir).learning_rate == 1e-5
    assert SFTConfig(run_dir=run_dir, use_peft=True).learning_rate == 2e-4
    assert GKDConfig(run_dir=run_dir).learning_rate == 5e-6
    assert SFTConfig(run_dir=run_dir, use_peft=True, learning_rate=1e-5).learning_rate == 1e-5


@pytest.mark.parametrize(
    ("options", "strategy", "keeps_best"),
    [
        ({}, "no", False),
        ({"eval_steps": 50}, "steps", True),
        ({"eval_steps": 20}, "steps", False),
        ({"do_eval": True}, "epoch", False),
        ({"do_eval": True, "save_strategy": "epoch"}, "epoch", True),
        ({"do_eval": False, "eval_steps": 50}, "no", False),
        ({"eval_strategy": "epoch", "save_strategy": "no"}, "epoch", False),
    ],
)
def test_evaluation_follows_from_what_is_said_of_it(
    tmp_path: Path, options: dict[str, Any], strategy: str, keeps_best: bool
) -> None:
    config = SFTConfig(run_dir=str(tmp_path), **options)

    assert (config.eval_strategy, config.load_best_model_at_end) == (strategy, keeps_best)
    assert config.do_eval is (strategy != "no")


@pytest.mark.parametrize(
    ("metric", "expected"), [("eval_loss", False), ("eval_success_rate", True), ("eval_avg_tokens", False)]
)
def test_which_way_is_better_follows_from_the_metric(tmp_path: Path, metric: str, expected: bool) -> None:
    assert GKDConfig(run_dir=str(tmp_path), metric_for_best_model=metric).greater_is_better is expected


def test_the_batch_may_be_said_in_passes_of_other_trainers(tmp_path: Path) -> None:
    config = SFTConfig(run_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=8)

    assert config.batch_size == 32
    assert config.per_device_train_batch_size == config.gradient_accumulation_steps == 1


def test_one_pass_holds_max_seq_length_tokens_where_nothing_else_is_said(tmp_path: Path) -> None:
    run_dir = str(tmp_path)

    assert SFTConfig(run_dir=run_dir, max_seq_length=100).pass_tokens == 100
    assert SFTConfig(run_dir=run_dir, max_seq_length=100, max_tokens_per_micro_batch=300).pass_tokens == 300
    assert SFTConfig(run_dir=run_dir, packing=False).pass_tokens == 1


def test_a_high_learning_rate_is_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SFTConfig(run_dir=str(tmp_path), learning_rate=1e-3)

    assert "learning_rate=0.001 is high" in caplog.text


@pytest.mark.parametrize("method", ["sft", "gkd"])
def test_a_configuration_comes_from_the_command_line(tmp_path: Path, method: str) -> None:
    teacher = ["teacher_model_name_or_path=y"] if method == "gkd" else []
    given = [f"method={method}", "model_name_or_path=x", f"run_dir={tmp_path}", "dataset_path=rows.jsonl", "seed=7"]
    config = load_config(None, [*given, *teacher])

    assert type(config).__name__ == f"{method.upper()}Config"
    assert config.data.dataset_path == Path("rows.jsonl")
    assert config.seed == config.data.seed == 7
