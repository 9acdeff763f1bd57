"""A checkpoint remembers what its run learnt with, and nothing that says where or how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config.compose import load_config
from trainer.config.fingerprint import differences, is_secret, learning_options
from trainer.config.grpo import GRPOConfig


@pytest.mark.parametrize(
    "options",
    [
        {"run_dir": "elsewhere"}, {"rollout_server_url": "http://h:1"}, {"logging_steps": 7}, {"report_to": ["tensorboard"]},
        {"max_tokens_per_micro_batch": 99}, {"pack": False}, {"save_steps": 3}, {"max_steps": 7}, {"prefetch": 3},
        {"rollout_server_token": "secret"},
    ],
)  # fmt: skip
def test_places_logging_and_passes_are_not_learnt(options: dict[str, Any]) -> None:
    assert learning_options(GRPOConfig(**options)) == learning_options(GRPOConfig())


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 2e-6}, {"loss_type": "cispo"}, {"batch_size": 32}, {"model_name_or_path": "org/other"},
        {"beta": 0.1}, {"seed": 1}, {"max_staleness": 1}, {"weight_decay": 0.1}, {"adam_beta2": 0.95}, {"bf16": True},
        {"use_peft": True}, {"temperature": 0.7}, {"lr_scheduler_type": "cosine"}, {"num_minibatches": 2},
    ],
)  # fmt: skip
def test_what_changes_the_weights_is_learnt(options: dict[str, Any]) -> None:
    assert learning_options(GRPOConfig(**options)) != learning_options(GRPOConfig())


def test_the_length_of_a_run_matters_where_the_rate_follows_it() -> None:
    short, long = (GRPOConfig(lr_scheduler_type="cosine", max_steps=steps) for steps in (10, 20))

    assert differences(learning_options(short), learning_options(long)) == ["max_steps: 20 (was 10)"]


def test_differences_name_the_keys_and_survive_a_file() -> None:
    old = json.loads(json.dumps(learning_options(GRPOConfig(learning_rate=1e-5, loss_type="gspo"))))
    new = learning_options(GRPOConfig(learning_rate=1e-6))

    assert differences(old, new) == ["learning_rate: 1e-06 (was 1e-05)", 'loss_type: "ppo_clip" (was "gspo")']
    assert differences(old, old) == []


def test_a_key_of_another_version_of_the_program_is_no_difference() -> None:
    assert differences({"beta": 1, "gone": 1}, {"beta": 1, "added": 2}) == []


def test_a_data_set_belongs_to_what_is_learnt_and_its_password_stays_out(tmp_path: Path) -> None:
    options = ["method=sft", f"model_name_or_path={tmp_path}", "db_url=postgresql://u:hunter2@h/d"]
    one = learning_options(load_config(None, [*options, "dataset_path=a.jsonl"]))
    two = learning_options(load_config(None, [*options, "dataset_path=b.jsonl"]))

    assert "hunter2" not in json.dumps(one)
    assert "db_url" not in one["data"]
    assert [text.split(":")[0] for text in differences(one, two)] == ["data"]


def test_secrets_are_known_by_the_end_of_their_names() -> None:
    names = ["token", "hub_token", "rollout_server_token", "db_url", "max_token_len", "tokenizer_name_or_path"]

    assert [name for name in names if is_secret(name)] == names[:4]


def test_no_secret_gets_into_a_checkpoint_from_inside_an_option(tmp_path: Path) -> None:
    config = load_config(
        None, ["method=gkd", f"model_name_or_path={tmp_path}", f"teacher_model_name_or_path={tmp_path}"]
    )
    config.teacher_model_init_kwargs = {"token": "hunter2", "revision": "main"}

    assert learning_options(config)["teacher_model_init_kwargs"] == {"revision": "main"}
