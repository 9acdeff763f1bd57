"""docs/teaching.md: its snippets run, and the options, metrics and columns that it names exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.templates import OPTIONAL, REQUIRED
from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from atroposlib.testing.mock_inference import MockInferenceServer, in_thread
from tests.trainer.fakes import tiny_llama

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "teaching.md").read_text()
ENVIRONMENT, REWARDS, METHODS, TRAINER = re.findall(r"```py\n(.*?)```", PAGE, flags=re.S)


def run(folder: Path, code: str, *arguments: str) -> str:
    file = folder / "snippet.py"
    file.write_text(code)
    return python(folder, str(file), *arguments)


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tokenizer_name(tmp_path: Path) -> str:
    return save_byte_tokenizer(tmp_path / "tokenizer")


def test_the_environment_makes_groups(tmp_path: Path, tokenizer_name: str) -> None:
    rows = [{"prompt": f"What is {i} + 1?", "ground_truth": str(i + 1)} for i in range(20)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (
        in_thread(MockInferenceServer("Add 1.")) as teacher,
        in_thread(MockInferenceServer("The answer is 7")) as student,
    ):
        flags: dict[str, Any] = {
            "total_steps": 1, "group_size": 2, "tokenizer_name": tokenizer_name, "use_wandb": False,
            "openai.base_url": teacher.url, "student.base_url": student.url, "data_path_to_save_groups": "groups.jsonl",
        }  # fmt: skip
        run(
            tmp_path,
            ENVIRONMENT,
            "process",
            *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
        )

    [group] = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert len(group["tokens"]) == 2


def test_the_command_by_hand_asks_both_servers_for_the_named_models(tmp_path: Path, tokenizer_name: str) -> None:
    [command] = re.findall(r"^python (-m environments\.teaching serve (?:.*\\\n)*.*)$", PAGE, flags=re.M)
    with (
        in_thread(MockInferenceServer("Add.", model_name=tokenizer_name)) as teacher,
        in_thread(MockInferenceServer("The answer is 7", model_name="STUDENT")) as student,
    ):
        there = {"http://localhost:9001/v1": teacher.url, "http://localhost:9002/v1": student.url, "serve": "process"}
        words = [there.get(word, word) for word in shlex.split(command.replace("\\\n", " "))]
        flags = "--total_steps 1 --group_size 2 --max_token_length 2048 --max_prompt_length 1024 --use_wandb false"
        python(tmp_path, *[tokenizer_name if word == "MODEL" else word for word in words], *flags.split())

    assert teacher.routes["/inference/v1/generate"] > 0
    assert {request["model"] for request in teacher.requests} == {tokenizer_name}
    assert {request["model"] for request in student.requests} == {"STUDENT"}


def test_the_rewards_are_those_of_the_page() -> None:
    exec(compile(REWARDS, "rewards", "exec"), {})


def test_the_methods_can_be_tried(tmp_path: Path, tokenizer_name: str) -> None:
    with (
        in_thread(MockInferenceServer("Carry the one.")) as teacher,
        in_thread(MockInferenceServer("First 17.")) as student,
    ):
        said = run(tmp_path, METHODS, teacher.url, student.url, tokenizer_name)

    assert said.startswith("medium 0.5")
    assert "Carry the one." in said


def test_the_methods_of_the_trainer_can_be_tried(
    tmp_path: Path, tokenizer_name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().save_pretrained(tokenizer_name)
    monkeypatch.chdir(tmp_path)
    with (
        in_thread(MockInferenceServer("Carry the one.")) as teacher,
        in_thread(MockInferenceServer("First 17.")) as student,
    ):
        monkeypatch.setattr(sys, "argv", ["snippet.py", tokenizer_name, teacher.root_url, student.url])
        exec(compile(TRAINER, "trainer", "exec"), {"__name__": "__main__"})

    # DeepSpeed may have had a line before.
    assert capsys.readouterr().out.endswith("medium 0.5 []\nCarry the one.\n")


def test_every_option_that_the_page_names_exists() -> None:
    shown = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:=\w+)?`", PAGE))
    elsewhere = {
        "save_completions_probability", "model_name", "ground_truth", "accuracy_delta", "baseline_accuracy", "student_accuracy",
        "non_degradation_rate", "completion_rate", "teaching_tokens", "teaching_efficiency_score", "diagnostic_probe",
        "generate_guidance", "compute_teaching_reward", "capability_level", "confidence_score", "identified_gaps",
        "response_quality", "heldout_reward", "leak_rate", "length_tokens", "has_plan", "on_topic", "probe_tokens",
        "reward_funcs", "train_dataset",
    }  # fmt: skip

    assert shown - elsewhere - set(TeacherEnvConfig.model_fields) == set()


def test_the_table_of_templates_is_that_of_the_code() -> None:
    for name, needed in REQUIRED.items():
        [row] = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}`")]
        cells = row.strip("|").split("|")
        assert re.findall(r"\{(\w+)\}", cells[2]) == list(needed)
        assert "the same" in cells[3] or re.findall(r"\{(\w+)\}", cells[3]) == list(OPTIONAL[name])


def test_the_metrics_of_the_page_are_those_of_the_code() -> None:
    code = "".join(
        (ROOT / "atroposlib" / "teaching" / f"{name}.py").read_text() for name in ("metrics", "env", "frozen_model")
    )
    named = re.findall(r"`teaching/(\w+)`", PAGE)

    assert len(named) > 15
    assert [name for name in named if name.removeprefix("dropped_").removeprefix("student_") not in code] == []
