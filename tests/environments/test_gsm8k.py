"""gsm8k: the right number pays, graded on processes; the sample's arithmetic is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from atroposlib.envs.reward_fns.answers import gold_answer
from atroposlib.errors import RolloutError
from environments.gsm8k import GSM8KEnv, Problem
from environments.gsm8k.env import FIELDS, SAMPLE
from environments.gsm8k.grading import grade
from environments.rows import load_rows
from tests.environments.running import Stand, alternating
from tests.processes import RolloutServerProcess

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
