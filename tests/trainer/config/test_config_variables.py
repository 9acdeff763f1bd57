"""Environment variables stand between the file and the command line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.errors import ConfigError
from trainer.cli import main
from trainer.config.compose import Composition, load_config, load_config_with_origins
from trainer.config.grammar import key_of_variable, variable_of_key
from trainer.config.layers import layers
from trainer.methods import METHODS

VARIABLE = "ATROPOS_TRAINER_LEARNING_RATE"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "trainer.yaml"
    path.write_text(f"model_name_or_path: {tmp_path}\nlearning_rate: 1e-4\n")
    return path


def test_a_variable_wins_over_the_file_and_the_command_line_over_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "2e-5")

    config, origins = load_config_with_origins(path)

    assert (config.learning_rate, origins["learning_rate"]) == (2e-5, f"environment variable {VARIABLE}")
    assert load_config(path, ["learning_rate=3e-6"]).learning_rate == 3e-6


def test_two_underscores_are_a_dot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROPOS_TRAINER_WEIGHT_SYNC__TRANSPORT", "disk")
    monkeypatch.setenv("ATROPOS_TRAINER_MODEL_INIT_KWARGS", "{use_cache: false}")

    config, origins = load_config_with_origins(path)

    assert (config.weight_sync.transport, config.model_init_kwargs) == ("disk", {"use_cache": False})
    assert origins["weight_sync.transport"] == "environment variable ATROPOS_TRAINER_WEIGHT_SYNC__TRANSPORT"


def test_a_variable_may_hold_a_group(path: Path) -> None:
    path.write_text(f"{path.read_text()}weight_sync: {{keep: 5}}\n")
    environ = {"ATROPOS_TRAINER_WEIGHT_SYNC": "{transport: disk}", "HOME": "x"}

    composition = Composition(layers(path, [], environ=environ))

    assert composition.values()["weight_sync"].keep == 5
    assert composition.values()["weight_sync"].transport == "disk"
    assert composition.origins["weight_sync.transport"] == "environment variable ATROPOS_TRAINER_WEIGHT_SYNC"


def test_a_variable_may_choose_a_preset_a_method_or_another_name_of_a_key(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATROPOS_TRAINER_RECIPE", "dapo")
    monkeypatch.setenv("ATROPOS_TRAINER_NUM_GENERATIONS", "4")

    assert (load_config(path).overlong, load_config(path).group_size) == ("soft", 4)
    monkeypatch.delenv("ATROPOS_TRAINER_RECIPE")
    monkeypatch.delenv("ATROPOS_TRAINER_NUM_GENERATIONS")
    monkeypatch.setenv("ATROPOS_TRAINER_METHOD", "sft")
    assert load_config(path).max_seq_length == 4096


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LERNING_RATE", "1", "unknown key 'ATROPOS_TRAINER_LERNING_RATE' in the environment variables; did you mean "
                              "'ATROPOS_TRAINER_LEARNING_RATE'?"),
        ("WEIGHT_SYNC__TRANSPRT", "disk", "did you mean 'ATROPOS_TRAINER_WEIGHT_SYNC__TRANSPORT'?"),
        ("TRANSPORT", "disk", "did you mean 'ATROPOS_TRAINER_WEIGHT_SYNC__TRANSPORT'?"),
        ("LMBDA", "1", "'ATROPOS_TRAINER_LMBDA' in the environment variables has no use with method=grpo"),
        ("LEARNING_RATE", "fast", "learning_rate in environment variable ATROPOS_TRAINER_LEARNING_RATE should be a valid number"),
        ("LEARNING_RATE", "[", "the value of 'ATROPOS_TRAINER_LEARNING_RATE' is not YAML"),
        ("RECIPE", "dapoo", "recipe=dapoo is no preset"),
        ("", "1", "unknown key 'ATROPOS_TRAINER_' in the environment variables"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_explained(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"ATROPOS_TRAINER_{name}", value)

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert message in str(caught.value)


def test_two_variables_of_one_key_must_agree(path: Path) -> None:
    names = ("ATROPOS_TRAINER_GROUP_SIZE", "ATROPOS_TRAINER_NUM_GENERATIONS")

    with pytest.raises(ConfigError, match=f"{names[0]} and {names[1]} .* are the same key"):
        layers(path, [], environ={names[0]: "4", names[1]: "8"})
    assert Composition(layers(path, [], environ=dict.fromkeys(names, "4"))).values()["group_size"] == 4


def test_the_value_of_a_variable_may_hold_references(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROPOS_TRAINER_RUN_DIR", "runs/${loss_type}")

    assert load_config(path).run_dir == "runs/ppo_clip"


@given(st.sampled_from(sorted(METHODS["grpo"].schema.defaults)))
def test_every_key_has_its_variable(key: str) -> None:
    assert key_of_variable(variable_of_key(key)) == key


def test_print_config_shows_the_variable(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "2e-5")

    assert main(["--config", str(path), "--print-config"]) == 0

    assert f"learning_rate: 2.0e-05  # environment variable {VARIABLE}" in capsys.readouterr().out


def test_a_variable_that_nobody_reads_any_more_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRANSFORMERS_CACHE", "/tmp/cache")

    with caplog.at_level(logging.WARNING, logger="trainer.cli"):
        main(["--config", str(path), "--dry-run"])

    assert "TRANSFORMERS_CACHE is not read any more: set HF_HOME instead" in caplog.text
