"""TeacherGRPOTrainer: the documented methods without a training run, and training as GRPOTrainer does it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atroposlib.errors import ConfigError
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.diagnosis import diagnose
from atroposlib.testing.byte_tokenizer import save_byte_tokenizer
from atroposlib.testing.mock.policies import as_policy
from atroposlib.testing.mock_inference import MockInferenceServer, in_thread
from tests.trainer.fakes import FakeRolloutServer, a_config, tiny_llama
from trainer.teacher import TeacherGRPOTrainer

DIAGNOSIS = diagnose("What is 17 + 25?", "First I add the ones.", tokens=6)


@pytest.fixture(scope="module")
def tokenizer_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def teacher() -> Iterator[MockInferenceServer]:
    with in_thread(MockInferenceServer("<teaching>Carry the one.</teaching>")) as server:
        yield server


@pytest.fixture
def student() -> Iterator[MockInferenceServer]:
    with in_thread(MockInferenceServer("First I add the ones.")) as server:
        yield server


def a_trainer(
    folder: Path, tokenizer_name: str, *, urls: list[str] | None = None, **options: Any
) -> TeacherGRPOTrainer:
    config = a_config(folder, inference_servers=urls or [], tokenizer_name_or_path=tokenizer_name)
    return TeacherGRPOTrainer(config, model=tiny_llama(), **options)


@pytest.fixture
def trainer(
    tmp_path: Path, tokenizer_name: str, teacher: MockInferenceServer, student: MockInferenceServer
) -> TeacherGRPOTrainer:
    return a_trainer(
        tmp_path, tokenizer_name, urls=[teacher.root_url], student_model="frozen", student_server=student.url
    )


def test_the_methods_ask_the_servers_without_a_training_run(
    trainer: TeacherGRPOTrainer, teacher: MockInferenceServer, student: MockInferenceServer
) -> None:
    diagnosis = trainer.diagnostic_probe("What is 17 + 25?")
    guidance = trainer.generate_guidance("What is 17 + 25?", diagnosis)

    assert diagnosis.approach == "First I add the ones."
    assert guidance == "Carry the one."
    assert (student.requests[0]["model"], student.requests[0]["max_tokens"]) == ("frozen", 50)
    assert teacher.requests[0]["sampling_params"]["max_tokens"] == 200
    assert trainer.compute_teaching_reward(0.6, 0.8, 120) == pytest.approx(0.290909, abs=1e-6)


async def test_they_work_where_an_event_loop_runs_already(trainer: TeacherGRPOTrainer) -> None:
    assert asyncio.get_running_loop().is_running()

    assert trainer.diagnostic_probe("What is 17 + 25?").probe_tokens > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((7,), TypeError, "task must be a text"),
        (("task", "50"), TypeError, "max_tokens must be a whole number"),
        ((" ",), ValueError, "task must not be empty"),
        (("task", 0), ValueError, "max_tokens=0 must be at least 1"),
    ],
)
def test_what_a_probe_refuses_is_refused_before_anything_is_asked(
    tmp_path: Path, tokenizer_name: str, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        a_trainer(tmp_path, tokenizer_name).diagnostic_probe(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((7, None, 0), TypeError, "task must be a text"),
        (("task", "diagnosis"), TypeError, "diagnostic must be a DiagnosticResult"),
        (("task", DIAGNOSIS, 20.0), TypeError, "max_tokens must be a whole number"),
        (("", DIAGNOSIS), ValueError, "task must not be empty"),
        (("task", None), ValueError, "diagnostic must not be None"),
        (("task", DIAGNOSIS, 9), ValueError, "max_tokens=9 must be at least 10"),
    ],
)
def test_what_guidance_refuses_is_refused_before_anything_is_asked(
    tmp_path: Path, tokenizer_name: str, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        a_trainer(tmp_path, tokenizer_name).generate_guidance(*arguments)


@pytest.mark.parametrize(
    ("scores", "error"), [((True, 0.5, 1), TypeError), ((1.1, 0.5, 1), ValueError), ((0.5, 0.5, -1), ValueError)]
)
def test_what_a_reward_refuses(tmp_path: Path, tokenizer_name: str, scores: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        a_trainer(tmp_path, tokenizer_name).compute_teaching_reward(*scores)


def test_servers_that_refuse_are_a_runtime_error_with_its_cause(
    trainer: TeacherGRPOTrainer,
    teacher: MockInferenceServer,
    student: MockInferenceServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(method: str, path: str, body: dict[str, Any]) -> Any:
        return 404, {"error": {"message": "no such model"}}

    for server in (teacher, student):
        monkeypatch.setattr(server, "_answer", refuse)
    with pytest.raises(RuntimeError, match=r"the student could not be asked: .*answered 404") as probing:
        trainer.diagnostic_probe("What is 17 + 25?")
    with pytest.raises(RuntimeError, match=r"the teacher could not be asked: .*answered 404") as guiding:
        trainer.generate_guidance("What is 17 + 25?", DIAGNOSIS)

    assert isinstance(probing.value.__cause__, ConfigError)
    assert isinstance(guiding.value.__cause__, ConfigError)


@pytest.mark.parametrize("written", ["", "<thinking>hm</thinking>", "<teaching> </teaching>"])
def test_a_teacher_that_writes_nothing_is_a_runtime_error(
    trainer: TeacherGRPOTrainer, teacher: MockInferenceServer, written: str
) -> None:
    teacher.policy = as_policy(written)

    with pytest.raises(RuntimeError, match="wrote nothing"):
        trainer.generate_guidance("What is 17 + 25?", DIAGNOSIS)


def test_a_teacher_on_sglang_is_asked_by_its_own_route(
    tmp_path: Path, tokenizer_name: str, teacher: MockInferenceServer
) -> None:
    trainer = a_trainer(tmp_path, tokenizer_name, urls=[teacher.root_url], server_type="sglang", student_model="frozen")

    assert trainer.generate_guidance("What is 17 + 25?", DIAGNOSIS) == "Carry the one."
    assert teacher.routes["/generate"] == 1


async def test_the_student_s_server_is_as_the_arguments_say(tmp_path: Path, tokenizer_name: str) -> None:
    options = {"student_model": "hosted", "student_server_type": "sglang", "student_api_key": "sk-1"}
    env = a_trainer(tmp_path, tokenizer_name, urls=["http://localhost:1"], **options).make_env()
    await env.aclose()

    [server] = env.student.server.servers
    assert (server.config.model_name, server.config.server_type, server.config.api_key) == ("hosted", "sglang", "sk-1")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"server_type": "openai"}, "server_type='openai' is none of vllm, sglang"),
        ({"student_server_type": "tgi"}, "student_server_type='tgi' is none of openai, vllm, sglang, trl"),
    ],
)
def test_a_server_type_that_cannot_be_asked_is_refused(
    tmp_path: Path, tokenizer_name: str, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        a_trainer(tmp_path, tokenizer_name, **option)


@pytest.mark.parametrize("student_model", [None, ""])
def test_a_student_without_a_name_is_not_asked(
    tmp_path: Path, tokenizer_name: str, student: MockInferenceServer, student_model: str | None
) -> None:
    trainer = a_trainer(
        tmp_path,
        tokenizer_name,
        urls=["http://localhost:1"],
        student_model=student_model,
        student_server=student.url,
    )

    with pytest.raises(ConfigError, match="give student_model=NAME"):
        trainer.diagnostic_probe("What is 17 + 25?")
    assert student.requests == []


def test_the_student_s_name_may_be_among_the_protocol_s_options(
    tmp_path: Path, tokenizer_name: str, teacher: MockInferenceServer, student: MockInferenceServer
) -> None:
    options = TeacherEnvConfig(tokenizer_name=tokenizer_name, student_model="named")

    a_trainer(
        tmp_path, tokenizer_name, urls=[teacher.root_url], student_server=student.url, teacher_env=options
    ).diagnostic_probe("What is 17 + 25?")

    assert student.requests[0]["model"] == "named"


def test_options_reach_the_protocol(tmp_path: Path, tokenizer_name: str) -> None:
    options = TeacherEnvConfig(tokenizer_name=tokenizer_name, logging_prob=0.5, degradation_penalty_multiplier=3.0)

    trainer = a_trainer(
        tmp_path,
        tokenizer_name,
        teacher_env=options,
        use_reference_teacher_model=True,
        reference_server="http://localhost:1/v1",
    )

    assert trainer.teacher_env.use_reference_teacher_model
    assert (trainer.teacher_env.logging_prob, trainer.teacher_env.tokenizer_name) == (0.5, tokenizer_name)
    assert trainer.compute_teaching_reward(0.8, 0.6, 120) == pytest.approx(-0.6)


async def test_the_reference_is_asked_at_its_server(
    tmp_path: Path, tokenizer_name: str, teacher: MockInferenceServer, student: MockInferenceServer
) -> None:
    trainer = a_trainer(
        tmp_path,
        tokenizer_name,
        urls=[teacher.root_url],
        student_model="frozen",
        student_server=student.url,
        use_reference_teacher_model=True,
        reference_server="http://localhost:1/v1",
    )
    env = trainer.make_env()
    await env.aclose()

    assert env.reference is not None
    [server] = env.reference.server.servers
    assert server.config.base_url == "http://localhost:1/v1"
    assert env.reference.model_names == [trainer.args.model_name_or_path]


def test_a_model_in_memory_is_no_student(tmp_path: Path, tokenizer_name: str) -> None:
    with pytest.raises(ConfigError, match="expected a name"):
        a_trainer(tmp_path, tokenizer_name, student_model=tiny_llama())


@pytest.mark.parametrize(
    "name", ["reward_funcs", "train_dataset", "eval_dataset", "reward_weights", "reward_model", "local"]
)
def test_local_mode_which_knows_no_student_is_refused(tmp_path: Path, tokenizer_name: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"takes no {name}: .*recipe=teacher_quickstart"):
        a_trainer(tmp_path, tokenizer_name, **{name: []})


def test_absent_arguments_of_local_mode_may_be_named(tmp_path: Path, tokenizer_name: str) -> None:
    assert a_trainer(tmp_path, tokenizer_name, train_dataset=None, reward_funcs=None).local is None


def test_a_reference_teacher_needs_a_server(tmp_path: Path, tokenizer_name: str) -> None:
    with pytest.raises(ConfigError, match="needs reference_server"):
        a_trainer(tmp_path, tokenizer_name, use_reference_teacher_model=True)


def test_without_servers_the_methods_say_what_is_missing(tmp_path: Path, tokenizer_name: str) -> None:
    with pytest.raises(ConfigError, match="inference_servers"):
        a_trainer(tmp_path, tokenizer_name).diagnostic_probe("task")


def test_training_is_that_of_grpo(tmp_path: Path, tokenizer_name: str) -> None:
    server = FakeRolloutServer()

    a_trainer(tmp_path, tokenizer_name, student_model="frozen", connect=server.client).train()

    assert [event[1] for event in server.said("ack")] == [0, 1, 2]
