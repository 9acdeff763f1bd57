"""One round of teaching between two servers: who is asked what, what is sent, and what becomes of failures."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from atroposlib.envs.base import APIServerConfig
from atroposlib.errors import ConfigError, RolloutError
from atroposlib.launch.heldout import Change, heldout_change
from atroposlib.rim.config import RIMConfig
from atroposlib.rim.result import RIMResult
from atroposlib.rim.trajectory import Trajectory
from atroposlib.teaching.diagnosis import DiagnosticResult
from atroposlib.teaching.env import TeacherEnv
from atroposlib.teaching.episode import TeachingItem
from atroposlib.teaching.errors import StudentFailedError, TeacherFailedError
from atroposlib.teaching.frozen_model import ChatReply, Sampling
from atroposlib.testing.mock_inference import MockInferenceServer
from atroposlib.type_definitions import MASKED
from tests.teaching.stand import (
    BAD,
    BASELINE,
    GOOD,
    ITEM,
    PROBE,
    TAUGHT,
    TEACH,
    TeachingStand,
    a_data_set,
    student_replies,
    teacher_replies,
)


@pytest.fixture
def stand(bytes_tokenizer: str) -> TeachingStand:
    return TeachingStand(bytes_tokenizer)


async def a_group(env: TeacherEnv, item: TeachingItem = ITEM) -> Any:
    group, backlog = await env.collect_trajectories(item)
    assert backlog == []
    return group


# Who is asked what


async def test_one_item_costs_one_probe_one_baseline_and_one_group_of_the_policy(stand: TeachingStand) -> None:
    async with stand.env() as env:
        group = await a_group(env)

    assert Counter(stand.asked) == {PROBE: 1, BASELINE: 2, TAUGHT: 4}
    assert len(stand.teacher.requests) == 1
    assert len(group["tokens"]) == 4


async def test_baselines_are_asked_once_for_an_item(stand: TeachingStand, tmp_path: Path) -> None:
    for _ in range(2):
        async with stand.env(run_dir=tmp_path) as env:
            await a_group(env)
            await a_group(env)

    assert Counter(stand.asked) == {PROBE: 4, BASELINE: 2, TAUGHT: 16}


async def test_the_student_is_asked_in_chats_and_the_policy_by_token_ids(stand: TeachingStand) -> None:
    async with stand.env() as env:
        await a_group(env)

    assert set(stand.teacher.routes) <= {"/inference/v1/generate", "/health", "/metrics", "/v1/models"}
    assert stand.student.routes["/v1/chat/completions"] == 7
    assert "/inference/v1/generate" not in stand.student.routes


async def test_lengths_and_temperatures_are_those_of_the_role(stand: TeachingStand) -> None:
    async with stand.env(temperature=0.9, student_temperature=0.3, max_guidance_tokens=77) as env:
        await a_group(env)

    limits = {kind: request["max_tokens"] for kind, request in zip(stand.asked, stand.student.requests, strict=True)}
    assert limits == {PROBE: 64, BASELINE: 256, TAUGHT: 256}
    assert {request["temperature"] for request in stand.student.requests} == {0.3}
    [asked] = stand.teacher.requests
    assert (asked["sampling_params"]["temperature"], asked["sampling_params"]["max_tokens"]) == (0.9, 77)


# What is sent


async def test_the_trained_tokens_are_those_that_the_policy_sampled_after_its_own_prompt(stand: TeachingStand) -> None:
    async with stand.env() as env:
        group = await a_group(env)
        tokenizer = env.tokenizer

    prompts = {tuple(token for token, mask in zip(*row, strict=True) if mask == MASKED) for row in columns(group)}
    assert len(prompts) == 1, "every member has the same prompt"
    assert f"{TEACH} {ITEM.question} | First add 20 and 22." in tokenizer.decode(prompts.pop())
    for tokens, masks in columns(group):
        sampled = [token for token, mask in zip(tokens, masks, strict=True) if mask != MASKED]
        assert sampled == [mask for mask in masks if mask != MASKED]
        text = tokenizer.decode(sampled, skip_special_tokens=True)
        assert text in (f"<teaching>{GOOD}</teaching>", BAD)
    assert all(
        len(row) == len(tokens) for row, tokens in zip(group["inference_logprobs"], group["tokens"], strict=True)
    )
    assert group["finish_reasons"] == ["stop"] * 4
    for runs, tokens in zip(group["policy_versions"], group["tokens"], strict=True):
        assert [version for version, _ in runs] == [-1, 0], "nobody sampled the prompt; version 0 sampled the rest"
        assert sum(length for _, length in runs) == len(tokens)


def columns(group: Any) -> list[tuple[list[int], list[int]]]:
    return list(zip(group["tokens"], group["masks"], strict=True))


async def test_guidance_that_helps_is_paid_by_its_length(stand: TeachingStand) -> None:
    async with stand.env() as env:
        group = await a_group(env)

    helped = 1 + 100 / (100 + len(GOOD))
    assert group["scores"] == pytest.approx([helped, 0.0, helped, 0.0])


async def test_the_whole_text_counts_where_the_scope_says_so(stand: TeachingStand) -> None:
    async with stand.env(teaching_length_scope="full") as env:
        group = await a_group(env)

    length = len(f"<teaching>{GOOD}</teaching>") + 1
    assert group["scores"][0] == pytest.approx(1 + 100 / (100 + length))


async def test_harm_costs_the_multiplier(stand: TeachingStand) -> None:
    stand.student.policy = student_replies(unaided="42")
    async with stand.env(degradation_penalty_multiplier=3.0) as env:
        group = await a_group(env)

    assert group["scores"] == [0.0, -3.0, 0.0, -3.0]


async def test_messages_and_diagnostics_travel_with_the_group(stand: TeachingStand) -> None:
    async with stand.env() as env:
        group = await a_group(env)

    about, members = group["group_overrides"]["teaching"], [one["teaching"] for one in group["overrides"]]
    assert group["messages"][0][-1] == {"role": "assistant", "content": f"<teaching>{GOOD}</teaching>"}
    assert about["baseline_score"] == 0.0
    assert about["diagnosis"]["capability_level"] == 0.0
    assert about["diagnosis"]["tier"] == "low"
    assert [one["answers"] for one in members] == [["42"], ["41"], ["42"], ["41"]]
    json.dumps(group)
    assert group["generation_params"]["temperature"] == 1.0


async def test_the_student_never_sees_the_private_thoughts(stand: TeachingStand) -> None:
    stand.teacher.policy = teacher_replies(f"<thinking>secret</thinking><teaching>{GOOD}</teaching>")
    async with stand.env() as env:
        await a_group(env)

    assert not any("secret" in request["messages"][-1]["content"] for request in stand.student.requests)


@pytest.mark.parametrize(("policy", "reward"), [("zero", 0.0), ("cap", 0.3), ("off", None)])
async def test_stating_the_answer_is_not_paid(stand: TeachingStand, policy: str, reward: float | None) -> None:
    stand.teacher.policy = teacher_replies("Say 42.", GOOD)
    stand.student.policy = student_replies(taught=lambda _: "42")
    async with stand.env(leak_policy=policy) as env:
        group = await a_group(env)

    full = 1 + 100 / (100 + len("Say 42."))
    assert group["scores"][0] == pytest.approx(full if reward is None else reward)
    assert group["scores"][1] > 1
    assert [one["teaching"]["is_leak"] for one in group["overrides"]] == [True, False, True, False]


async def test_several_attempts_are_averaged(stand: TeachingStand) -> None:
    answers = iter(["42", "41"] * 4)
    stand.student.policy = student_replies(taught=lambda _: next(answers))
    async with stand.env(student_samples_per_guidance=2, efficiency_weight=0.0) as env:
        group = await a_group(env)

    assert Counter(stand.asked)[TAUGHT] == 8
    assert sum(group["scores"]) == pytest.approx(2.0)


# Failures are no reward


async def test_a_student_that_fails_for_one_guidance_costs_that_member_and_pays_nothing(
    stand: TeachingStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stand.env(min_valid_per_group=2) as env:
        ask, failed = env.student.reply, list[str]()

        async def failing(prompt: str, sampling: Sampling) -> ChatReply:
            if prompt.startswith(TAUGHT) and not failed:
                failed.append(prompt)
                raise StudentFailedError("down")
            return await ask(prompt, sampling)

        monkeypatch.setattr(env.student, "reply", failing)
        group = await a_group(env)

    assert failed
    assert len(group["tokens"]) == 3
    assert len({len(group[name]) for name in ("tokens", "masks", "scores", "overrides", "messages")}) == 1


async def test_a_dead_student_is_no_group(stand: TeachingStand) -> None:
    stand.student.faults.refuse = 10_000
    stand.timeout_s = 1
    async with stand.env() as env:
        with pytest.raises(RolloutError, match="student"):
            await env.collect_trajectories(ITEM)

    assert stand.teacher.requests == []


async def test_a_student_that_dies_after_the_probe_is_no_group(
    stand: TeachingStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stand.env() as env:
        ask = env.student.reply

        async def failing(prompt: str, sampling: Sampling) -> ChatReply:
            if prompt.startswith(TAUGHT):
                raise StudentFailedError("down")
            return await ask(prompt, sampling)

        monkeypatch.setattr(env.student, "reply", failing)
        with pytest.raises(RolloutError, match="0 of 4 guidances could be paid"):
            await env.collect_trajectories(ITEM)
        metrics = env.teaching_metrics.take()

    assert metrics == {"teaching/dropped_too_few_valid": 1.0}


async def test_incomplete_baselines_are_used_and_not_kept(
    stand: TeachingStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stand.env(num_baseline_samples=3) as env:
        ask, failed = env.student.reply, list[str]()

        async def failing(prompt: str, sampling: Sampling) -> ChatReply:
            if prompt.startswith(BASELINE) and not failed:
                failed.append(prompt)
                raise StudentFailedError("down")
            return await ask(prompt, sampling)

        monkeypatch.setattr(env.student, "reply", failing)
        for _ in range(3):
            await a_group(env)

    assert Counter(stand.asked)[BASELINE] == 2 + 3, "asked again after the attempt that failed, then kept"


# Items that give no group


async def test_an_item_without_ground_truth_is_left_out_and_counted(stand: TeachingStand) -> None:
    async with stand.env() as env:
        assert await a_group(env, TeachingItem("Why?")) is None
        metrics = env.teaching_metrics.take()

    assert metrics == {"teaching/dropped_no_ground_truth": 1.0}
    assert stand.student.requests == []


async def test_a_prompt_that_is_too_long_is_left_out_and_counted(stand: TeachingStand) -> None:
    async with stand.env(max_prompt_length=40) as env:
        assert await a_group(env) is None
        metrics = env.teaching_metrics.take()

    assert metrics == {"teaching/dropped_prompt_too_long": 1.0}
    assert stand.teacher.requests == []


async def test_a_group_of_equal_rewards_is_dropped_as_one(stand: TeachingStand) -> None:
    stand.teacher.policy = teacher_replies(BAD)
    async with stand.env() as env:
        group = await a_group(env)

    assert len(set(group["scores"])) == 1


# A reference teacher


async def test_rewards_are_what_a_guidance_is_better_than_the_reference_teacher_s(stand: TeachingStand) -> None:
    stand.reference.policy = teacher_replies(GOOD)
    async with stand.env(use_reference_teacher_model=True) as env:
        group = await a_group(env)

    helped = 1 + 100 / (100 + len(GOOD))
    assert group["scores"] == pytest.approx([0.0, -helped, 0.0, -helped])
    assert stand.reference.routes["/v1/chat/completions"] == 1
    assert Counter(stand.asked)[TAUGHT] == 5


async def test_the_reference_is_judged_together_with_the_others(stand: TeachingStand) -> None:
    stand.reference.policy = teacher_replies(GOOD)
    settings = {"teaching_reward_mode": "rim", "rim": RIM.model_dump(), "use_reference_teacher_model": True}
    async with stand.env(**settings) as env:
        judges = judged_by(env)
        group = await a_group(env)

    assert group["scores"] == [0.0, -0.5, 0.0, -0.5]
    assert judges.batches == [5]


async def test_a_reference_that_judges_cannot_judge_is_no_group(stand: TeachingStand) -> None:
    stand.reference.policy = teacher_replies("<teaching></teaching>")
    settings = {"teaching_reward_mode": "rim", "rim": RIM.model_dump(), "use_reference_teacher_model": True}
    async with stand.env(**settings) as env:
        judged_by(env)
        with pytest.raises(RolloutError, match="nothing to compare with"):
            await env.collect_trajectories(ITEM)


async def test_a_dead_reference_teacher_is_no_group(stand: TeachingStand) -> None:
    async with stand.env(use_reference_teacher_model=True) as env:
        assert env.reference is not None
        env.reference.server.servers[0].config.timeout = 1
        stand.reference.faults.refuse = 10_000
        with pytest.raises(RolloutError, match="reference teacher"):
            await env.collect_trajectories(ITEM)


# Judges


class ScriptedJudges:
    """Pays what the teaching says; None where it says nothing."""

    def __init__(self) -> None:
        self.seen: list[Trajectory] = []
        self.batches: list[int] = []

    async def score(self, trajectories: Sequence[Trajectory]) -> list[RIMResult]:
        self.seen += trajectories
        self.batches.append(len(trajectories))
        return [
            RIMResult(None)
            if not case.teacher_trace
            else RIMResult(
                0.75 if case.teacher_trace == GOOD else 0.25, {"process": 0.5}, {"process": "fine"}, escalations=1
            )
            for case in trajectories
        ]

    async def wait_until_well(self, deadline_s: float) -> None:
        return

    async def close(self) -> None:
        return


def judged_by(env: TeacherEnv) -> ScriptedJudges:
    judges = ScriptedJudges()
    env.rim = env.payment._judges = cast("Any", judges)
    return judges


RIM = RIMConfig.model_validate({"models": {"small_model": "http://127.0.0.1:9/v1#judge"}})


async def test_judges_pay_and_see_the_whole_trajectory(stand: TeachingStand) -> None:
    async with stand.env(teaching_reward_mode="rim", rim=RIM.model_dump()) as env:
        judges = judged_by(env)
        group = await a_group(env)

    assert group["scores"] == [0.75, 0.25, 0.75, 0.25]
    assert judges.seen[0] == Trajectory(
        question=ITEM.question,
        student_answer="42",
        ground_truth="42",
        student_plan="First add 20 and 22.",
        teacher_trace=GOOD,
        student_trace="The answer is 42",
        student_baseline_answer="41",
    )
    assert group["overrides"][0]["teaching"]["rim_rewards"] == {"process": 0.5}
    assert group["overrides"][0]["teaching"]["rim_explanations"] == {"process": "fine"}


async def test_what_judges_cannot_judge_is_left_out(stand: TeachingStand) -> None:
    stand.teacher.policy = teacher_replies(GOOD, "<teaching></teaching>")
    async with stand.env(teaching_reward_mode="rim", rim=RIM.model_dump(), min_valid_per_group=2) as env:
        judged_by(env)
        group = await a_group(env)

    assert group["scores"] == [0.75, 0.75]


async def test_judges_need_no_ground_truth(stand: TeachingStand) -> None:
    async with stand.env(teaching_reward_mode="rim", rim=RIM.model_dump(), capability_estimator="none") as env:
        judged_by(env)
        group = await a_group(env, TeachingItem("Why?"))

    assert group["scores"] == [0.75, 0.25, 0.75, 0.25]


# Figures and records


async def test_the_figures_of_a_group(stand: TeachingStand) -> None:
    async with stand.env() as env:
        await a_group(env)
        metrics = env.teaching_metrics.take()

    assert metrics["teaching/student_accuracy"] == 0.5
    assert metrics["teaching/baseline_accuracy"] == 0.0
    assert metrics["teaching/accuracy_delta"] == 0.5
    assert metrics["teaching/improvement_rate"] == 0.5
    assert metrics["teaching/degradation_rate"] == 0.0
    assert metrics["teaching/non_degrade_rate"] == 1.0
    assert metrics["teaching/teaching_length_mean"] == (len(GOOD) + len(BAD)) / 2
    assert metrics["teaching/teaching_length_std"] == (len(GOOD) - len(BAD)) / 2
    assert metrics["teaching/student_approach_length"] == len("First add 20 and 22.") + 1
    reward = (1 + 100 / (100 + len(GOOD))) / 2
    assert metrics["teaching/token_efficiency"] == pytest.approx(
        reward / (metrics["teaching/teaching_length_mean"] / 100)
    )


async def test_the_log_has_them_once(stand: TeachingStand) -> None:
    seen: list[dict[str, Any]] = []
    async with stand.env() as env:
        env.metrics_sink = seen.append
        await a_group(env)
        await env.wandb_log()
        await env.wandb_log()

    assert seen[0]["teaching/student_accuracy"] == 0.5
    assert seen[0]["teaching/student_requests"] == 7
    assert "teaching/student_accuracy" not in seen[1]


@pytest.mark.parametrize(("probability", "rows"), [(1.0, 2), (0.0, 0)])
async def test_groups_are_written_in_full_with_the_asked_probability(
    stand: TeachingStand, tmp_path: Path, probability: float, rows: int
) -> None:
    async with stand.env(run_dir=tmp_path, logging_prob=probability) as env:
        await a_group(env)
        await a_group(env)

    path = tmp_path / "episodes.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    assert len(lines) == rows
    for line in lines:
        episode = json.loads(line)
        assert (episode["approach"], len(episode["lessons"])) == ("First add 20 and 22.", 4)
        assert episode["lessons"][0]["solutions"][0]["reply"]["text"] == "The answer is 42"


async def test_guidance_that_worked_is_kept(stand: TeachingStand, tmp_path: Path) -> None:
    for _ in range(2):
        async with stand.env(run_dir=tmp_path) as env:
            await a_group(env)

    files = sorted((tmp_path / "successful_teaching").glob("*.json"))
    assert len(files) == 4, "two of each group, and those of the first start are still there"
    kept = json.loads(files[0].read_text())
    assert kept["teaching"] == GOOD
    assert kept["reward"] >= 1.0
    assert {
        "step",
        "prompt",
        "approach",
        "full_response",
        "baseline_solutions",
        "solutions",
        "ground_truth",
    } <= kept.keys()


async def test_a_group_that_cannot_be_recorded_is_a_group(
    stand: TeachingStand, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "episodes.jsonl").mkdir()
    async with stand.env(run_dir=tmp_path, logging_prob=1.0) as env:
        group = await a_group(env)

    assert len(group["scores"]) == 4
    assert "not recorded in full" in caplog.text


async def test_half_a_surrogate_pair_in_a_reply_costs_nothing(
    stand: TeachingStand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stand.env(run_dir=tmp_path, logging_prob=1.0) as env:
        ask = env.student.server.chat_completion

        async def torn(**arguments: Any) -> Any:
            answer = await ask(**arguments)
            message = answer.choices[0].message
            message.content = f"{message.content} \ud83d"
            return answer

        monkeypatch.setattr(env.student.server, "chat_completion", torn)
        group = await a_group(env)

    [episode] = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert episode["approach"] == "First add 20 and 22. ?"
    assert group["scores"][0] > 0


async def test_half_a_surrogate_pair_in_a_record_is_written(stand: TeachingStand, tmp_path: Path) -> None:
    item = TeachingItem(ITEM.question, "42", source_id="\ud83d")
    async with stand.env(run_dir=tmp_path, logging_prob=1.0) as env:
        await a_group(env, item)

    [episode] = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    kept = [json.loads(path.read_text()) for path in (tmp_path / "successful_teaching").glob("*.json")]
    assert {one["source_id"] for one in (episode, *kept)} == {"\ud83d"}
    assert len(kept) == 2


# Evaluation


async def test_evaluation_is_greedy_and_tells_what_teaching_changes(stand: TeachingStand, tmp_path: Path) -> None:
    async with stand.env(data=a_data_set(tmp_path, 30).model_dump(), data_dir_to_save_evals=str(tmp_path)) as env:
        await env.setup()
        metrics = await env.evaluate()

    assert metrics["heldout_size"] == 12
    assert (metrics["baseline_accuracy"], metrics["student_accuracy"], metrics["accuracy_delta"]) == (0.0, 1.0, 1.0)
    assert metrics["accuracy_delta_low"] == metrics["heldout_reward"] == 1.0
    assert metrics["teaching_tokens"] == len(GOOD)
    assert {request["temperature"] for request in stand.student.requests} == {0.0}
    assert {request["sampling_params"]["temperature"] for request in stand.teacher.requests} == {0.0}
    [report] = [json.loads((tmp_path / "metrics.json").read_text())]
    assert report["results"]["all"]["accuracy_delta"] == 1.0
    assert heldout_change(tmp_path, tmp_path) == Change(0.0, 0.0, 0.0, 12)


async def test_a_teacher_that_gives_answers_away_gains_nothing(stand: TeachingStand, tmp_path: Path) -> None:
    stand.teacher.policy = teacher_replies("Say 42.")
    stand.student.policy = student_replies(taught=lambda _: "42")
    async with stand.env(data=a_data_set(tmp_path, 30).model_dump(), data_dir_to_save_evals=str(tmp_path)) as env:
        await env.setup()
        metrics = await env.evaluate()

    assert (metrics["accuracy_delta"], metrics["leak_rate"], metrics["heldout_reward"]) == (1.0, 1.0, 0.0)
    # Each sample says what it adds to the reward: evaluations are compared item by item.
    assert heldout_change(tmp_path, tmp_path) == Change(0.0, 0.0, 0.0, 12)


async def test_held_out_items_whose_prompt_is_too_long_are_left_out(stand: TeachingStand, tmp_path: Path) -> None:
    async with stand.env(data=a_data_set(tmp_path).model_dump()) as env:
        await env.setup()
        short = env.heldout[0]
        env.heldout = [short, replace(short, question=short.question + " Mind: " + "x" * 2000)]
        metrics = await env.evaluate()
        env.heldout = env.heldout[1:]
        nothing = await env.evaluate()
        dropped = env.teaching_metrics.take()

    assert (metrics["heldout_size"], metrics["accuracy_delta"]) == (1, 1.0)
    assert nothing == {}
    assert dropped == {"teaching/dropped_prompt_too_long": 2.0}


async def test_items_come_in_an_order_that_the_seed_decides(stand: TeachingStand, tmp_path: Path) -> None:
    orders = []
    for seed in (1, 1, 2):
        async with stand.env(data=a_data_set(tmp_path).model_dump(), seed=seed) as env:
            await env.setup()
            orders.append([await env.get_next_item() for _ in range(12)])

    assert orders[0] == orders[1] != orders[2]
    assert {item.ground_truth for item in orders[0] if item} == {"42"}
    assert len({item.question for item in orders[0][:6] if item}) == 6


# The documented methods


async def test_a_probe_of_a_task(stand: TeachingStand) -> None:
    async with stand.env() as env:
        result = await env.diagnostic_probe("What is 20 + 22?")

    [asked] = stand.student.requests
    assert asked["max_tokens"] == 50
    assert (result.capability_level, result.confidence_score) == (0.5, 0.0)
    assert result.probe_tokens == len("First add 20 and 22.") + 1
    assert result.response_quality["on_topic"] == 1.0


async def test_guidance_for_a_diagnosis(stand: TeachingStand) -> None:
    async with stand.env() as env:
        guidance = await env.generate_guidance(ITEM.question, await env.diagnostic_probe(ITEM.question))

    [asked] = stand.teacher.requests
    assert guidance == GOOD
    assert asked["sampling_params"]["max_tokens"] == 200


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((7, 0), TypeError),
        (("task", "50"), TypeError),
        (("task", True), TypeError),
        (("", 50), ValueError),
        ((" \n", 50), ValueError),
        (("task", 0), ValueError),
    ],
)
async def test_a_probe_refuses_bad_arguments(stand: TeachingStand, arguments: Any, error: type[Exception]) -> None:
    async with stand.env() as env:
        with pytest.raises(error):
            await env.diagnostic_probe(*arguments)


async def test_the_least_lengths_are_accepted_and_arguments_may_be_named(stand: TeachingStand) -> None:
    stand.teacher.policy = teacher_replies(BAD)
    async with stand.env() as env:
        diagnosis = await env.diagnostic_probe(task="What is 20 + 22?", max_tokens=1)
        await env.generate_guidance(task="What is 20 + 22?", diagnostic=diagnosis, max_tokens=10)

    assert [request["max_tokens"] for request in stand.student.requests] == [1]
    assert [request["sampling_params"]["max_tokens"] for request in stand.teacher.requests] == [10]


async def test_the_teacher_is_told_what_the_diagnosis_found(stand: TeachingStand) -> None:
    told = TEACH + " {question} {approach} / {tier} / {capability_level} / {identified_gaps}"
    async with stand.env(teacher_adaptive_template=told) as env:
        group = await a_group(env, TeachingItem(ITEM.question, "42", context={"tool": "abacus"}))
        level: Any = np.float32(0.91666)
        diagnosis = DiagnosticResult(level, 0.5, ["units", "signs"], {}, 3, "Add.")
        await env.generate_guidance("task", diagnosis)
        prompts = [env.tokenizer.decode(request["token_ids"]) for request in stand.teacher.requests]

    assert group["group_overrides"]["teaching"]["diagnosis"]["tier"] == "low"
    assert "First add 20 and 22. / low / 0.0 / []" in prompts[0]
    assert 'Add. / high / 0.92 / ["units", "signs"]' in prompts[1]


async def test_guidance_refuses_bad_arguments(stand: TeachingStand) -> None:
    async with stand.env() as env:
        diagnosis = await env.diagnostic_probe("task")
        for arguments, error in [
            ((7, None, 0), TypeError),
            (("task", "diagnosis", 200), TypeError),
            (("task", None, 200), ValueError),
            (("task", diagnosis, 9), ValueError),
            (("", diagnosis, 200), ValueError),
        ]:
            with pytest.raises(error):
                await env.generate_guidance(*arguments)  # type: ignore[arg-type]
    assert stand.teacher.requests == []


async def test_servers_that_fail_are_a_runtime_error_with_its_cause(stand: TeachingStand) -> None:
    async with stand.env() as env:
        diagnosis = await env.diagnostic_probe("task")
        for manager in (env.server, env.student.server):
            manager.servers[0].config.timeout = 1
        stand.teacher.faults.refuse = stand.student.faults.refuse = 10_000
        with pytest.raises(RuntimeError, match="student") as probing:
            await env.diagnostic_probe("task")
        with pytest.raises(RuntimeError, match="teacher") as guiding:
            await env.generate_guidance("task", diagnosis)

    assert isinstance(probing.value.__cause__, RolloutError)
    assert isinstance(guiding.value.__cause__, RolloutError)


@pytest.mark.parametrize("status", [404, 401])
async def test_servers_that_refuse_are_a_runtime_error_with_its_cause(
    stand: TeachingStand, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    async def refuse(method: str, path: str, body: dict[str, Any]) -> Any:
        return status, {"error": {"message": "no such model, or no such key"}}

    async with stand.env() as env:
        diagnosis = await env.diagnostic_probe("task")
        for server in (stand.teacher, stand.student):
            monkeypatch.setattr(server, "_answer", refuse)
        with pytest.raises(RuntimeError, match=f"the student could not be asked: .*answered {status}") as probing:
            await env.diagnostic_probe("task")
        with pytest.raises(RuntimeError, match=f"the teacher could not be asked: .*answered {status}") as guiding:
            await env.generate_guidance("task", diagnosis)

    assert isinstance(probing.value, StudentFailedError)
    assert isinstance(guiding.value, TeacherFailedError)
    assert isinstance(probing.value.__cause__, ConfigError)
    assert isinstance(guiding.value.__cause__, ConfigError)


async def test_a_teacher_that_writes_nothing_is_a_runtime_error(stand: TeachingStand) -> None:
    stand.teacher.policy = teacher_replies("<thinking>hm</thinking>")
    async with stand.env() as env:
        diagnosis = await env.diagnostic_probe("task")
        with pytest.raises(RuntimeError, match="wrote nothing"):
            await env.generate_guidance("task", diagnosis)


async def test_the_reward_of_the_environment_is_that_of_its_options(stand: TeachingStand) -> None:
    async with stand.env(degradation_penalty_multiplier=3.0) as env:
        assert env.compute_teaching_reward(0.8, 0.6, 120) == pytest.approx(-0.6)
        with pytest.raises(TypeError):
            env.compute_teaching_reward("0.8", 0.6, 120)  # type: ignore[arg-type]


# Construction, the end


async def test_a_server_that_fails_to_close_leaves_nothing_else_open(
    stand: TeachingStand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing() -> None:
        raise OSError("cannot close")

    async with stand.env(run_dir=tmp_path, use_reference_teacher_model=True) as env:
        closed: list[bool] = []
        reference = env.reference
        assert reference is not None
        close = reference.server.close

        async def noted() -> None:
            closed.append(True)
            await close()

        with monkeypatch.context() as patched:
            patched.setattr(env.student.server, "close", failing)
            patched.setattr(reference.server, "close", noted)
            with pytest.raises(OSError, match="cannot close"):
                await env.aclose()
        assert closed == [True]
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            env.protocol.cache._connection.execute("SELECT 1")


async def test_without_a_student_it_does_not_start(stand: TeachingStand) -> None:
    with pytest.raises(ConfigError, match=r"--student\.base_url"):
        TeacherEnv(stand.config(), [APIServerConfig(base_url="http://127.0.0.1:1/v1", server_type="vllm")])


async def test_a_template_without_its_variable_stops_it_at_the_start(stand: TeachingStand) -> None:
    stand.settings["student_with_teaching_template"] = "{question}"

    with pytest.raises(ConfigError, match=r"student_with_teaching_template must contain \{teaching\}"):
        async with stand.env():
            pass


async def test_without_a_tokenizer_it_does_not_start(stand: TeachingStand) -> None:
    with pytest.raises(ConfigError, match="tokenizer_name"):
        async with stand.env(tokenizer_name=None):
            pass


async def test_additive_rewards_are_warned_of(stand: TeachingStand, caplog: pytest.LogCaptureFixture) -> None:
    async with stand.env(teaching_reward_mode="additive"):
        assert "not to train" in caplog.text


@pytest.mark.parametrize(
    ("settings", "is_warned_of"),
    [
        ({"degradation_penalty_multiplier": 1.0}, True),
        ({"degradation_penalty_multiplier": 1.0, "efficiency_weight": 0.0}, False),
        ({"degradation_penalty_multiplier": 2.0, "efficiency_weight": 1.5}, True),
        ({}, False),
        ({"degradation_penalty_multiplier": 0.5, "teaching_reward_mode": "outcome"}, False),
    ],
)
async def test_harm_that_costs_less_than_help_pays_is_warned_of(
    stand: TeachingStand, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], is_warned_of: bool
) -> None:
    async with stand.env(**settings):
        assert ("makes harm cost less" in caplog.text) is is_warned_of


async def test_what_harm_must_cost_is_named(stand: TeachingStand, caplog: pytest.LogCaptureFixture) -> None:
    async with stand.env(degradation_penalty_multiplier=2.0, efficiency_weight=1.5):
        assert "1 + efficiency_weight = 2.5" in caplog.text


async def test_answers_that_are_asked_for_in_different_forms_are_warned_of(
    stand: TeachingStand, caplog: pytest.LogCaptureFixture
) -> None:
    async with stand.env():
        assert "the form is what guidance is paid for" not in caplog.text
    async with stand.env(student_baseline_template="{question} Put it in \\boxed{}."):
        assert "student_baseline_template asks for the answer by \\boxed" in caplog.text
        assert "the form is what guidance is paid for" in caplog.text


async def test_two_groups_at_once_do_not_get_in_each_other_s_way(stand: TeachingStand) -> None:
    items = [TeachingItem(f"What is {i} + 22?", "42") for i in range(4)]
    async with stand.env() as env:
        groups = await asyncio.gather(*(a_group(env, item) for item in items))

    asked = [group["group_overrides"]["teaching"]["question"] for group in groups]
    assert asked == [item.question for item in items]
    assert isinstance(stand.student, MockInferenceServer)
