"""teacher_distillation: every token of a group gets the teacher's candidates, and the teacher measures the policy."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from atroposlib.envs.base import APIServerConfig, BaseEnv
from atroposlib.envs.server_pools import build_env
from atroposlib.testing.mock.generation import prompt_logprobs
from atroposlib.testing.mock_inference import MockInferenceServer
from atroposlib.type_definitions import MASKED
from environments.rows import load_rows
from environments.teacher_distillation import WordProblemsTeacherEnv
from environments.teacher_distillation.env import SAMPLE, Problem, reward
from tests.environments.running import Stand, alternating
from tests.processes import RolloutServerProcess

ROWS = load_rows(SAMPLE, fields={"question": str, "answer": int})
ANSWERS = {row["question"]: row["answer"] for row in ROWS}
TOP_K = 3


class TeacherStand(Stand):
    """With a second mock as the teacher; `teacher_faults` of its next answers fail."""

    teacher_faults = 0

    async def env(self, stack: AsyncExitStack, **settings: Any) -> BaseEnv:
        policy = self.mock = await stack.enter_async_context(MockInferenceServer(self.policy))
        teacher = await stack.enter_async_context(MockInferenceServer())
        teacher.faults.refuse = self.teacher_faults
        self.teacher = teacher
        config, _ = self.env_cls.config_init()
        config = type(config).model_validate({**config.model_dump(), **self.settings, **settings})
        policy_at, teacher_at = (
            [APIServerConfig(base_url=url, server_type="vllm", tokenizer_name=str(config.tokenizer_name), timeout=1)]
            for url in (policy.url, teacher.url)
        )
        env = build_env(self.env_cls, config, policy_at, {"teacher": teacher_at})
        stack.push_async_callback(env.aclose)
        return env


@pytest.fixture
def stand(bytes_tokenizer: str) -> TeacherStand:
    policy = alternating(lambda question: f"So it is.\nAnswer: {ANSWERS[question]}", lambda question: "Answer: -1")
    return TeacherStand(
        WordProblemsTeacherEnv, policy, bytes_tokenizer, group_size=2, teacher_top_k=TOP_K, blocking_workers=1
    )


PROBLEM = Problem("?", 1500)


@pytest.mark.parametrize("text", ["Answer: 1500", "answer:1,500", "Answer: 3\nNo.\nAnswer: 1500 g", "Answer: 1500."])
def test_the_right_answer_pays_one(text: str) -> None:
    assert reward(PROBLEM, text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1500",
        "Answer: 1500\nAnswer: 2",
        "Answer: many",
        "Answer: 15000",
        pytest.param("Answer: " + "9" * 5000, id="huge"),
    ],
)
def test_another_answer_or_none_pays_nothing(text: str) -> None:
    assert reward(PROBLEM, text) == 0.0


async def test_process_writes_the_teacher_s_candidates_of_every_token(stand: TeacherStand, tmp_path: Path) -> None:
    groups = await stand.processed(tmp_path / "groups.jsonl")

    for group in groups:
        assert group["scores"] == [1.0, 0.0]
        for tokens, ids, logprobs in zip(
            group["tokens"], group["distill_token_ids"], group["distill_logprobs"], strict=True
        ):
            assert len(ids) == len(logprobs) == len(tokens)
            assert [position[0] for position in ids[1:]] == tokens[1:], "the token itself comes first"
            expected = prompt_logprobs(tokens, TOP_K, 259)
            assert [set(position) for position in ids[1:]] == [set(column or ()) for column in expected[1:]]


async def test_serve_sends_them_to_the_trainer(
    stand: TeacherStand, rollout_server: RolloutServerProcess, tmp_path: Path
) -> None:
    batch = await stand.leased(rollout_server, tmp_path / "run")

    for group in batch:
        assert group.distill_token_ids is not None
        assert group.distill_logprobs is not None
        assert group.distill_token_ids.shape == group.distill_logprobs.shape
        assert group.distill_token_ids.shape[0] == group.n_tokens
        mask = group.loss_mask.astype(bool)
        assert (group.distill_token_ids[mask, 0] == group.tokens[mask]).all()
        assert (group.distill_logprobs[mask, 0] <= 0).all()


async def test_a_group_of_equal_rewards_is_sent_for_the_teacher_s_sake(stand: TeacherStand, tmp_path: Path) -> None:
    stand.policy = alternating(lambda question: "Hm.", lambda question: "Hm.")

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert group["scores"] == [0.0, 0.0]
    assert group["distill_logprobs"]


async def test_a_teacher_that_is_away_costs_its_column_and_no_reward(stand: TeacherStand, tmp_path: Path) -> None:
    stand.teacher_faults = 1_000

    [group] = await stand.processed(tmp_path / "groups.jsonl", groups=1)

    assert group["scores"] == [1.0, 0.0]
    assert not group.get("distill_logprobs")


async def test_evaluate_tells_how_probable_the_teacher_finds_the_policy_s_replies(
    stand: TeacherStand, tmp_path: Path
) -> None:
    metrics, samples = await stand.evaluated(tmp_path)

    assert metrics["heldout_reward"] == 1.0
    assert 0 < metrics["heldout_size"] == len(samples) < len(ROWS)
    assert metrics["heldout_teacher_logprob"] < 0
    assert len({json.dumps(sample["teacher_logprob"]) for sample in samples}) > 1


async def test_only_sampled_tokens_count_for_the_teacher_s_opinion(stand: TeacherStand) -> None:
    async with AsyncExitStack() as stack:
        env: Any = await stand.env(stack)
        tokens = [5, 6, 7, 8]

        logprob = await env.teacher_logprob(tokens, [MASKED, MASKED, 7, 8])

    columns = prompt_logprobs(tokens, 0, 259)
    expected = [(column or {})[token] for column, token in zip(columns, tokens, strict=True) if column]
    assert logprob == pytest.approx(sum(expected[1:]) / 2)


async def test_check_env_finds_nothing(stand: TeacherStand) -> None:
    assert await stand.check() == []
