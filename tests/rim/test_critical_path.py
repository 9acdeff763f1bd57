"""How close scoring a group comes to the critical path of its calls: SCRIPTED judges, in virtual time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from statistics import median

import pytest

from atroposlib.rim import RIMConfig, RIMReward
from atroposlib.rim.asking import JudgeCall, JudgeReply
from benchmarks.rim_schedule import CallTimes, drawn_s, is_doubted, replayed
from tests.rim.judges import a_trajectory, verdict
from tests.rim.virtual_time import run_in_virtual_time

WORKERS = 8
SEEDS = range(10)
BAR = 1.2
"""Times the critical path."""


@dataclass
class TimedJudge:
    """Takes its time for each answer: always the same and always sure, or drawn, and unsure of some cases."""

    seed: int | None = None
    times: CallTimes = field(default_factory=CallTimes)

    async def __call__(self, call: JudgeCall) -> JudgeReply:
        case = f"{call.judge}/{call.prompt.partition('case number ')[2].partition('.')[0]}"
        seconds, is_unsure = 1.0, False
        if self.seed is not None:
            seconds = drawn_s(case, call.temperature, is_large=call.is_large, seed=self.seed, median_s=1.0)
            is_unsure = not call.is_large and is_doubted(case, self.seed)
        (self.times.large if call.is_large else self.times.small)[case].append(seconds)
        await asyncio.sleep(seconds)
        return JudgeReply(json.dumps(verdict(0.7, 0.5 if is_unsure else 0.1)))


def scored_in_s(judge: TimedJudge, n_trajectories: int) -> float:
    models = {"small_model": "http://judge/v1#small", "large_model": "http://judge/v1#large"}
    config = RIMConfig.read({"models": models, "parallel_execution": {"max_workers": WORKERS}})
    group = [a_trajectory(question=f"This is case number {i}.") for i in range(n_trajectories)]
    results, seconds = run_in_virtual_time(RIMReward(config, ask=judge).score(group))

    assert [result.score for result in results] == [0.7] * n_trajectories
    assert len(judge.times.small) == 2 * n_trajectories
    return seconds


@pytest.mark.parametrize("n_trajectories", [1, 4, 8, 32])
def test_calls_that_take_equally_long_leave_no_worker_idle(n_trajectories: int) -> None:
    judge = TimedJudge()

    seconds = scored_in_s(judge, n_trajectories)

    assert seconds == pytest.approx(judge.times.critical_path_s(WORKERS))


@pytest.mark.parametrize("n_trajectories", [1, 8, 32])
def test_calls_of_unknown_length_and_escalations_stay_near_the_critical_path(n_trajectories: int) -> None:
    judges = [TimedJudge(seed) for seed in SEEDS]

    ratios = [scored_in_s(judge, n_trajectories) / judge.times.critical_path_s(WORKERS) for judge in judges]

    assert any(judge.times.large for judge in judges)
    assert min(ratios) > 0.999
    assert median(ratios) <= BAR


def test_an_escalation_among_few_calls_ends_as_soon_as_its_doubt_can_be_known() -> None:
    """24 calls fill 8 workers three times: what a first call shows to be long has little beside it."""
    judges = [TimedJudge(seed) for seed in range(40)]
    walls = [scored_in_s(judge, 4) for judge in judges]

    ratios = [
        wall / judge.times.learnt_path_s(WORKERS)
        for judge, wall in zip(judges, walls, strict=True)
        if judge.times.large
    ]

    assert len(ratios) > 20
    assert median(ratios) <= 1.1


@pytest.mark.parametrize("n_trajectories", [1, 4, 8, 32])
def test_not_knowing_what_will_escalate_costs_little(n_trajectories: int) -> None:
    judges = [TimedJudge(seed) for seed in SEEDS]

    ratios = [scored_in_s(judge, n_trajectories) / judge.times.replay_s(WORKERS) for judge in judges]

    assert median(ratios) <= BAR


def test_the_replay_itself() -> None:
    small = [("a", 1.0), ("a", 2.0), ("b", 1.0), ("c", 4.0)]

    assert replayed(small, {"a": 3.0}, workers=1) == 11.0
    assert replayed(small, {"a": 3.0}, workers=2) == 6.0
    assert replayed(small, {}, workers=9) == 4.0
