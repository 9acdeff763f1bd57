"""gsm8k: the right number pays, graded on processes; the sample's arithmetic is right."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from atroposlib.data.config import DataConfig
from atroposlib.envs.command_line.options import resolve
from atroposlib.envs.reward_fns.answers import gold_answer
from atroposlib.errors import ConfigError, RolloutError
from environments.gsm8k import GSM8KConfig, GSM8KEnv, Problem
from environments.gsm8k.env import FIELDS, SAMPLE
from environments.gsm8k.grading import grade, grade_bare
from environments.rows import load_rows
from tests.environments.running import Stand, alternating
from tests.processes import RolloutServerProcess

ROOT = Path(__file__).parents[2]
ROWS = load_rows(SAMPLE, fields=FIELDS)
ANSWERS = {row["question"]: row["answer"] for row in ROWS}


@pytest.fixture
def stand(bytes_tokenizer: str) -> Stand:
    policy = alternating(ANSWERS.__getitem__, lambda question: "I guess.\n#### 123456")
    return Stand(GSM8KEnv, policy, bytes_tokenizer, group_size=2, blocking_workers=1)


@pytest.mark.parametrize("text", ["#### 149", "First 168.\n#### 149", r"\boxed{149}", "#### 149.0", "####149"])
def test_the_right_number_pays_one(text: str) -> None:
    assert grade("14*12 = 168\n#### 149", text) == 1.0


@pytest.mark.parametrize("text", ["", "149", "#### 150", "#### 149\nno wait\n#### 150", "#### one hundred"])
def test_another_number_or_none_pays_nothing(text: str) -> None:
    assert grade("#### 149", text) == 0.0


def test_the_sample_is_right() -> None:
    for row in ROWS:
        steps = re.findall(r"<<(.+?)=(.+?)>>", row["answer"])
        assert steps
        assert all(eval(left) == pytest.approx(float(right)) for left, right in steps), row  # our own arithmetic
        assert grade(row["answer"], row["answer"]) == 1.0
        assert re.fullmatch(r"-?[0-9][0-9,]*(\.[0-9]+)?", gold_answer(row["answer"]))


async def test_process(stand: Stand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl", groups=2)

    assert [group["scores"] for group in groups] == [[1.0, 0.0]] * 2


async def test_serve(stand: Stand, rollout_server: RolloutServerProcess, tmp_path: Path) -> None:
    batch = await stand.leased(rollout_server, tmp_path / "run")

    assert [group.scores.tolist() for group in batch] == [[1.0, 0.0]] * 2


async def test_evaluate_asks_for_held_out_problems_only(stand: Stand, tmp_path: Path) -> None:
    metrics, samples = await stand.evaluated(tmp_path)

    assert metrics["heldout_reward"] == 1.0
    assert 0 < metrics["heldout_size"] == len(samples) < len(ROWS)


FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gsm8k": ({"question": "What is 1 + {n}?", "answer": "I add.\n#### {right}"}, {}),
    "meta_math": (
        {"query": "What is 1 + {n}?", "response": "I add.\nThe answer is: {right}", "original_question": "1 + {n}"},
        {},
    ),
    "big_math": ({"prompt": "What is 1 + {n}?", "solution": "{right}", "level": "Level 4"}, {"eval_split_ratio": 0.5}),
    "own": ({"prompt": "What is 1 + {n}?", "ground_truth": "{right}"}, {"loader": "rows"}),
}


def a_file_of(row: dict[str, Any], path: Path) -> Path:
    """Four problems in the columns of a row."""
    rows = [{name: text.format(n=n, right=n + 1) for name, text in row.items()} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def adding(text: str) -> str:
    return f"I add.\nFinal Answer: {int(text.removesuffix('?').split()[-1]) + 1}"


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("1,000", "So\nFinal Answer: 1000.", 1.0),
        ("1000", "So\nFinal Answer: $1,000", 1.0),
        ("0.5", r"So \boxed{\frac{1}{2}}", 1.0),
        ("Paris", "Final Answer: Paris", 1.0),
        ("Paris", "Final Answer: Rome", 0.0),
        ("18", "Of the 18\nFinal Answer: 17", 0.0),
        ("18", "I think 18", 0.0),
    ],
)
def test_bare_answers_are_compared_letter_by_letter_or_as_mathematics(answer: str, text: str, reward: float) -> None:
    assert grade_bare(answer, text) == reward


@pytest.mark.parametrize("name", FORMATS)
async def test_data_sets_of_every_format_are_asked_and_graded(name: str, bytes_tokenizer: str, tmp_path: Path) -> None:
    row, options = FORMATS[name]
    data = {"dataset_path": str(a_file_of(row, tmp_path / "rows.jsonl")), "eval_split_ratio": 0.25, **options}
    policy = alternating(adding, lambda text: adding(text) + "1")
    stand = Stand(GSM8KEnv, policy, bytes_tokenizer, group_size=2, data=data)

    groups = await stand.processed(tmp_path / "groups.jsonl", groups=2)
    metrics, samples = await stand.evaluated(tmp_path)

    assert [group["scores"] for group in groups] == [[1.0, 0.0]] * 2
    assert metrics == {"heldout_reward": 1.0, "heldout_size": 2 if name == "big_math" else 1}
    assert all(sample["gold_answer"] == str(int(sample["question"][-2]) + 1) for sample in samples)
    assert not [message for message in groups[0]["messages"] if "I add" in str(message[:-1])], (
        "the prompt has no solution"
    )


def test_data_is_read_as_word_problems_unless_it_names_another_loader() -> None:
    def loader(data: Any) -> str:
        found = GSM8KConfig.model_validate({"data": data}).data
        assert found is not None
        return found.loader

    assert loader({"dataset_path": "rows.jsonl"}) == "math"
    assert loader({"dataset_path": "rows.jsonl", "loader": "rows"}) == "rows"
    assert loader(DataConfig(dataset_path=Path("rows.jsonl"))) == "rows"


def test_data_and_source_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="data says what to read, and so does source, eval_source"):
        GSM8KConfig.model_validate({"data": {"dataset_path": "a.jsonl"}, "source": "b.jsonl", "eval_source": "c.jsonl"})


async def test_rows_that_cannot_be_judged_are_refused(bytes_tokenizer: str, tmp_path: Path) -> None:
    path = a_file_of({"prompt": "What is 1 + {n}?"}, tmp_path / "rows.jsonl")
    data = {"dataset_path": str(path), "loader": "rows"}

    with pytest.raises(ConfigError, match="columns prompt, source_id; expected prompt and ground_truth"):
        await Stand(GSM8KEnv, alternating(adding, adding), bytes_tokenizer, data=data).processed(tmp_path / "g.jsonl")


async def test_without_held_out_problems_nothing_is_evaluated(
    bytes_tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file_of(FORMATS["gsm8k"][0], tmp_path / "rows.jsonl")
    data = {"dataset_path": str(path), "eval_split_ratio": 0}
    stand = Stand(GSM8KEnv, alternating(adding, adding), bytes_tokenizer, data=data)

    async with AsyncExitStack() as stack:
        env = await stand.env(stack)
        await env.setup()
        assert await env.evaluate() == {}

    assert "nothing is evaluated" in caplog.text


@pytest.mark.parametrize("name", ["gsm8k_rlvr", "meta_math_rlvr"])
def test_the_recipes_name_a_command_that_works(name: str) -> None:
    recipe = (ROOT / "trainer" / "recipes" / "recipe" / f"{name}.yaml").read_text()
    [command] = re.findall(r"^# python -m environments\.gsm8k serve (.*)$", recipe, flags=re.M)

    config: Any = resolve(GSM8KEnv, shlex.split(command), mode_defaults={}).env

    values = yaml.safe_load(recipe)
    assert config.data.loader == "math"
    assert config.max_tokens == values["max_completion_length"]
    assert config.group_size == values.get("group_size", config.group_size)


async def test_check_env_finds_nothing(stand: Stand) -> None:
    stand.checked = SAMPLE.parents[1] / "env.py"

    assert await stand.check() == []


async def test_a_grader_that_fails_excludes_the_reply(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def pay(self: GSM8KEnv, problem: Problem, text: str) -> float:
        if "123456" in text:
            raise RolloutError("the grader died")
        return 1.0

    monkeypatch.setattr(GSM8KEnv, "pay", pay)
    stand.settings |= {"group_size": 4, "min_valid_per_group": 2, "ensure_scores_are_not_same": False}

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert group["scores"] == [1.0, 1.0]
