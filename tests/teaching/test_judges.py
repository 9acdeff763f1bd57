"""Judges in the teacher protocol: what they say of the student's approach, what they cost, and what becomes of failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from atroposlib.teaching.diagnosis import UNKNOWN, Capability
from atroposlib.teaching.episode import TeachingItem
from atroposlib.teaching.scoring import judged_capability
from tests.rim.judges import Asked, ScriptedJudge, verdict
from tests.teaching.stand import ITEM, TeachingStand, a_data_set


@pytest.fixture
def stand(bytes_tokenizer: str) -> TeachingStand:
    return TeachingStand(bytes_tokenizer)


def settings(judge: ScriptedJudge, **rim: Any) -> dict[str, Any]:
    """An environment whose diagnostic judge says how able the student is."""
    return {"capability_estimator": "judge", "rim": judge.config(judge_retries=0, **rim).model_dump()}


@pytest.mark.parametrize(
    ("said", "expected"), [(verdict(0.8, 0.2), (0.8, 0.8)), ("no idea", (UNKNOWN.level, UNKNOWN.confidence))]
)
async def test_a_judge_says_how_able_the_student_is_unless_it_abstains(
    stand: TeachingStand, said: Any, expected: tuple[float, float]
) -> None:
    async with ScriptedJudge(lambda asked: said) as judge, stand.env(**settings(judge)) as env:
        found = await env.diagnostic_probe(ITEM.question)

    assert (found.capability_level, found.confidence_score) == expected
    assert {asked.judge for asked in judge.calls} == {"diagnostic"}
    assert "First add 20 and 22." in judge.calls[0].prompt


async def test_after_an_escalation_the_large_model_says_how_sure_it_is(stand: TeachingStand) -> None:
    def doubtful(asked: Asked) -> Any:
        return verdict(0.9, 0.25) if asked.is_large else verdict(0.2, 0.6)

    async with ScriptedJudge(doubtful) as judge, stand.env(**settings(judge)) as env:
        found = await env.diagnostic_probe(ITEM.question)

    assert (found.capability_level, found.confidence_score) == (0.9, 0.75)


async def test_where_unaided_attempts_are_scored_no_judge_is_asked(stand: TeachingStand) -> None:
    async with (
        ScriptedJudge(lambda asked: verdict(0.8)) as judge,
        stand.env(**{**settings(judge), "capability_estimator": "auto"}) as env,
    ):
        with_truth = await env.protocol.prepare(ITEM, attempts=2)
        n_asked = len(judge.calls)
        without = await env.protocol.prepare(TeachingItem("Why?"), attempts=2)

    assert (with_truth.diagnosis.capability_level, n_asked) == (0.0, 0)
    assert without.diagnosis.capability_level == 0.8


async def test_a_judge_that_is_stopped_costs_the_diagnosis_and_no_group(stand: TeachingStand) -> None:
    broken = {"breaker": {"window": 1, "max_abstain_share": 0.5, "pause_s": 1000}}
    async with ScriptedJudge(lambda asked: 500) as judge, stand.env(**settings(judge, **broken)) as env:
        assert env._approach_judge is not None
        abstained = await judged_capability(env._approach_judge, ITEM, "Add.")
        n_asked = len(judge.calls)
        seen: list[dict[str, Any]] = []
        env.metrics_sink = seen.append
        await env.wandb_log()
        group, _ = await env.collect_trajectories(ITEM)
        await env.wandb_log()

    assert abstained == UNKNOWN == Capability(0.5, 0.0)
    assert env._approach_judge.breaker.is_open
    assert len(judge.calls) == n_asked
    assert [figures["teaching/approach_stopped"] for figures in seen] == [1.0, 1.0]
    assert seen[1]["teaching/approach_calls"] == 0
    assert group is not None
    assert len(group["scores"]) == 4


async def test_a_judge_of_approaches_that_cannot_be_used_is_named_at_the_start(
    stand: TeachingStand, tmp_path: Path
) -> None:
    data = a_data_set(tmp_path).model_dump()
    async with ScriptedJudge(lambda asked: 404) as judge, stand.env(**settings(judge), data=data) as env:
        with pytest.raises(ConfigError, match=r"judge 'diagnostic' on .* failed its self-test"):
            await env.setup()


async def test_what_judges_said_and_cost_is_logged(stand: TeachingStand) -> None:
    scores = {"process": 0.6, "diagnostic": 0.8}

    def doubtful_about_the_work(asked: Asked) -> Any:
        return verdict(scores[asked.judge], 0.9 if asked.judge == "process" and not asked.is_large else 0.1)

    seen: list[dict[str, Any]] = []
    async with ScriptedJudge(doubtful_about_the_work) as judge:
        rim = {**settings(judge, active_judges={"process": True}), "teaching_reward_mode": "rim"}
        async with stand.env(**rim) as env:
            env.metrics_sink = seen.append
            await env.wandb_log()
            await env.collect_trajectories(ITEM)
            await env.wandb_log()

    before, after = seen
    assert after["rim_rewards/process"] == pytest.approx(0.6)
    assert after["rim_explanations/process"] == "because of 0.6"
    assert after["rim/escalation_rate"] == 1.0
    assert after["teaching/approach_diagnostic"] == pytest.approx(0.8)
    assert (after["teaching/approach_calls"], after["teaching/approach_prompt_tokens"]) == (3, 300)
    assert not any(name.startswith("teaching/approach") for name in before)
