"""`python -m environments.NAME`: every environment is a command line, and its folder has what belongs there."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atroposlib.testing.mock_inference import MockInferenceServer, in_thread

ROOT = Path(__file__).parents[2]
NAMES = [
    "code_execution", "gsm8k", "instruction_following", "multimodal", "number_game", "reasoning_tasks", "rlaif_judge",
    "sft_loader", "teacher_distillation", "teaching", "tool_calling",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["serve", "process", "evaluate"])
def test_it_starts_by_its_name_and_shows_what_would_be_used(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, mode, "--dry-run", "--group_size", "3"])

    runpy.run_module(f"environments.{name}", run_name="__main__")

    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["env"]["group_size"] == 3
    assert shown["openai"][0]["server_type"] == "vllm"


@pytest.mark.parametrize("name", NAMES)
def test_its_readme_names_its_commands_and_options(name: str) -> None:
    readme = (ROOT / "environments" / name / "README.md").read_text()
    package = importlib.import_module(f"environments.{name}")
    [config] = [getattr(package, public) for public in package.__all__ if public.endswith("Config")]
    own = {field for field, info in config.model_fields.items() if field in config.__annotations__ and info.description}

    assert all(f"python -m environments.{name} {mode}" in readme for mode in ("process", "serve", "evaluate"))
    assert not {option for option in own if f"--{option}" not in readme}


def test_a_whole_process_run_with_graders_on_processes(bytes_tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    with in_thread(MockInferenceServer("#### 1")) as mock:
        flags = {
            "total_steps": 1, "group_size": 2, "max_num_workers": 1, "ensure_scores_are_not_same": False,
            "blocking_workers": 1, "tokenizer_name": bytes_tokenizer, "openai.base_url": mock.url,
            "openai.model_name": "mock", "data_path_to_save_groups": path,
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "environments.gsm8k", "process", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    [group] = [json.loads(line) for line in path.read_text().splitlines()]
    assert group["scores"] == [0.0, 0.0]


def test_the_index_names_every_environment() -> None:
    folder = ROOT / "environments"
    index = (folder / "README.md").read_text()

    assert not {
        main.parent.name for main in folder.glob("*/__main__.py") if f"({main.parent.name}/README.md)" not in index
    }
