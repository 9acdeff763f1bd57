"""instruction_following: each checker says yes and no, and the reward is what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from environments.instruction_following import Instruction, InstructionFollowingConfig, InstructionFollowingEnv
from environments.instruction_following.constraints import CHECKERS, is_met, validated
from environments.instruction_following.env import FIELDS, SAMPLE, met
from environments.rows import load_rows
from tests.environments.running import Stand, alternating
from tests.processes import RolloutServerProcess

ROWS = load_rows(SAMPLE, fields={**FIELDS, "reply": str})
REPLIES = {row["prompt"]: row["reply"] for row in ROWS}
MEETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "words": ({"at_least": 2, "at_most": 3}, "it's well-known", "one"),
    "sentences": ({"at_most": 1}, "Pi is 3.14 or so.", "One. Two."),
    "paragraphs": ({"exactly": 2}, "a\nb\n \nc\n", "a\nb"),
    "bullets": ({"exactly": 2}, "- a\n* b\n-c", "- a"),
    "numbered": ({"exactly": 2}, "1. a\n2) b", "1. a\n3. b"),
    "headings": ({"at_least": 1}, "## a", "#a"),
    "contains": ({"words": ["cat"], "times": 2}, "Cat, cat!", "cat category"),
    "avoids": ({"words": ["cat"]}, "concatenate", "The CAT."),
    "starts_with": ({"phrase": "Well,"}, " Well, no", "well, no"),
    "ends_with": ({"phrase": "end."}, "the end.\n", "the end"),
    "lowercase": ({}, "a 1!", "123"),
    "uppercase": ({}, "A 1!", "Aa"),
    "capital_words": ({"at_least": 1}, "I am OK", "I am"),
    "without_commas": ({}, "a; b", "a, b"),
    "letter": ({"letter": "e", "at_most": 1}, "E", "eE"),
    "placeholders": ({"at_least": 2}, "[a] [b c]", "[a] []"),
    "json_object": ({"keys": ["a"]}, '```json\n{"a": 1}\n```', '{"a": 1, "b": 2}'),
    "quoted": ({}, '"a"', '"a" b'),
}


@pytest.fixture
def stand(bytes_tokenizer: str) -> Stand:
    policy = alternating(REPLIES.__getitem__, lambda prompt: "")
    return Stand(InstructionFollowingEnv, policy, bytes_tokenizer, group_size=2)


@pytest.mark.parametrize("kind", CHECKERS)
def test_each_checker_tells_yes_from_no(kind: str) -> None:
    arguments, yes, no = MEETS[kind]
    constraint = {"kind": kind, **arguments}

    assert is_met(constraint, yes)
    assert not is_met(constraint, no)
    assert not is_met(constraint, " "), "saying nothing follows no instruction"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": }', "[1]", "null", 'Sure: {"a": 1}'])
def test_what_is_no_object_is_not_json(text: str) -> None:
    assert not is_met({"kind": "json_object", "keys": ["a"]}, text)


@pytest.mark.parametrize(
    ("constraint", "complaint"),
    [
        ({"kind": "rhymes"}, "unknown constraint"),
        ({"kind": "bullets"}, "exactly"),
        ({"kind": "words", "most": 3}, "most"),
        ("words", "unknown constraint"),
    ],
)
def test_a_constraint_that_nobody_can_check_is_refused(constraint: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        validated([constraint])
    with pytest.raises(ConfigError, match="at least one"):
        validated([])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["prompt"][:20])
def test_the_sample_can_be_followed(row: dict[str, Any]) -> None:
    assert all(met(Instruction(row["prompt"], validated(row["constraints"])), row["reply"]))


def test_thinking_does_not_count_and_the_reward_is_a_share_or_all() -> None:
    instruction = Instruction("p", ({"kind": "lowercase"}, {"kind": "words", "at_most": 1}))
    servers = InstructionFollowingEnv.config_init()[1]

    def pay(text: str, reward: Any) -> float:
        config = InstructionFollowingConfig(tokenizer_name=None, reward=reward)
        return InstructionFollowingEnv(config, servers).pay(instruction, text)

    assert pay("<think>A LOT, really</think>yes", "all") == 1.0
    assert (pay("two words", "share"), pay("two words", "all")) == (0.5, 0.0)


async def test_process(stand: Stand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl")

    assert [group["scores"] for group in groups] == [[1.0, 0.0]] * 2


async def test_serve(stand: Stand, rollout_server: RolloutServerProcess, tmp_path: Path) -> None:
    batch = await stand.leased(rollout_server, tmp_path / "run")

    assert [group.scores.tolist() for group in batch] == [[1.0, 0.0]] * 2


async def test_evaluate(stand: Stand, tmp_path: Path) -> None:
    metrics, samples = await stand.evaluated(tmp_path)

    assert (metrics["heldout_reward"], metrics["heldout_constraints_met"], metrics["heldout_all_met"]) == (1, 1, 1)
    assert 0 < metrics["heldout_size"] == len(samples) < len(ROWS)


async def test_check_env_finds_nothing(stand: Stand) -> None:
    assert await stand.check() == []
