"""How chat requests ask for reasoning."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from atroposlib.envs.server_handling.engines.reasoning import EFFORT_TO_MAX_TOKENS, inject_reasoning
from atroposlib.envs.server_handling.server_baseline import VALID_REASONING_EFFORTS, ReasoningConfig

OPENAI = "https://api.openai.com/v1"


def test_an_unknown_effort_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Invalid reasoning_effort 'huge'.*minimal"):
        ReasoningConfig(effort="huge")


def test_an_effort_or_a_limit_turns_it_on() -> None:
    assert not ReasoningConfig().is_reasoning_kwargs_active()
    assert ReasoningConfig(effort="none").is_reasoning_kwargs_active()
    assert ReasoningConfig(max_tokens=2048).enabled
    assert ReasoningConfig(enabled=True).enabled


@pytest.mark.parametrize(
    ("config", "base_url", "use_max_tokens", "body"),
    [
        (ReasoningConfig(), None, False, None),
        (ReasoningConfig(enabled=True), None, False, {"reasoning": {"enabled": True}}),
        (ReasoningConfig(effort="high"), None, False, {"reasoning": {"enabled": True, "effort": "high"}}),
        (ReasoningConfig(effort="high"), None, True, {"reasoning": {"enabled": True, "max_tokens": 25600}}),
        (ReasoningConfig(max_tokens=2048), None, False, {"reasoning": {"enabled": True, "max_tokens": 2048}}),
        (
            ReasoningConfig(effort="low", max_tokens=2048), None, False,
            {"reasoning": {"enabled": True, "effort": "low"}},
        ),
        (ReasoningConfig(enabled=True), OPENAI, False, {"reasoning_effort": "medium"}),
        (ReasoningConfig(effort="low"), OPENAI, True, {"reasoning_effort": "low"}),
    ],
)  # fmt: skip
def test_the_body_is_in_the_providers_spelling(
    config: ReasoningConfig, base_url: str | None, use_max_tokens: bool, body: object
) -> None:
    assert config.build_extra_body(base_url, use_max_tokens=use_max_tokens) == body


def test_the_numbers_of_the_efforts() -> None:
    assert dict(EFFORT_TO_MAX_TOKENS) == {
        "none": 1024, "minimal": 3200, "low": 6400, "medium": 16000, "high": 25600, "xhigh": 30400,
    }  # fmt: skip
    assert set(VALID_REASONING_EFFORTS) == set(EFFORT_TO_MAX_TOKENS)


def test_from_an_environments_fields() -> None:
    config = SimpleNamespace(thinking_mode=True, reasoning_effort="low", max_reasoning_tokens=None)

    assert ReasoningConfig.from_env_config(config) == ReasoningConfig(enabled=True, effort="low")
    assert ReasoningConfig.from_env_config(SimpleNamespace()) == ReasoningConfig()


def test_it_is_merged_over_the_callers_extra_body() -> None:
    kwargs = {"extra_body": {"seed": 1, "reasoning": "mine"}, "max_tokens": 9}

    merged = inject_reasoning(kwargs, ReasoningConfig(effort="low"), "http://localhost/v1")

    assert merged == {
        "extra_body": {"seed": 1, "reasoning": {"enabled": True, "effort": "low"}},
        "max_tokens": 9,
    }
    assert kwargs["extra_body"] == {"seed": 1, "reasoning": "mine"}, "the caller's arguments stay as they are"


def test_openai_gets_the_parameters_that_its_reasoning_models_take() -> None:
    merged = inject_reasoning({"temperature": 0.2, "max_tokens": 9}, ReasoningConfig(enabled=True), OPENAI)

    assert merged == {
        "extra_body": {"reasoning_effort": "medium"}, "temperature": 1.0, "max_completion_tokens": 9,
    }  # fmt: skip


@pytest.mark.parametrize("config", [None, ReasoningConfig(), ReasoningConfig(effort="low")])
def test_a_request_can_opt_out(config: ReasoningConfig | None) -> None:
    assert inject_reasoning({"n": 1, "skip_reasoning": True}, config, OPENAI) == {"n": 1}
