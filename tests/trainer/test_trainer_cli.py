"""The command line, as a user meets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tests.trainer.fakes import tiny_llama
from trainer.cli import main
from trainer.config import presets
from trainer.config.resolved import describe
from trainer.methods import METHODS
from trainer.weight_sync.config import WeightSyncConfig


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_ends_with_examples_and_does_not_load_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trainer.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert "atropos-trainer --config trainer.yaml" in done.stdout.split("examples:")[1]
    for field in fields(WeightSyncConfig):
        assert f"\n  weight_sync.{field.name}\n" in done.stdout
    assert "For one transfer; a publication tries three times at most. Default: 60.0." in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "transformers")]


def test_help_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])

    out = capsys.readouterr().out
    for name, method in METHODS.items():
        assert f"\n  {name}: {method.meaning}\n" in out
    for group in presets.GROUPS:
        assert f"  {group}= {', '.join(presets.names(group))}\n" in out
    assert "deepspeed= zero1, zero2, zero3, zero3_offload, or a file" in out


def test_options_may_stand_before_and_behind_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=dapo", "--dry-run", f"model_name_or_path={tmp_path}", "beta=0.25"]) == 0

    assert "beta: 0.25" in capsys.readouterr().out


def test_the_resolved_configuration_is_kept_in_the_run_folder_and_the_users_file_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trainer.yaml"
    text = f"model_name_or_path: {tmp_path}\nrun_dir: {tmp_path}/run\nrollout_server_token: secret\n"
    path.write_text(text)

    status = main(["--config", str(path), "--recipe", "dr_grpo"])  # ends at the model, which is an empty folder

    assert status == 2
    kept = (tmp_path / "run" / "trainer_resolved.yaml").read_text()
    assert "loss_aggregation: constant" in kept
    assert "max_completion_length: 4096  # recipe=dr_grpo" in kept
    assert "secret" not in kept
    assert path.read_text() == text


def test_a_run_folder_that_cannot_be_written_is_an_error_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")

    status = main([f"model_name_or_path={tmp_path}", f"run_dir={tmp_path}/file/run"])

    assert status == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_error_is_one_line_without_a_traceback_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["temprature=1"])

    assert status == 2
    assert (
        capsys.readouterr().err == "error: unknown key 'temprature' in the command line; did you mean 'temperature'?\n"
    )


def test_a_model_that_cannot_be_loaded_is_an_error_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()

    status = main([f"model_name_or_path={tmp_path / 'model'}", f"run_dir={tmp_path}"])

    assert status == 2
    assert "error: cannot load model_name_or_path" in capsys.readouterr().err


def test_print_config_is_yaml_that_says_where_each_value_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trainer.yaml"
    path.write_text(f"model_name_or_path: {tmp_path}\nrollout_server_token: secret\nweight_sync: {{transport: disk}}\n")

    status = main(["--config", str(path), "--print-config", "max_steps=3", "weight_sync.keep=4"])

    out = capsys.readouterr().out
    assert status == 0
    assert "max_steps: 3  # the command line" in out
    assert f"model_name_or_path: {tmp_path}  # {path}" in out
    assert "batch_size: 64  # default" in out
    assert "secret" not in out
    assert f"\n  transport: disk  # {path}\n  timeout_s: 60.0  # default\n" in out
    assert "  keep: 4  # the command line\n" in out
    assert yaml.safe_load(out)["learning_rate"] == 1e-6
    assert yaml.safe_load(out)["weight_sync"]["keep"] == 4


def test_what_print_config_prints_can_be_given_as_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.config.compose import load_config

    main(["--print-config", f"model_name_or_path={tmp_path}", "weight_sync.transport=disk", "use_peft=true"])
    options = yaml.safe_load(capsys.readouterr().out)
    (tmp_path / "again.yaml").write_text(
        yaml.safe_dump({key: options[key] for key in ("weight_sync", "use_peft", "model_name_or_path")})
    )

    config = load_config(tmp_path / "again.yaml")

    assert (config.weight_sync.transport, config.use_peft) == ("disk", True)


@pytest.mark.parametrize("recipe", presets.names("recipe"))
def test_a_resolved_configuration_is_a_configuration(tmp_path: Path, recipe: str) -> None:
    from trainer.config.compose import load_config_with_origins

    teacher = [f"teacher_model_name_or_path={tmp_path}"] if "gkd" in recipe else []
    options = [f"model_name_or_path={tmp_path}", f"recipe={recipe}", "deepspeed=null", *teacher]
    config, origins = load_config_with_origins(None, options)
    path = tmp_path / "resolved.yaml"
    path.write_text(describe(config, origins))

    again, _ = load_config_with_origins(path)

    assert yaml.safe_load(describe(again, {})) == yaml.safe_load(describe(config, {}))


def test_sigterm_while_waiting_for_the_rollout_server_ends_in_good_time(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "trainer.cli", f"model_name_or_path={tmp_path / 'model'}", f"run_dir={tmp_path / 'run'}",
            "rollout_server_url=http://127.0.0.1:9",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "rollout server does not answer" in line:
            break
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)

    assert time.monotonic() - start < 30
    assert process.returncode == 0
    assert "stopped by SIGTERM" in rest
    assert "Traceback" not in rest
