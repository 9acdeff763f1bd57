"""The whole of `atropos up` as a user starts it. Inference, environment and trainer are FAKES; the server is real."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from atroposlib.launch.jsonl import read_jsonl

WriteConfig = Callable[..., Path]
FAKES = Path(__file__).parent / "fakes"
ATROPOS = (sys.executable, "-m", "atroposlib.cli.main")


def atropos(*arguments: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ATROPOS, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes that have this folder on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
            found.append(process)
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not become true"
        time.sleep(0.05)


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def test_a_run_goes_through_and_leaves_its_folder(write_config: WriteConfig, tmp_path: Path) -> None:
    result = atropos("up", "--config", str(write_config()))

    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "runs" / "fake"
    summary = summary_of(run)
    assert (summary["heldout_reward_before"], summary["heldout_reward_after"]) == (0.25, 0.75)
    assert (summary["steps"], summary["sequences_trained"]) == (6, 48)
    assert (summary["sequences_lost"], summary["sequences_repeated"]) == (0, 0)
    assert summary["max_staleness_seen"] <= 1
    files = ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "report.html", "report.png", "events.jsonl", "final")
    assert [name for name in files if not (run / name).exists()] == []
    assert "0.250 → 0.750" in result.stdout
    assert "step 6/6" in result.stdout
    assert processes_of(tmp_path) == []


def test_a_frozen_server_runs_beside_the_policy_and_the_environment_is_told_where(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    environment = {"command": str(FAKES / "environment.py"), "name": "toy", "group_size": 4, "servers": ["student"]}
    config = write_config(frozen={"student": {"model": "models/small"}}, environments=[environment])

    result = atropos("up", "--config", str(config))

    assert result.returncode == 0, result.stdout + result.stderr
    events = read_jsonl(tmp_path / "runs" / "fake" / "events.jsonl")
    assert {"inference", "inference-student"} <= {event.get("process") for event in events}
    assert processes_of(tmp_path) == []


def test_a_frozen_server_has_no_route_for_weights(write_config: WriteConfig) -> None:
    environment = {"command": str(FAKES / "environment.py"), "servers": ["student"]}
    config = write_config(frozen={"student": {"model": "models/small"}}, environments=[environment])

    shown = atropos("up", "--config", str(config), "--dry-run").stdout

    policy, student = (line for line in shown.splitlines() if "--served-model-name" in line)
    assert "--weight-transfer-config" in policy
    assert "--weight-transfer-config" not in student
    assert "VLLM_SERVER_DEV_MODE" not in student
    assert "--served-model-name small" in student
    assert "--student.model_name small --student.server_type vllm" in shown


def test_an_environment_that_asks_a_server_which_is_not_there_is_refused(write_config: WriteConfig) -> None:
    environment = {"command": str(FAKES / "environment.py"), "servers": ["studnet"]}

    result = atropos("up", "--config", str(write_config(frozen={"student": {}}, environments=[environment])))

    assert result.returncode == 2
    assert "names 'studnet', and frozen has student" in result.stderr


def test_a_killed_trainer_is_started_again_and_no_group_counts_twice(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config()
    die = "processes.trainer.env.FAKE_DIE_AT_STEP=2"

    result = atropos("up", "--config", str(config), die)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "trainer was killed by SIGKILL; restart 1" in result.stdout
    summary = summary_of(tmp_path / "runs" / "fake")
    assert summary["restarts"]["trainer"] == 1
    trained = read_jsonl(tmp_path / "runs" / "fake" / "ledger" / "trainer.jsonl")
    assert [line["step"] for line in trained] == [0, 1, 2, 2, 3, 4, 5]
    assert (summary["sequences_trained"], summary["sequences_lost"], summary["sequences_repeated"]) == (48, 0, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_and_the_run_can_be_resumed(
    write_config: WriteConfig, tmp_path: Path, number: signal.Signals
) -> None:
    config = write_config(trainer={"batch_size": 8, "max_steps": 40, "max_staleness": 1})
    process = subprocess.Popen([*ATROPOS, "up", "--config", str(config)], stderr=subprocess.PIPE, text=True)
    run = tmp_path / "runs" / "fake"
    wait_until(lambda: len(read_jsonl(run / "metrics.jsonl")) >= 3)

    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 128 + number
    assert f"atropos up --resume {run}" in stderr
    assert processes_of(tmp_path) == []

    resumed = atropos("up", "--resume", str(run))

    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    summary = summary_of(run)
    assert (summary["steps"], summary["sequences_trained"]) == (40, 320)
    assert (summary["sequences_lost"], summary["sequences_repeated"]) == (0, 0)
    assert "evaluating before" not in resumed.stdout


def test_no_orphan_is_left_when_atropos_up_itself_is_killed(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(trainer={"batch_size": 8, "max_steps": 400, "max_staleness": 1})
    process = subprocess.Popen([*ATROPOS, "up", "--config", str(config)], stdout=subprocess.DEVNULL)
    wait_until(lambda: len(read_jsonl(tmp_path / "runs" / "fake" / "metrics.jsonl")) >= 2)
    assert len(processes_of(tmp_path)) > 4

    process.kill()
    process.wait()

    wait_until(lambda: processes_of(tmp_path) == [], timeout_s=30)


def assert_refused(result: subprocess.CompletedProcess[str], problem: str, hint: str, folder: Path) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ")
    assert problem in result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert processes_of(folder) == []
    assert not (folder / "runs").exists()


def test_bad_input_is_refused_within_seconds_before_anything_starts(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config())
    begin = time.monotonic()

    assert_refused(atropos("up", "--config", config, "sede=1"), "unknown key 'sede'", "did you mean 'seed'", tmp_path)
    assert_refused(atropos("up", "--config", config, "model=/no"), "/no does not exist", "make demo", tmp_path)
    assert_refused(
        atropos("up", "--config", config, "trainer.batch_size=9"), "nearest valid batch_size: 8 or 12", "", tmp_path
    )
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = f"rollout_server.port={holder.getsockname()[1]}"
        assert_refused(atropos("up", "--config", config, port), "in use by", "rollout_server.port=0", tmp_path)

    assert time.monotonic() - begin < 40


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.no_such_trainer_key=1", ["check-trainer", "unknown key no_such_trainer_key"]),
        ("environments.0.options.colour=red", ["check-toy", "unknown option --env.colour", "see --help"]),
        (
            "processes.inference.command=[sh, -c, 'echo Address already in use; exit 1']",
            ["inference", "port is in use"],
        ),
        ("processes.inference.command=[no-such-engine]", ["inference", "no-such-engine"]),
    ],
)
def test_a_process_that_cannot_work_ends_the_run_with_its_own_words(
    write_config: WriteConfig, tmp_path: Path, override: str, words: list[str]
) -> None:
    begin = time.monotonic()

    result = atropos("up", "--config", str(write_config()), override)

    assert time.monotonic() - begin < 30
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert [word for word in words if word not in result.stderr] == []
    assert "Traceback" not in result.stderr
    assert processes_of(tmp_path) == []


def test_an_inference_server_that_runs_already_is_used_and_left_running(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    engine = subprocess.Popen([sys.executable, str(FAKES / "inference.py"), "--host", "127.0.0.1", "--port", port])
    try:
        result = atropos("up", "--config", str(write_config()), f"inference.url=http://127.0.0.1:{port}")

        assert result.returncode == 0, result.stdout + result.stderr
        assert engine.poll() is None
    finally:
        engine.kill()
        engine.wait()


def test_a_dry_run_shows_every_command_and_starts_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    result = atropos("up", "--config", str(write_config()), "--dry-run", "seed=5")

    assert result.returncode == 0
    resolved = yaml.safe_load(result.stdout.split("# rollout-server")[0])
    assert resolved["seed"] == 5
    for words in (
        "rollout_server.cli --host",
        "environment.py serve",
        "environment.py evaluate",
        "trainer.py --config",
    ):
        assert words in result.stdout
    assert not (tmp_path / "runs").exists()


def test_resume_refuses_what_is_no_unfinished_run(write_config: WriteConfig, tmp_path: Path) -> None:
    nothing = atropos("up", "--resume", str(tmp_path))
    assert nothing.returncode == 2
    assert "is not the folder of a run" in nothing.stderr

    run = tmp_path / "over"
    run.mkdir()
    (run / "config.yaml").write_text(write_config().read_text())
    (run / "summary.json").write_text("{}")
    over = atropos("up", "--resume", str(run))
    assert over.returncode == 2
    assert "the run over is over" in over.stderr


def test_the_report_of_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    result = atropos("report", str(tmp_path))

    assert result.returncode == 2
    assert "is not the folder of a run" in result.stderr


def test_help_ends_with_commands_to_paste() -> None:
    assert "atropos up --config configs/demo.yaml" in atropos("up", "--help").stdout
    assert "atropos report runs/demo" in atropos("--help").stdout


def test_the_second_ctrl_c_does_not_wait(write_config: WriteConfig, tmp_path: Path) -> None:
    deaf = f"import signal,sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.argv = sys.argv[1:]; {FAKE_ENGINE}"
    config = write_config()
    override = f"processes.inference.command={json.dumps([sys.executable, '-c', deaf, str(FAKES / 'inference.py')])}"
    process = subprocess.Popen(
        [*ATROPOS, "up", "--config", str(config), override, "trainer.max_steps=400", "processes.inference.grace_s=60"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(read_jsonl(tmp_path / "runs" / "fake" / "metrics.jsonl")) >= 1)
    begin = time.monotonic()

    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=50)

    assert time.monotonic() - begin < 30
    assert processes_of(tmp_path) == []


FAKE_ENGINE = "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"


def test_the_view_leaves_nothing_to_import_at_help(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    result = subprocess.run([*ATROPOS, "--help"], capture_output=True, text=True, env=environment, check=True)

    assert "matplotlib" not in result.stderr
    assert "pydantic" not in result.stderr
