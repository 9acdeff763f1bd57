"""atropos init writes an environment that works and a test that passes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from atroposlib.cli.init import class_name, scaffold
from atroposlib.cli.main import main
from atroposlib.errors import ConfigError

TASK_LINES = 15


def test_the_test_that_is_written_passes(tmp_path: Path) -> None:
    assert main(["init", "my_task", "--folder", str(tmp_path)]) == 0

    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_task.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout


def test_the_environment_passes_the_check_without_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment, _ = scaffold("my_task", tmp_path)
    policy = tmp_path / "policy.py"
    policy.write_text(
        "def reply(prompt):\n"
        "    item = int(''.join(filter(str.isdigit, prompt.last_user_text)))\n"
        "    return str(prompt.rng.choice([2 * item, 7]))\n"
    )

    status = main(["check", str(environment), "--policy", str(policy)])

    assert status == 0
    output = capsys.readouterr().out
    assert "my_task works" in output
    assert "fix:" not in output


def test_its_task_is_short(tmp_path: Path) -> None:
    environment, _ = scaffold("my_task", tmp_path)
    tree = ast.parse(environment.read_text())
    own = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    # Evaluation and the servers' addresses are no part of the task.
    for node in own:
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if getattr(part, "name", "") not in ("evaluate", "config_init")]
    lines = [line for node in own for line in ast.unparse(node).splitlines() if line.strip()]

    assert len(lines) <= TASK_LINES, "\n".join(lines)


@pytest.mark.parametrize("there", ["my_task.py", "test_my_task.py"])
def test_nothing_is_overwritten(tmp_path: Path, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / there).write_text("mine")

    assert main(["init", "my_task", "--folder", str(tmp_path)]) == 2

    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my-task", "'my_task' would do"),
        ("MyTask", "'my_task' would do"),
        ("2much", "lower case"),
        ("../up", "'up' would do"),
        ("class", "class_task would do"),
        ("json", "json_task would do"),
        ("base", "base_task would do"),
    ],
)
def test_a_name_that_cannot_be_a_module_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        scaffold(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match="cannot write"):
        scaffold("my_task", tmp_path / "file")


def test_class_names() -> None:
    assert class_name("my_task") == "MyTaskEnv"
    assert class_name("maze_env") == "MazeEnv"
