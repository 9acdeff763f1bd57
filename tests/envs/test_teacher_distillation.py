"""Groups get the teacher's logprobs, whatever way the environment is constructed, and go on without a teacher that fails."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from atroposlib.envs import teacher_distillation_env
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ServerBaseline
from atroposlib.envs.server_pools import build_env
from atroposlib.envs.serving.delivery import wire_group
from atroposlib.envs.teacher_distillation_env import TeacherDistillationConfig, TeacherDistillationEnv
from atroposlib.errors import ConfigError
from atroposlib.testing import MockInferenceServer
from atroposlib.type_definitions import ScoredDataGroup
from tests.envs.fakes import a_scored_group

POLICY = [APIServerConfig(base_url="http://127.0.0.1:1/v1", server_type="vllm")]
NO_LOGPROB = -1e9


class Plain(BaseEnv):
    """An environment as upstream ones are written: four arguments, passed up by position. Keeps what is sent."""

    def __init__(self, config: Any, server_configs: Any, slurm: bool = True, testing: bool = False) -> None:
        super().__init__(config, server_configs, slurm, testing)
        self.sent: list[Any] = []

    async def get_next_item(self) -> Any:
        return None

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        return None

    async def _send_scored_data_to_api(self, scored_data: Any) -> None:
        self.sent += scored_data


class Mixed(Plain, TeacherDistillationEnv):
    """The combination of the bundled GSM8K teacher environment."""

    env_config_cls = TeacherDistillationConfig


class Direct(TeacherDistillationEnv):
    async def get_next_item(self) -> Any:
        return None


@pytest.fixture
async def teacher() -> AsyncIterator[MockInferenceServer]:
    async with MockInferenceServer() as server:
        yield server


@pytest.fixture
def config(tokenizer_name: str, tmp_path: Path) -> TeacherDistillationConfig:
    return TeacherDistillationConfig(
        group_size=2, tokenizer_name=tokenizer_name, use_wandb=False, teacher_enabled=True, teacher_top_k=2
    )


def at(url: str, tokenizer_name: str, **options: Any) -> list[APIServerConfig]:
    return [APIServerConfig(base_url=url, server_type="vllm", tokenizer_name=tokenizer_name, **options)]


@pytest.fixture
async def env(config: TeacherDistillationConfig, teacher: MockInferenceServer) -> AsyncIterator[Mixed]:
    env = build_env(Mixed, config, POLICY, {"teacher": at(teacher.url, config.tokenizer_name or "")})
    yield env
    await env.aclose()


# Construction


def test_a_class_that_was_combined_is_constructed_with_its_teacher(config: TeacherDistillationConfig) -> None:
    servers = at("http://127.0.0.1:2/v1", config.tokenizer_name or "")

    env = build_env(Mixed, config, POLICY, {"teacher": servers}, slurm=False, testing=False)

    assert env.teacher_server is not None
    assert [server.config.base_url for server in env.teacher_server.servers] == ["http://127.0.0.1:2/v1"]
    assert [server.config.base_url for server in env.server.servers] == ["http://127.0.0.1:1/v1"]


def test_the_teacher_is_handed_to_one_environment_only(config: TeacherDistillationConfig) -> None:
    build_env(Mixed, config, POLICY, {"teacher": at("http://127.0.0.1:2/v1", config.tokenizer_name or "")})

    with pytest.raises(ValueError, match=r"--teacher\.base_url"):
        Mixed(config, POLICY, False, False)


@pytest.mark.parametrize("is_list", [True, False])
def test_the_third_argument_is_the_teacher(config: TeacherDistillationConfig, is_list: bool) -> None:
    [server] = at("http://127.0.0.1:2/v1", config.tokenizer_name or "")

    envs = [
        Direct(config, POLICY, [server] if is_list else server, False, False),
        build_env(Direct, config, POLICY, {"teacher": [server] if is_list else server}),
    ]

    for env in envs:
        assert env.teacher_server is not None
        assert len(env.teacher_server.servers) == 1


class Arguments(TeacherDistillationEnv):
    """Notes what reaches the constructor behind it."""

    async def get_next_item(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("arguments", "keywords", "slurm_testing"),
    [
        ((True, False), {}, (True, False)),
        ((False, True), {}, (False, True)),
        ((True,), {"testing": True}, (True, True)),
        ((None, True, True), {}, (True, True)),
        ((), {"slurm": True, "testing": False}, (True, False)),
    ],
)
def test_a_bool_in_the_teacher_s_place_is_slurm(
    arguments: Any, keywords: Any, slurm_testing: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def note(self: Any, config: Any, servers: Any, slurm: bool = False, testing: bool = False) -> None:
        self.config = config
        seen.append((slurm, testing))

    monkeypatch.setattr(BaseEnv, "__init__", note)

    Arguments(TeacherDistillationConfig(), POLICY, *arguments, **keywords)

    assert seen == [slurm_testing]


def test_no_teacher_is_needed_while_it_is_off(config: TeacherDistillationConfig) -> None:
    off = config.model_copy(update={"teacher_enabled": False})
    minus_one = config.model_copy(update={"teacher_top_k": -1})
    other = BaseEnvConfig(tokenizer_name=None, use_wandb=False)

    assert [build_env(Mixed, one, POLICY).teacher_server for one in (off, minus_one, other)] == [None] * 3


def test_a_vocabulary_other_than_the_policy_s_is_refused(
    config: TeacherDistillationConfig, tmp_path: Path, tokenizer: Any
) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save_pretrained(tmp_path / "same")
    # A fresh one, because the fixture is everybody's.
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path / "same")
    other.add_tokens(["extra"])
    other.save_pretrained(tmp_path / "other")

    same, other = ({"teacher": at("http://127.0.0.1:2/v1", str(tmp_path / name))} for name in ("same", "other"))
    assert build_env(Direct, config, POLICY, same).teacher_server
    with pytest.raises(ValueError, match=r"another vocabulary.*--teacher\.tokenizer_name"):
        build_env(Direct, config, POLICY, other)


def test_a_tokenizer_that_cannot_be_loaded_is_the_teacher_s_model_name_by_default(
    config: TeacherDistillationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Any:
        raise ConfigError(f"cannot load the tokenizer {name!r}")

    monkeypatch.setattr(teacher_distillation_env, "load_tokenizer", load)

    with pytest.raises(ValueError, match=r"'some-model'; set --teacher\.tokenizer_name"):
        build_env(Direct, config, POLICY, {"teacher": at("http://127.0.0.1:2/v1", "none", model_name="some-model")})


@pytest.mark.parametrize(
    ("section", "flags", "urls"),
    [
        (None, {}, ["http://a/v1"]),
        ({"base_url": "http://b/v1"}, {}, ["http://b/v1"]),
        ({"base_url": "http://b/v1"}, {"teacher.base_url": "http://c/v1", "openai.base_url": "x"}, ["http://c/v1"]),
        ([{"base_url": "http://d/v1"}, {"base_url": "http://e/v1"}], {}, ["http://d/v1", "http://e/v1"]),
    ],
)
def test_flags_win_over_the_file_and_that_over_the_default(section: Any, flags: Any, urls: list[str]) -> None:
    yaml_config = {} if section is None else {"teacher": section}

    servers: Any = Mixed._resolve_teacher_server_configs([APIServerConfig(base_url="http://a/v1")], yaml_config, flags)

    assert [server.base_url for server in servers] == urls


# Sending


async def test_every_token_gets_the_teacher_s_candidates(env: Mixed) -> None:
    group = a_scored_group()

    await env.handle_send_to_api(group)

    ids, logprobs = group["distill_token_ids"], group["distill_logprobs"]
    assert ids is not None
    assert logprobs is not None
    [width] = {len(position) for row in ids for position in row}
    assert width >= 2
    for tokens, id_rows, logprob_rows in zip(group["tokens"], ids, logprobs, strict=True):
        assert logprob_rows[0] == [NO_LOGPROB] * width, "nothing predicts the first token"
        assert [position[0] for position in id_rows[1:]] == tokens[1:]
        assert all(row[0] <= 0 and row[0] != NO_LOGPROB for row in logprob_rows[1:])
    assert env.sent == [group]


async def test_enriched_groups_fit_the_wire(env: Mixed) -> None:
    group = a_scored_group()

    await env.handle_send_to_api([group, None])
    columns = wire_group(group, group_id="g", env_id=1, run_id="r", ticket=None, origins={}, fallback_version=0)

    assert columns.distill_token_ids is not None
    assert columns.distill_token_ids.shape[0] == 10


async def test_top_k_0_keeps_the_tokens_themselves_although_engines_give_more(
    env: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(*, input_ids: list[int], top_k: int, **kwargs: Any) -> Any:
        return {
            "prompt_tokens": input_ids,
            "prompt_topk_token_ids": [[], *([token, 7] for token in input_ids[1:])],
            "prompt_topk_logprobs": [[], *([-1.0, -2.0] for _ in input_ids[1:])],
        }

    monkeypatch.setattr(env.teacher_server, "get_logprobs", answer)
    env.config = env.config.model_copy(update={"teacher_top_k": 0})
    group = a_scored_group()

    await env.handle_send_to_api(group)

    assert group["distill_token_ids"] == [[[0], *([token] for token in tokens[1:])] for tokens in group["tokens"]]
    assert group["distill_logprobs"] == [[[NO_LOGPROB], *([-1.0] for _ in tokens[1:])] for tokens in group["tokens"]]


async def test_a_teacher_that_fails_costs_its_column_and_not_the_group(
    env: Mixed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(*, input_ids: list[int], **kwargs: Any) -> Any:
        n = len(input_ids) - (input_ids[-1] == 99)
        return {"prompt_tokens": input_ids, "prompt_topk_token_ids": [[1]] * n, "prompt_topk_logprobs": [[-1.0]] * n}

    monkeypatch.setattr(env.teacher_server, "get_logprobs", answer)
    good, bad = a_scored_group(), a_scored_group()
    bad["tokens"] = [bad["tokens"][0], [*bad["tokens"][1][:-1], 99]]

    with caplog.at_level(logging.WARNING):
        await env.handle_send_to_api([good, bad])

    assert good["distill_logprobs"] == [[[-1.0]] * 5] * 2
    assert (bad["distill_token_ids"], bad["distill_logprobs"]) == (None, None)
    assert env.sent == [good, bad]
    assert "4 positions" in caplog.text
    assert (env.teacher_groups, env.teacher_failures) == (1, 1)


async def test_groups_that_are_not_sent_or_have_a_teacher_already_cost_it_nothing(
    env: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(**kwargs: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(env.teacher_server, "get_logprobs", never)
    taught = ScoredDataGroup(**a_scored_group(), distill_token_ids=[[[1]] * 5] * 2, distill_logprobs=[[[-1.0]] * 5] * 2)

    await env.handle_send_to_api([a_scored_group((1.0, 1.0)), taught])

    assert env.sent == [taught]
    assert taught["distill_token_ids"] == [[[1]] * 5] * 2
    assert env.teacher_failures == 0


async def test_what_the_teacher_saw_is_counted_and_starts_anew(env: Mixed) -> None:
    logged: list[dict[str, Any]] = []
    env.metrics_sink = logged.append
    await env.handle_send_to_api(a_scored_group())

    await env.wandb_log({})
    await env.wandb_log({"x": 1})

    assert (logged[0]["train/teacher_groups"], logged[0]["train/teacher_failures"]) == (1, 0)
    assert (logged[1]["train/teacher_groups"], logged[1]["x"]) == (0, 1)


async def test_the_teacher_s_connections_are_closed_too(env: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    async def close() -> None:
        closed.append(True)

    monkeypatch.setattr(env.teacher_server, "close", close)

    await env.aclose()

    assert closed == [True]


def test_a_server_baseline_stands_for_the_usual_ports(config: TeacherDistillationConfig) -> None:
    servers = ServerBaseline(server_type="vllm", tokenizer_name=config.tokenizer_name or "")

    env = build_env(Direct, config, POLICY, {"teacher": servers})

    assert env.teacher_server is not None
    assert len(env.teacher_server.servers) == 4
