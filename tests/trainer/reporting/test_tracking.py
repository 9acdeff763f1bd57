"""Sinks of report_to: missing ones are named at start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from atroposlib.errors import ConfigError
from tests.trainer.fakes import a_config
from trainer.reporting.tracking import check_sink, prepare_tracking


@pytest.mark.parametrize("sink", ["wandb", "tensorboard", "trackio"])
def test_a_sink_that_is_not_installed_is_named_with_the_install_line(sink: str) -> None:
    with pytest.raises(ConfigError, match=f"report_to={sink} .*pip install {sink}"):
        check_sink(sink, is_installed=lambda package: False)


def test_one_of_two_packages_is_enough_for_tensorboard() -> None:
    check_sink("tensorboard", is_installed=lambda package: package == "tensorboardX")


def test_a_misspelt_sink_gets_the_near_name() -> None:
    with pytest.raises(ConfigError, match=r"'wandbb' is no sink.*did you mean 'wandb'"):
        check_sink("wandbb")


def test_a_sink_that_only_transformers_knows_is_left_to_it() -> None:
    check_sink("mlflow")


def test_wandb_without_a_key_stays_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        # Set first, so that what prepare_tracking sets is taken back after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

    prepare_tracking(a_config(tmp_path / "run", report_to=["wandb"]))

    assert os.environ["WANDB_MODE"] == "offline"
    assert os.environ["WANDB_DIR"] == str(tmp_path / "run")


def test_a_mode_that_the_user_chose_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    prepare_tracking(a_config(tmp_path / "run", report_to=["wandb"]))

    assert os.environ["WANDB_MODE"] == "disabled"
    assert os.environ["WANDB_DIR"] == str(tmp_path)


def test_without_sinks_the_environment_is_left_alone(tmp_path: Path) -> None:
    before = dict(os.environ)

    prepare_tracking(a_config(tmp_path / "run", report_to=["jsonl"]))

    assert dict(os.environ) == before
