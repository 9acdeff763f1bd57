"""Every finding of the doctor: what makes it appear, whom it names, and that a healthy run has none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.wire.models import EnvStatus, Finding, InferenceServer, InferenceServerStatus, Status
from rollout_server.diagnosis import Thresholds, diagnose
from rollout_server.group_sizes import batch_sizes_near, can_fill, divisors_near

THRESHOLDS = Thresholds(trainer_timeout_s=300, env_timeout_s=120, server_timeout_s=60, max_queued_bytes=1000)


def an_env(name: str = "math", **facts: Any) -> EnvStatus:
    healthy: dict[str, Any] = {
        "env_id": 0, "name": name, "group_size": 8, "max_token_len": 2048, "weight": 1.0, "min_batch_allocation": None,
        "is_connected": True, "last_seen_s": 1.0, "tickets": 2, "queued_groups": 1, "queued_sequences": 8,
        "groups_accepted": 20, "trained_tokens": 1000,
    }  # fmt: skip
    return EnvStatus(**(healthy | facts))


def a_server(**facts: Any) -> InferenceServerStatus:
    last_seen_s = facts.pop("last_seen_s", 1.0)
    healthy: dict[str, Any] = {"url": "http://gpu:9001/v1", "policy_version": 5}
    return InferenceServerStatus(server=InferenceServer(**(healthy | facts)), last_seen_s=last_seen_s)


def a_status(**facts: Any) -> Status:
    healthy: dict[str, Any] = {
        "run_name": "demo", "run_id": "r1", "batch_size": 64, "max_staleness": 2, "step": 5, "formed_steps": 6,
        "num_steps": 100, "policy_version": 5, "committed_step": 4, "queued_groups": 1, "queued_sequences": 8,
        "queued_bytes": 100, "largest_queued_group": 8, "group_sizes_queued": [8], "tickets_outstanding": 2,
        "groups_accepted": 50, "trainer_last_seen_s": 3.0, "envs": [an_env()], "inference_servers": [a_server()],
    }  # fmt: skip
    return Status(**(healthy | facts))


def findings(**facts: Any) -> list[Finding]:
    return diagnose(a_status(**facts), THRESHOLDS)


def the_finding(**facts: Any) -> Finding:
    (finding,) = findings(**facts)
    return finding


def test_a_healthy_run_has_no_finding() -> None:
    assert findings() == []


def test_without_a_run_only_that_is_said() -> None:
    (finding,) = diagnose(Status(), THRESHOLDS)

    assert (finding.severity, finding.subject) == ("error", "trainer")
    assert "atropos-trainer" in finding.fix


def test_a_finished_run_is_told_and_nothing_else() -> None:
    finding = the_finding(step=100, trainer_last_seen_s=9999.0, envs=[])

    assert finding.severity == "info"
    assert "all of its 100 steps" in finding.problem


@pytest.mark.parametrize(
    ("seen_s", "severity", "words"),
    [(301.0, "error", "silent for 301 s"), (None, "warning", "since this server started")],
)
def test_a_silent_trainer(seen_s: float | None, severity: str, words: str) -> None:
    finding = the_finding(trainer_last_seen_s=seen_s)

    assert (finding.severity, finding.subject) == (severity, "trainer")
    assert words in finding.problem
    assert "'demo'" in finding.fix


def test_a_waiting_trainer_and_what_it_waits_for() -> None:
    finding = the_finding(trainer_waits_for="8 more sequences for step 6")

    assert (finding.severity, finding.subject) == ("info", "batch")
    assert "8 more sequences for step 6" in finding.problem


def test_no_policy_published() -> None:
    finding = the_finding(policy_version=-1)

    assert (finding.severity, finding.subject) == ("error", "trainer")
    assert "no group may start" in finding.problem


def test_no_environment_registered() -> None:
    finding = the_finding(envs=[])

    assert (finding.severity, finding.subject) == ("error", "environments")
    assert "--rollout_server_url" in finding.fix


def test_every_environment_lost() -> None:
    gone = [an_env("a", is_connected=False), an_env("b", last_seen_s=121.0)]

    first, *others = findings(envs=gone)

    assert (first.severity, first.subject) == ("error", "environments")
    assert "'a', 'b'" in first.problem
    assert {other.subject for other in others} == {"environment 'a'", "environment 'b'"}


def test_an_environment_that_went_silent_with_tickets() -> None:
    finding = the_finding(envs=[an_env(), an_env("slow", last_seen_s=130.0, tickets=3)])

    assert (finding.severity, finding.subject) == ("warning", "environment 'slow'")
    assert "holding 3 tickets" in finding.problem


def test_an_environment_that_said_goodbye() -> None:
    finding = the_finding(envs=[an_env(), an_env("done", is_connected=False)])

    assert (finding.severity, finding.subject) == ("info", "environment 'done'")


def test_an_environment_that_never_posted() -> None:
    finding = the_finding(envs=[an_env(), an_env("idle", groups_accepted=0)])

    assert (finding.severity, finding.subject) == ("warning", "environment 'idle'")
    assert "step 5" in finding.problem


def test_a_batch_size_that_no_groups_sum_to_names_what_fits() -> None:
    finding = the_finding(batch_size=65, envs=[an_env(group_size=6), an_env(group_size=8)])

    assert (finding.severity, finding.subject) == ("error", "batch")
    assert "groups of 6, 8 sequences never sum to batch_size=65" in finding.problem
    assert "batch_size to 64 or 66" in finding.fix
    assert "group_size to 1 or 5 or 13" in finding.fix


def test_different_group_sizes_that_sum_up_together_are_fine() -> None:
    assert findings(batch_size=22, envs=[an_env(group_size=6), an_env(group_size=8)]) == []


@pytest.mark.parametrize("size", [15, 65])
def test_queued_groups_that_fit_into_no_batch(size: int) -> None:
    finding = the_finding(batch_size=64, group_sizes_queued=[size, 16], envs=[an_env(group_size=16)])

    assert (finding.severity, finding.subject) == ("warning", "queue")
    assert f"queued groups of {size} sequences" in finding.problem


def test_an_environment_with_a_promised_share_that_holds_up_the_batch() -> None:
    late = an_env("late", min_batch_allocation=0.25, queued_groups=0, queued_sequences=0)

    finding = the_finding(
        queued_sequences=80, trainer_waits_for="environment 1, which is promised 16 of 64", envs=[an_env(), late]
    )

    assert (finding.severity, finding.subject) == ("warning", "environment 'late'")
    assert "promised 25%" in finding.problem
    assert "allocation_wait_s" in finding.fix


@pytest.mark.parametrize(("queued_bytes", "severity"), [(800, "warning"), (1000, "error")])
def test_a_queue_that_is_nearly_full(queued_bytes: int, severity: str) -> None:
    finding = the_finding(queued_bytes=queued_bytes)

    assert (finding.severity, finding.subject) == (severity, "queue")
    assert "max_queued_bytes=1000" in finding.problem


def test_retired_groups_by_reason() -> None:
    late, refused = findings(groups_retired={"late": 3, "nack_broken image": 1, "stale": 0})

    assert "3 finished groups were put away untrained: late" in late.problem
    assert "--ticket-ttl-s" in late.fix
    assert "nack_broken image" in refused.problem
    assert "nack" in refused.fix


@pytest.mark.parametrize(
    ("reason", "words"), [("expired", "not renewed in time"), ("rollout_error", "rollouts failed")]
)
def test_tickets_that_come_to_nothing(reason: str, words: str) -> None:
    finding = the_finding(tickets_returned={reason: 30, "zero_variance": 5})

    assert (finding.severity, finding.subject) == ("warning", "environments")
    assert finding.problem.startswith("30 of 85")
    assert words in finding.problem


def test_a_few_failures_are_no_finding() -> None:
    assert findings(tickets_returned={"expired": 10, "rollout_error": 10}, groups_duplicate=5) == []


def test_many_duplicates() -> None:
    finding = the_finding(groups_duplicate=20)

    assert finding.severity == "warning"
    assert "20 groups were posted again" in finding.problem


def test_a_silent_inference_server() -> None:
    finding = the_finding(inference_servers=[a_server(), a_server(url="http://lost:1/v1", last_seen_s=61.0)])

    assert finding.subject == "inference server http://lost:1/v1"
    assert "not reported for 61 s" in finding.problem


def test_an_inference_server_behind_the_published_version() -> None:
    finding = the_finding(inference_servers=[a_server(policy_version=4), a_server(role="judge", policy_version=0)])

    assert "runs policy version 4, 5 is published" in finding.problem


def test_commits_far_behind() -> None:
    finding = the_finding(num_steps=1000, step=150, committed_step=10, policy_version=5)

    assert finding.subject == "trainer"
    assert "the last 140 steps" in finding.problem


def test_errors_come_first() -> None:
    severities = [
        finding.severity for finding in findings(policy_version=-1, trainer_waits_for="groups", queued_bytes=900)
    ]

    assert severities == ["error", "warning", "info"]


def test_every_finding_names_a_fix() -> None:
    worst = findings(
        policy_version=-1, trainer_last_seen_s=None, envs=[an_env(is_connected=False)], queued_bytes=2000,
        groups_retired={"late": 1}, inference_servers=[a_server(last_seen_s=999.0)],
    )  # fmt: skip

    assert all(finding.subject and finding.problem and finding.fix for finding in worst)


@given(
    sizes=st.sets(st.integers(1, 9), min_size=1, max_size=3),
    batch_size=st.integers(1, 40),
)
def test_the_sums_are_those_of_trying_all_combinations(sizes: set[int], batch_size: int) -> None:
    reached = {0}
    for _ in range(batch_size):
        reached |= {total + size for total in reached for size in sizes if total + size <= batch_size}

    assert can_fill(sizes, batch_size) == (batch_size in reached)
    assert all(can_fill(sizes, near) for near in batch_sizes_near(sizes, batch_size))


def test_near_divisors_divide() -> None:
    assert divisors_near(64, 6) == [2, 4, 8]
