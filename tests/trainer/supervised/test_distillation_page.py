"""docs/distillation.md says what the code does."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from atroposlib.testing.byte_tokenizer import byte_tokenizer
from tests.trainer.supervised.fakes import HELD_OUT, ROWS, gkd_config, tiny_model
from trainer.config.compose import load_config
from trainer.supervised.examples import prepare, row_tokenizer
from trainer.supervised.gkd_trainer import GKDTrainer

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def load_recipe(name: str) -> Any:
    return yaml.safe_load((ROOT / "trainer" / "recipes" / "recipe" / f"{name}.yaml").read_text(encoding="utf-8"))


def trainer_commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if "atropos-trainer" in line or "trainer.cli" in line]


@pytest.mark.parametrize("command", trainer_commands(), ids=lambda command: command[-50:])
def test_every_command_of_the_trainer_is_a_valid_configuration(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("models/SmolLM2-135M-Instruct", "runs/sft_quickstart/final"):
        (tmp_path / model).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    overrides = words[words.index("atropos-trainer" if "atropos-trainer" in words else "trainer.cli") + 1 :]

    # DeepSpeed would set up this whole process.
    load_config(None, [*(word for word in overrides if not word.startswith("deepspeed=")), "deepspeed=null"])


def test_the_quickstarts_follow_each_other() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    start = commands.index("make model")
    student, teacher = (load_recipe(name) for name in ("gkd_quickstart", "sft_quickstart"))

    assert commands[start + 1 : start + 3] == [
        "atropos-trainer recipe=sft_quickstart",
        "atropos-trainer recipe=gkd_quickstart",
    ]
    assert student["teacher_model_name_or_path"] == f"{teacher['run_dir']}/final"


@pytest.mark.parametrize("line", [line for block in blocks("json") for line in block.splitlines()])
def test_every_row_can_be_trained_on(line: str) -> None:
    tokenize = row_tokenizer(
        byte_tokenizer(), completion_only=True, last_turn_only=False, response_marker=None, takes_prompts=False
    )

    examples, _ = prepare([json.loads(line)], tokenize, max_seq_length=400)

    assert "aris" in byte_tokenizer().decode(examples[0].tokens_L[examples[0].is_trained_L].tolist())


def test_the_python_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("py")
    model = tmp_path / "models" / "SmolLM2-135M-Instruct"
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "docs/distillation.md", "exec"), {})

    assert (tmp_path / "runs" / "sft" / "final" / "model.safetensors").is_file()


def test_every_figure_of_a_run_is_explained(tmp_path: Path) -> None:
    config = gkd_config(
        tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=False, baseline_success=0.0,
        baseline_tokens=10.0,
    )  # fmt: skip
    trainer = GKDTrainer(
        config, model=tiny_model(), teacher_model=tiny_model(1), tokenizer=byte_tokenizer(),
        teacher_processing_class=byte_tokenizer(), train_dataset=ROWS, eval_dataset=HELD_OUT,
    )  # fmt: skip
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    written = {name for line in lines for name in line} - {"step", "time", "total_steps"}
    table = PAGE[PAGE.index("| figure |") :].split("\n\n")[0]
    explained = {name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}

    assert {name for name in written if not name.startswith("eval_data/")} <= explained


def test_the_betas_of_the_table_are_those_of_the_loss() -> None:
    table = PAGE[PAGE.index("| `beta` |") :].split("\n\n")[0]

    assert re.findall(r"^\| `([\d.]+)` \| (?:the symmetric|KL\((\w), (\w)\))", table, flags=re.M) == [
        ("0", "T", "S"),
        ("0.5", "", ""),
        ("1", "S", "T"),
    ]
