"""Options of the protocol: aliases, and values that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.rim.config import RIMConfig
from atroposlib.teaching.config import TeacherEnvConfig

JUDGES = {"models": {"small_model": "http://localhost:1/v1#judge"}}


def test_the_documented_defaults() -> None:
    config = TeacherEnvConfig()

    documented = {
        "max_probe_tokens": 500,
        "degradation_penalty_multiplier": 2.0,
        "efficiency_weight": 1.0,
        "logging_prob": 0.1,
        "use_reference_teacher_model": False,
        "num_baseline_samples": 4,
        "student_samples_per_guidance": 1,
        "min_student_samples": 1,
        "teaching_reward_mode": "asymmetric",
        "leak_policy": "zero",
        "silence_bonus": 0.0,
        "student_temperature": 0.7,
        "student_temperature_eval": 0.0,
        "capability_estimator": "auto",
    }
    assert {name: getattr(config, name) for name in documented} == documented
    assert config.guidance_tokens == config.max_completion_length


def test_the_nested_spelling_is_taken() -> None:
    config = TeacherEnvConfig.model_validate(
        {"trainer_args": {"max_probe_tokens": 50, "student_baseline_template": "{question}"}}
    )

    assert (config.max_probe_tokens, config.student_baseline_template) == (50, "{question}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainer_args": {"max_probe_tokens": 50}, "max_probe_tokens": 60}, "two values"),
        ({"trainer_args": {"learning_rate": 1}}, "trainer_args.learning_rate is none of"),
        ({"max_probe_tokens": 5000}, "must not exceed max_completion_length=4096"),
        ({"max_token_length": 4096}, "more than max_token_length=4096"),
        ({"max_guidance_tokens": 9}, "max_guidance_tokens"),
        ({"teaching_reward_mode": "rim"}, "needs judges"),
        ({"capability_estimator": "judge"}, "needs judges"),
        ({"min_student_samples": 2}, "student_samples_per_guidance=1"),
        (
            {"min_student_samples": 2, "student_samples_per_guidance": 2, "num_baseline_samples": 1},
            "num_baseline_samples=1",
        ),
        ({"group_size": 1}, "group_size"),
        ({"logging_prob": 1.1}, "logging_prob"),
        ({"degradation_penalty_multiplier": -1}, "degradation_penalty_multiplier"),
        ({"teaching_reward_mode": "best"}, "teaching_reward_mode"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherEnvConfig.model_validate(values)


def test_the_cap_of_a_leak_is_that_of_the_judges() -> None:
    judged = TeacherEnvConfig(rim=RIMConfig.model_validate({**JUDGES, "anti_gaming": {"cap_score": 0.1}}))

    assert (judged.leak_cap, TeacherEnvConfig().leak_cap) == (0.1, 0.3)


def test_a_dump_reads_back() -> None:
    config = TeacherEnvConfig(rim=RIMConfig.model_validate(JUDGES))

    assert TeacherEnvConfig.model_validate(config.model_dump()) == config
