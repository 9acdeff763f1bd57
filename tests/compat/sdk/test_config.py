"""Every field of the config classes, with the type and the default that old environments count on."""

from __future__ import annotations

from enum import Enum
from typing import Any, get_type_hints

import pytest
from pydantic import BaseModel, Field, ValidationError

from atroposlib.envs.base import (
    APIServerConfig,
    BaseEnvConfig,
    EvalHandlingEnum,
    ReasoningConfig,
    ServerBaseline,
    ServerManagerConfig,
)
from atroposlib.envs.server_handling.engines.reasoning import EFFORT_TO_MAX_TOKENS
from atroposlib.envs.server_handling.server_baseline import VALID_REASONING_EFFORTS
from atroposlib.envs.teacher_distillation_env import TeacherDistillationConfig

ENV_FIELDS: dict[str, tuple[Any, Any]] = {
    "group_size": (4, 16),
    "max_num_workers": (-1, 7),
    "max_eval_workers": (16, 3),
    "max_num_workers_per_node": (8, 2),
    "steps_per_eval": (100, -1),
    "max_token_length": (2048, 8192),
    "eval_handling": (EvalHandlingEnum.STOP_TRAIN, EvalHandlingEnum.NONE),
    "eval_limit_ratio": (0.5, 0.1),
    "inference_weight": (1.0, 0.25),
    "batch_size": (-1, 1024),
    "max_batches_offpolicy": (3, 0),
    "tokenizer_name": ("NousResearch/DeepHermes-3-Llama-3-3B-Preview", "other/model"),
    "use_wandb": (True, False),
    "rollout_server_url": ("http://localhost:8000", "http://elsewhere:9"),
    "total_steps": (1000, -1),
    "wandb_name": (None, "gsm8k"),
    "num_rollouts_to_keep": (32, 8),
    "num_rollouts_per_group_for_logging": (1, -1),
    "ensure_scores_are_not_same": (True, False),
    "data_path_to_save_groups": (None, "data/x.jsonl"),
    "data_dir_to_save_evals": (None, "evals"),
    "min_items_sent_before_logging": (2, 0),
    "include_messages": (False, True),
    "min_batch_allocation": (None, 0.25),
    "worker_timeout": (600, -1),
    "thinking_mode": (False, True),
    "reasoning_effort": (None, "high"),
    "max_reasoning_tokens": (None, 1024),
    "custom_thinking_prompt": (None, "think"),
}
"""Default, and another value that is taken, of the 29 fields."""

SERVER_FIELDS: dict[str, tuple[Any, Any]] = {
    "timeout": (1200, 5),
    "num_max_requests_at_once": (512, 8),
    "num_requests_for_eval": (64, 4),
    "model_name": ("default", "m"),
    "rolling_buffer_length": (1000, 10),
    "server_type": ("openai", "sglang"),
    "tokenizer_name": ("none", "t"),
}
ADDRESS_FIELDS: dict[str, tuple[Any, Any]] = {
    "api_key": ("", None),
    "base_url": ("", None),
    "n_kwarg_is_ignored": (False, True),
    "health_check": (True, False),
}
MANAGER_FIELDS: dict[str, tuple[Any, Any]] = {
    "slurm": (False, True),
    "testing": (False, True),
    "max_n_completions": (8, 2),
    "proxy_url": (None, "http://proxy"),
}
TEACHER_FIELDS: dict[str, tuple[Any, Any]] = {"teacher_enabled": (False, True), "teacher_top_k": (0, -1)}

ROWS = [
    (model, name, *values)
    for model, fields in (
        (BaseEnvConfig, ENV_FIELDS),
        (ServerBaseline, SERVER_FIELDS),
        (APIServerConfig, SERVER_FIELDS | ADDRESS_FIELDS),
        (ServerManagerConfig, MANAGER_FIELDS),
        (TeacherDistillationConfig, ENV_FIELDS | TEACHER_FIELDS),
    )
    for name, values in fields.items()
]


