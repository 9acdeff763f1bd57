"""Alarms: they start and end once each, whatever the figures do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.reporting.alarms import RULES, AlarmRule, Alarms, Finding, alarm_rules

MAX_STALENESS = 4
HEALTHY = {
    "ess": 0.98,
    "mismatch/ratio_max": 2.0,
    "mismatch/kl_k3": 0.002,
    "frac_reward_zero_std": 0.1,
    "completion/truncated_frac": 0.01,
    "completion/masked_frac": 0.0,
    "entropy": 1.0,
    "step/skipped": 0.0,
    "staleness/mean": 1.0,
    "time/wait_s": 1.0,
    "time/train_s": 10.0,
}
TROUBLE: dict[str, dict[str, float]] = {
    "ess_low": {"ess": 0.4},
    "ratio_max": {"mismatch/ratio_max": 500.0},
    "mismatch_kl": {"mismatch/kl_k3": 0.2},
    "mismatch_rising": {"mismatch/kl_k3": 0.02},
    "zero_variance": {"frac_reward_zero_std": 0.9},
    "truncated": {"completion/truncated_frac": 0.3},
    "masked": {"completion/masked_frac": 0.3},
    "entropy_collapse": {"entropy": 0.05},
    "skipped_step": {"step/skipped": 1.0},
    "staleness_at_bound": {"staleness/mean": 4.0},
    "waits_for_batches": {"time/wait_s": 11.0},
    "reward_stuck": {"reward/mean": 0.0},
}


def healthy(step: int) -> dict[str, float | None]:
    return {**HEALTHY, "reward/mean": (step % 7) / 10}


def told(lines: Sequence[Mapping[str, float | None]]) -> list[tuple[int, Finding]]:
    alarms = Alarms(alarm_rules(max_staleness=MAX_STALENESS))
    return [(step, finding) for step, line in enumerate(lines) for finding in alarms.after_step(line)]


def test_every_rule_has_its_trouble_here() -> None:
    assert set(TROUBLE) == {rule.name for rule in alarm_rules(max_staleness=MAX_STALENESS)}


def test_a_healthy_run_has_no_alarm() -> None:
    assert told([healthy(step) for step in range(100)]) == []


@pytest.mark.parametrize("name", sorted(TROUBLE))
def test_trouble_is_told_once_when_it_starts_and_once_when_it_ends(name: str) -> None:
    lines = [{**healthy(step), **(TROUBLE[name] if 30 <= step < 60 else {})} for step in range(100)]

    found = [(step, finding) for step, finding in told(lines) if finding.name == name]

    assert [finding.is_on for _, finding in found] == [True, False]
    assert 30 <= found[0][0] < 60
    # The growth of something that has stopped growing is over before the trouble is.
    assert found[0][0] < found[1][0] < 90
    assert "limit" in found[0][1].text
    assert found[1][1].text.startswith("over: ")


def test_a_level_between_both_thresholds_changes_nothing() -> None:
    trembling = [0.49, 0.6, 0.49, 0.6] * 5
    lines = [{**healthy(step), "ess": ess} for step, ess in enumerate([0.4] * 3 + trembling)]

    assert [(finding.name, finding.is_on) for _, finding in told(lines)] == [("ess_low", True)]


def test_the_text_names_value_limit_and_what_to_do() -> None:
    lines = [{**healthy(step), "completion/truncated_frac": 0.35} for step in range(5)]

    ((_, finding),) = told(lines)

    assert "0.35 (limit 0.2)" in finding.text
    assert "overlong" in finding.text


def test_one_odd_step_is_no_alarm() -> None:
    lines = [{**healthy(step), "mismatch/ratio_max": 1e6 if step == 20 else 2.0} for step in range(40)]

    assert told(lines) == []


def test_figures_that_are_missing_or_no_numbers_start_and_end_nothing() -> None:
    missing: list[Mapping[str, float | None]] = [{"ess": None}, {}, {"ess": float("nan")}]
    lines: list[Mapping[str, float | None]] = [{"ess": 0.1}] * 3
    lines += missing * 3

    assert [(finding.name, finding.is_on) for _, finding in told(lines)] == [("ess_low", True)]


def test_with_staleness_0_being_at_the_bound_is_no_trouble() -> None:
    assert alarm_rules(max_staleness=0) == RULES


@pytest.mark.parametrize("rule", alarm_rules(max_staleness=4), ids=lambda rule: rule.name)
@given(level=st.floats(-1e6, 1e6))
def test_no_level_both_starts_and_ends_an_alarm(rule: AlarmRule, level: float) -> None:
    assert not (rule.is_over(level) and rule.is_well(level))


@given(
    lines=st.lists(
        st.fixed_dictionaries({name: st.one_of(st.none(), st.floats(0, 100)) for name in (*HEALTHY, "reward/mean")}),
        max_size=50,
    )
)
def test_start_and_end_take_turns(lines: list[dict[str, float | None]]) -> None:
    is_on: dict[str, bool] = {}
    for _, finding in told(lines):
        assert finding.is_on != is_on.get(finding.name, False)
        is_on[finding.name] = finding.is_on
