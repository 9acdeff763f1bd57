"""The servers beside the policy's: which pool is whose, and what is said where one is missing, shared or idle."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.envs.base import APIServerConfig
from atroposlib.envs.command_line.launching import build
from atroposlib.envs.command_line.options import resolve
from atroposlib.envs.server_pools import build_env
from atroposlib.envs.teacher_distillation_env import TeacherDistillationConfig, TeacherDistillationEnv
from atroposlib.errors import ConfigError
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.env import TeacherEnv
from tests.teaching.stand import TeachingStand

POLICY_URL = "http://127.0.0.1:1/v1"
FLAGS = ["--openai.base_url", POLICY_URL, "--student.base_url", "http://127.0.0.1:2/v1"]
REFERENCE_FLAGS = ["--reference.base_url", "http://127.0.0.1:3/v1", "--reference.model_name", "before"]


@pytest.fixture
def stand(bytes_tokenizer: str) -> TeachingStand:
    return TeachingStand(bytes_tokenizer)


def at(url: str) -> list[APIServerConfig]:
    return [APIServerConfig(base_url=url, server_type="vllm")]


def urls(model: Any) -> list[str]:
    return [server.config.base_url for server in model.server.servers]


async def from_flags(env_cls: type[TeacherEnv], tokenizer_name: str, *flags: str) -> Any:
    env = build(env_cls, resolve(env_cls, ["--tokenizer_name", tokenizer_name, *FLAGS, *flags], mode_defaults={}))
    await env.aclose()
    return env


async def test_flags_give_the_student_and_the_reference_their_servers(bytes_tokenizer: str) -> None:
    env = await from_flags(TeacherEnv, bytes_tokenizer, *REFERENCE_FLAGS, "--use_reference_teacher_model", "true")

    assert (urls(env.student), urls(env.reference)) == (["http://127.0.0.1:2/v1"], ["http://127.0.0.1:3/v1"])
    assert env.reference.model_names == ["before"]


async def test_a_constructor_of_four_arguments_loses_no_pool(bytes_tokenizer: str) -> None:
    class Plain(TeacherEnv):
        def __init__(self, config: Any, servers: Any, slurm: bool = False, testing: bool = False) -> None:
            super().__init__(config, servers, slurm, testing)

    env = await from_flags(Plain, bytes_tokenizer, *REFERENCE_FLAGS, "--use_reference_teacher_model", "true")

    assert (urls(env.student), urls(env.reference)) == (["http://127.0.0.1:2/v1"], ["http://127.0.0.1:3/v1"])


async def test_defaults_of_the_class_are_used_where_nobody_says_otherwise(stand: TeachingStand) -> None:
    class Ready(TeacherEnv):
        @classmethod
        def student_config_init(cls) -> Any:
            return at("http://127.0.0.1:4/v1")

        @classmethod
        def reference_config_init(cls) -> Any:
            return APIServerConfig(base_url="http://127.0.0.1:5/v1")

    env = Ready(stand.config(use_reference_teacher_model=True), at(POLICY_URL))
    await env.aclose()

    assert (urls(env.student), urls(env.reference)) == (["http://127.0.0.1:4/v1"], ["http://127.0.0.1:5/v1"])


async def test_a_teacher_of_distillation_may_stand_beside_student_and_reference(stand: TeachingStand) -> None:
    class BothConfig(TeacherEnvConfig, TeacherDistillationConfig):
        pass

    class Both(TeacherEnv, TeacherDistillationEnv):
        env_config_cls = BothConfig

    config = BothConfig.model_validate({**stand.settings, "teacher_enabled": True})
    teacher = [APIServerConfig(base_url="http://127.0.0.1:6/v1", tokenizer_name=config.tokenizer_name or "")]

    env: Any = build_env(Both, config, at(POLICY_URL), {"student": at("http://127.0.0.1:2/v1"), "teacher": teacher})
    await env.aclose()

    assert sorted(Both.server_pools()) == ["reference", "student", "teacher"]
    assert [server.config.base_url for server in env.teacher_server.servers] == ["http://127.0.0.1:6/v1"]


def test_a_reference_teacher_needs_a_server(stand: TeachingStand) -> None:
    with pytest.raises(ConfigError, match=r"use_reference_teacher_model needs .*--reference\.base_url.*reference:"):
        TeacherEnv(
            stand.config(use_reference_teacher_model=True), at(POLICY_URL), student_server_configs=at(POLICY_URL)
        )


async def test_canned_answers_need_no_server(stand: TeachingStand) -> None:
    env = TeacherEnv(stand.config(use_reference_teacher_model=True), [], testing=True)
    await env.aclose()

    assert env.reference is not None


async def test_a_reference_that_is_not_asked_is_warned_of(
    bytes_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Ready(TeacherEnv):
        @classmethod
        def reference_config_init(cls) -> Any:
            return at("http://127.0.0.1:5/v1")

    assert (await from_flags(Ready, bytes_tokenizer)).reference is None
    assert "not asked" not in caplog.text, "a default is for whoever switches it on"

    assert (await from_flags(Ready, bytes_tokenizer, *REFERENCE_FLAGS)).reference is None
    assert "servers are not asked: set use_reference_teacher_model" in caplog.text


@pytest.mark.parametrize("role", ["student", "reference teacher"])
async def test_a_frozen_model_on_the_policy_s_server_is_warned_of(
    stand: TeachingStand, caplog: pytest.LogCaptureFixture, role: str
) -> None:
    def url(of: str) -> list[APIServerConfig]:
        return at(POLICY_URL if of == role else "http://127.0.0.1:2/v1")

    env = TeacherEnv(
        stand.config(use_reference_teacher_model=True),
        at(POLICY_URL),
        student_server_configs=url("student"),
        reference_server_configs=url("reference teacher"),
    )
    await env.aclose()

    [warning] = [record.getMessage() for record in caplog.records if "policy's server" in record.getMessage()]
    assert warning.startswith(f"the {role} is asked at http://127.0.0.1:1, ")


async def test_student_and_reference_may_be_one_server(stand: TeachingStand, caplog: pytest.LogCaptureFixture) -> None:
    one = at("http://127.0.0.1:2/v1")
    config = stand.config(use_reference_teacher_model=True)
    env = TeacherEnv(config, at(POLICY_URL), student_server_configs=one, reference_server_configs=one)
    await env.aclose()

    assert caplog.text == ""