@pytest.mark.parametrize(("model", "name", "default", "other"), ROWS, ids=[f"{m.__name__}-{n}" for m, n, *_ in ROWS])
def test_a_field_has_its_default_and_takes_another_value(
    model: type[BaseModel], name: str, default: Any, other: Any
) -> None:
    assert getattr(model(), name) == default
    assert getattr(model(**{name: other}), name) == other


def test_the_table_holds_all_of_the_29_fields() -> None:
    assert len(ENV_FIELDS) == 29


# What is refused


@pytest.mark.parametrize("tokens", [1023, 32001])
def test_reasoning_tokens_have_bounds(tokens: int) -> None:
    with pytest.raises(ValidationError):
        BaseEnvConfig(max_reasoning_tokens=tokens)


def test_a_top_k_below_minus_one_is_refused() -> None:
    with pytest.raises(ValidationError):
        TeacherDistillationConfig(teacher_top_k=-2)


def test_an_unknown_server_type_is_refused() -> None:
    with pytest.raises(ValidationError):
        APIServerConfig(server_type="tgi")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["openai", "trl", "sglang", "vllm"])
def test_every_kind_of_server_is_taken(kind: Any) -> None:
    assert ServerBaseline(server_type=kind).server_type == kind


# What is taken although nobody reads it


@pytest.mark.parametrize("model", [BaseEnvConfig, ServerBaseline, APIServerConfig])
def test_an_unknown_keyword_is_ignored(model: type[BaseModel]) -> None:
    made = model(score_buffer_size=3, weight=2.0)

    assert not hasattr(made, "score_buffer_size")
    assert made == model()


# Subclasses


class Level(Enum):
    EASY = "easy"
    HARD = "hard"


class Inner(BaseModel):
    depth: int = 1


class Own(BaseEnvConfig):
    """As environments write them: other defaults, new fields of many types, with and without Field."""

    group_size: int = 16
    thinking_mode: bool = Field(default=True, description="its own meaning")
    level: Level = Level.EASY
    nested: list[list[int]] = [[1], [2, 3]]  # noqa: RUF012
    maybe: float | None = None
    inner: Inner = Inner()
    model_path: str = "names that begin with model_ are no warning"


def test_a_subclass_redeclares_fields_with_plain_defaults() -> None:
    assert (Own().group_size, Own().thinking_mode, Own().max_token_length) == (16, True, 2048)


@pytest.mark.parametrize("config", [BaseEnvConfig(), Own(level=Level.HARD, nested=[[4]], maybe=0.5), APIServerConfig()])
def test_a_dump_makes_the_same_config_again(config: BaseModel) -> None:
    assert type(config)(**config.model_dump()) == config
    assert type(config)(**config.model_dump(mode="json")) == config


def test_an_environment_may_change_its_config_while_it_runs() -> None:
    config = BaseEnvConfig()

    config.batch_size = 128

    assert config.batch_size == 128


def test_the_eval_handling_is_given_as_enum_or_text() -> None:
    assert BaseEnvConfig(eval_handling="LIMIT_TRAIN").eval_handling is EvalHandlingEnum.LIMIT_TRAIN  # type: ignore[arg-type]


# Reasoning


def test_the_reasoning_config_is_off_by_default() -> None:
    assert ReasoningConfig() == ReasoningConfig(enabled=False, effort=None, max_tokens=None)
    assert not ReasoningConfig().is_reasoning_kwargs_active()
    assert ReasoningConfig().build_extra_body() is None


def test_the_efforts_and_their_token_numbers() -> None:
    assert EFFORT_TO_MAX_TOKENS == {
        "none": 1024, "minimal": 3200, "low": 6400, "medium": 16000, "high": 25600, "xhigh": 30400,
    }  # fmt: skip
    assert set(VALID_REASONING_EFFORTS) == set(EFFORT_TO_MAX_TOKENS)


def test_fields_keep_their_types() -> None:
    hints = get_type_hints(BaseEnvConfig)

    assert (hints["group_size"], hints["eval_handling"], hints["use_wandb"]) == (int, EvalHandlingEnum, bool)
