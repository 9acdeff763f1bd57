"""Command lines of Atropos 0.4.0: what was typed there is understood here, and what went wrong there in silence does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import BaseModel, Field

from atroposlib.envs.base import (
    APIServerConfig,
    BaseEnv,
    BaseEnvConfig,
    EvalHandlingEnum,
    ScoredDataGroup,
    ServerBaseline,
)
from atroposlib.envs.server_handling.server_manager import ServerManagerConfig
from atroposlib.envs.teacher_distillation_env import TeacherDistillationConfig, TeacherDistillationEnv
from atroposlib.testing.builders import build_group
from rollout_server.config import ServerConfig
from tests.processes import rollout_server_on_a_thread

MODES = ("serve", "process", "evaluate")


class Level(Enum):
    EASY = "EASY"
    HARD = "HARD"


class Nested(BaseModel):
    depth: int = 1
    names: list[str] = []


class OldConfig(BaseEnvConfig):
    group_size: int = 6
    tokenizer_name: str | None = None
    words: list[str] = Field(default=["a", "b"])
    sizes: list[int] = Field(default=[1])
    limits: dict[str, float] = Field(default_factory=dict)
    level: Level = Level.EASY
    note: str | None = "n"
    nested: Nested = Nested()
    offset: int = 0


class OldEnv(BaseEnv):
    name: ClassVar[str | None] = "old"
    env_config_cls = OldConfig
    built: ClassVar[list[Any]] = []
    items: ClassVar[int] = 99

    def __init__(self, config: Any, server_configs: Any, slurm: bool = True, testing: bool = False) -> None:
        super().__init__(config, server_configs, slurm, testing)
        type(self).built.append((slurm, testing, self))

    @classmethod
    def config_init(cls) -> tuple[Any, Any]:
        return OldConfig(group_size=2, total_steps=3, wandb_name=None), cls.servers()

    @classmethod
    def servers(cls) -> Any:
        return [APIServerConfig(model_name="m", base_url="http://own:1/v1", api_key="k", timeout=7)]

    async def setup(self) -> None:
        self.iter = 0

    async def get_next_item(self) -> int | None:
        self.iter += 1
        return self.iter if self.iter <= self.items else None

    async def collect_trajectories(self, item: int) -> tuple[ScoredDataGroup, list[Any]]:
        return build_group(scores=(1.0, 1.0)), []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        await self.evaluate_log({"eval/x": 0.5})


class TwoServers(OldEnv):
    @classmethod
    def servers(cls) -> Any:
        return [APIServerConfig(model_name="m", base_url=f"http://own:{port}/v1", timeout=7) for port in (1, 2)]


class BareServer(OldEnv):
    @classmethod
    def servers(cls) -> Any:
        return APIServerConfig(model_name="m", base_url="http://own:1/v1", timeout=7)


class Baseline(OldEnv):
    @classmethod
    def servers(cls) -> Any:
        return ServerBaseline(model_name="m", timeout=7)


class TeacherConfig(OldConfig, TeacherDistillationConfig):
    pass


class Taught(OldEnv, TeacherDistillationEnv):
    env_config_cls = TeacherConfig

    @classmethod
    def config_init(cls) -> tuple[Any, Any]:
        return TeacherConfig(), cls.servers()


Type = Callable[..., Any]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_NODELIST", "WANDB_PROJECT", "ATROPOS_PROXY_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    """`python env.py WORDS`: exit status, stdout, stderr."""

    def run(cls: type[BaseEnv], *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["env.py", *words])
        status = 0
        try:
            cls.cli()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def resolved(run_cli: Type) -> Type:
    """What the words come to, as the YAML that --dry-run prints."""

    def resolve(cls: type[BaseEnv], mode: str, *words: str, file: Any = None) -> dict[str, Any]:
        if file is not None:
            Path("env.yaml").write_text(file if isinstance(file, str) else yaml.safe_dump(file))
            words = (*words, "--config", "env.yaml")
        status, out, err = run_cli(cls, mode, *words, "--dry-run")
        assert status == 0, err
        content: dict[str, Any] = yaml.safe_load(out)
        return content

    return resolve


# Flags

ENV_FLAGS: list[tuple[str, str, Any]] = [
    ("group_size", "8", 8),
    ("max_num_workers", "12", 12),
    ("max_num_workers", "-1", -1),
    ("max_eval_workers", "3", 3),
    ("max_num_workers_per_node", "9", 9),
    ("steps_per_eval", "-1", -1),
    ("max_token_length", "4096", 4096),
    ("eval_handling", "LIMIT_TRAIN", "LIMIT_TRAIN"),
    ("eval_limit_ratio", "0.1", 0.1),
    ("inference_weight", "-1", -1.0),
    ("batch_size", "64", 64),
    ("max_batches_offpolicy", "-1", -1),
    ("tokenizer_name", "org/model", "org/model"),
    ("use_wandb", "false", False),
    ("use_wandb", "True", True),
    ("rollout_server_url", "http://other:8000", "http://other:8000"),
    ("total_steps", "-1", -1),
    ("wandb_name", "mine", "mine"),
    ("num_rollouts_to_keep", "4", 4),
    ("num_rollouts_per_group_for_logging", "-1", -1),
    ("ensure_scores_are_not_same", "false", False),
    ("data_path_to_save_groups", "x.jsonl", "x.jsonl"),
    ("data_dir_to_save_evals", "evals", "evals"),
    ("min_items_sent_before_logging", "0", 0),
    ("include_messages", "true", True),
    ("min_batch_allocation", "0.25", 0.25),
    ("min_batch_allocation", "None", None),
    ("worker_timeout", "-1", -1.0),
    ("thinking_mode", "true", True),
    ("reasoning_effort", "high", "high"),
    ("max_reasoning_tokens", "2048", 2048),
    ("custom_thinking_prompt", "Think.", "Think."),
    ("level", "HARD", "HARD"),
    ("note", "None", None),
    ("note", "", ""),
    ("limits", '{"a": 1.5}', {"a": 1.5}),
    ("nested", '{"depth": 3}', {"depth": 3, "names": []}),
    ("offset", "-12", -12),
    ("words", '["x", "y"]', ["x", "y"]),
    ("sizes", "[-1, 2]", [-1, 2]),
]


def test_every_field_of_old_configs_has_its_flag_here() -> None:
    tested = {name for name, _, _ in ENV_FLAGS}
    upstream = {
        "group_size", "max_num_workers", "max_eval_workers", "max_num_workers_per_node", "steps_per_eval",
        "max_token_length", "eval_handling", "eval_limit_ratio", "inference_weight", "batch_size",
        "max_batches_offpolicy", "tokenizer_name", "use_wandb", "rollout_server_url", "total_steps", "wandb_name",
        "num_rollouts_to_keep", "num_rollouts_per_group_for_logging", "ensure_scores_are_not_same",
        "data_path_to_save_groups", "data_dir_to_save_evals", "min_items_sent_before_logging", "include_messages",
        "min_batch_allocation", "worker_timeout", "thinking_mode", "reasoning_effort", "max_reasoning_tokens",
        "custom_thinking_prompt",
    }  # fmt: skip

    assert upstream <= tested
    assert upstream <= set(BaseEnvConfig.model_fields)


@pytest.mark.parametrize(("name", "word", "value"), ENV_FLAGS)
def test_a_flag_of_the_environment_in_both_spellings(resolved: Type, name: str, word: str, value: Any) -> None:
    for words in ((f"--env.{name}", word), (f"--env.{name}={word}",)):
        got = resolved(OldEnv, "serve", *words)["env"][name]
        assert (got, type(got)) == (value, type(value))


def test_the_words_of_a_list_are_all_taken(resolved: Type) -> None:
    env = resolved(OldEnv, "serve", "--env.words", "x", "y z", "--env.sizes", "-1", "0", "1")["env"]

    assert (env["words"], env["sizes"]) == (["x", "y z"], [-1, 0, 1])


SERVER_FLAGS: list[tuple[str, str, Any]] = [
    ("timeout", "30", 30),
    ("num_max_requests_at_once", "16", 16),
    ("num_requests_for_eval", "8", 8),
    ("model_name", "other", "other"),
    ("rolling_buffer_length", "10", 10),
    ("server_type", "sglang", "sglang"),
    ("tokenizer_name", "org/t", "org/t"),
    ("base_url", "http://there:9/v1", "http://there:9/v1"),
    ("n_kwarg_is_ignored", "true", True),
    ("health_check", "false", False),
]


@pytest.mark.parametrize("mode", MODES)
def test_every_flag_of_the_servers_in_every_mode(resolved: Type, mode: str) -> None:
    words = [word for name, text, _ in SERVER_FLAGS for word in (f"--openai.{name}", text)]

    [server] = resolved(OldEnv, mode, *words)["openai"]

    assert {name: server[name] for name, _, _ in SERVER_FLAGS} == {name: value for name, _, value in SERVER_FLAGS}
    assert set(APIServerConfig.model_fields) >= {"api_key", *server}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("slurm", "true", True),
        ("slurm", "False", False),
        ("testing", "true", True),
        ("max_n_completions", "20", 20),
        ("proxy_url", "http://p:1", "http://p:1"),
    ],
)
def test_a_flag_of_the_manager_has_no_prefix(resolved: Type, mode: str, name: str, word: str, value: Any) -> None:
    assert resolved(OldEnv, mode, f"--{name}", word)[name] == value
    assert name in ServerManagerConfig.model_fields


def test_slurm_and_testing_reach_the_constructor_and_the_rest_the_manager(run_cli: Type) -> None:
    OldEnv.built.clear()

    for words in ((), ("--testing", "true", "--max_n_completions", "20", "--proxy_url", "http://p:1")):
        assert run_cli(OldEnv, "evaluate", *words)[0] == 0

    (plain, is_testing, _), (slurm, testing, env) = OldEnv.built
    assert (plain, is_testing, slurm, testing) == (False, False, False, True)
    assert (env.server.max_n_completions, env.server.proxy_url) == (20, "http://p:1")


def test_teacher_flags_are_those_of_teacher_environments(resolved: Type, run_cli: Type) -> None:
    words = ("--teacher.base_url", "http://t:1/v1", "--teacher.server_type", "vllm", "--env.teacher_top_k", "-1")

    found = resolved(Taught, "serve", *words)

    assert found["teacher"][0]["base_url"] == "http://t:1/v1"
    assert found["env"]["teacher_top_k"] == -1
    assert run_cli(OldEnv, "serve", *words[:2], "--dry-run")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "serve"),
        (("train",), "unknown command 'train'"),
        (("serve", "--env.grop_size", "4"), "did you mean --env.group_size?"),
        (("serve", "--openai.url", "x"), "unknown option --openai.url"),
        (("serve", "--env.group_size", "four"), "--group_size 'four'"),
        (("serve", "--env.group_size"), "needs a value"),
        (("serve", "--env.eval_handling", "SOMETIMES"), "STOP_TRAIN"),
        (("serve", "stray"), "unexpected argument 'stray'"),
        (("serve", "--env.words", "[x, y"), "neither JSON nor YAML"),
        (("serve", "--config", "nowhere.yaml"), "nowhere.yaml"),
        (("process", "--env.reasoning_effort", "wild"), "reasoning_effort"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_told_with_status_2_and_no_traceback(run_cli: Type, words: tuple[str, ...], said: str) -> None:
    status, out, err = run_cli(OldEnv, *words)

    assert status == 2
    assert said in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("mode", MODES)
def test_help_shows_what_really_is_the_default(run_cli: Type, mode: str) -> None:
    status, out, _ = run_cli(OldEnv, mode, "--help")

    assert status == 0
    assert re.search(r"--group_size int\n[^\n]*\b2\b", out), "config_init's 2, not the class's 6"
    for name in ("--env.", "--openai.", "--config", "--slurm", "--max_n_completions"):
        assert name in out


# Precedence and files


def test_flags_over_file_over_the_mode_over_config_init(resolved: Type) -> None:
    file = {"env": {"total_steps": 20, "include_messages": False}}

    assert resolved(OldEnv, "process")["env"]["include_messages"] is True
    assert resolved(OldEnv, "process", file=file)["env"]["include_messages"] is False
    assert resolved(OldEnv, "process", "--env.include_messages", "true", file=file)["env"]["include_messages"] is True
    assert resolved(OldEnv, "serve")["env"]["total_steps"] == 3
    assert resolved(OldEnv, "serve", file=file)["env"]["total_steps"] == 20
    assert resolved(OldEnv, "serve", "--env.total_steps", "5", file=file)["env"]["total_steps"] == 5
    assert resolved(OldEnv, "serve", file=file)["env"]["group_size"] == 2


def test_a_flag_with_the_class_default_still_wins_over_the_file(resolved: Type) -> None:
    assert resolved(OldEnv, "serve", "--env.group_size", "6", file={"env": {"group_size": 9}})["env"]["group_size"] == 6


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "env:\n", "openai:\n"])
def test_an_empty_file_or_section_changes_nothing(resolved: Type, text: str) -> None:
    assert resolved(OldEnv, "serve", file=text) == resolved(OldEnv, "serve")


def test_keys_of_the_command_itself_stand_at_the_top_of_the_file(resolved: Type) -> None:
    file = {"slurm": True, "testing": True, "max_n_completions": 3, "proxy_url": "http://p:1"}

    assert {name: resolved(OldEnv, "serve", file=file)[name] for name in file} == file
    assert resolved(OldEnv, "serve", "--slurm", "false", file=file)["slurm"] is False


def test_unknown_keys_of_a_file_are_passed_over(run_cli: Type) -> None:
    Path("env.yaml").write_text(
        "env: {score_buffer_size: 4, group_size: 3}\nopenai: [{weight: 1.0, base_url: 'http://a/v1'}]\n"
    )

    status, out, err = run_cli(OldEnv, "serve", "--config", "env.yaml", "--dry-run")

    assert status == 0
    assert yaml.safe_load(out)["env"]["group_size"] == 3
    assert "score_buffer_size" in err


def urls(found: dict[str, Any]) -> list[str]:
    return [server.get("base_url", "the usual ports") for server in found["openai"]]


def test_a_file_of_several_servers_replaces_the_default_with_the_fields_own_defaults(
    resolved: Type, run_cli: Type
) -> None:
    file = {"openai": [{"base_url": "http://a/v1"}, {"base_url": "http://b/v1", "model_name": "n"}]}

    found = resolved(OldEnv, "serve", file=file)

    assert urls(found) == ["http://a/v1", "http://b/v1"]
    assert [server["model_name"] for server in found["openai"]] == ["default", "n"]
    assert [server["timeout"] for server in found["openai"]] == [1200, 1200]
    status, _, err = run_cli(OldEnv, "serve", "--config", "env.yaml", "--openai.timeout", "3", "--dry-run")
    assert status == 2
    assert "which of the file's servers" in err


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("section", [{"model_name": "n"}, [{"model_name": "n"}]], ids=["mapping", "list of one"])
def test_one_server_of_a_file_changes_the_default(resolved: Type, mode: str, section: Any) -> None:
    [server] = resolved(OldEnv, mode, "--openai.timeout", "3", file={"openai": section})["openai"]

    assert (server["model_name"], server["timeout"], server["base_url"]) == ("n", 3, "http://own:1/v1")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", [OldEnv, TwoServers, BareServer, Baseline])
def test_a_base_url_means_one_server_whatever_the_default_was(resolved: Type, cls: type[BaseEnv], mode: str) -> None:
    there = "http://there:9/v1"
    by_flag = resolved(cls, mode, "--openai.base_url", there)
    by_file = resolved(cls, mode, file={"openai": {"base_url": there}})

    for found in (by_flag, by_file):
        assert urls(found) == [there]
        assert (found["openai"][0]["model_name"], found["openai"][0]["timeout"]) == ("m", 7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", [OldEnv, TwoServers, BareServer, Baseline])
def test_other_options_change_every_default_server(resolved: Type, cls: type[BaseEnv], mode: str) -> None:
    before = resolved(cls, mode)
    after = resolved(cls, mode, "--openai.model_name", "n")

    assert urls(after) == urls(before)
    assert {server["model_name"] for server in after["openai"]} == {"n"}


@pytest.mark.parametrize("mode", ["process", "evaluate"])
def test_a_bare_config_is_one_server_at_its_address(run_cli: Type, mode: str) -> None:
    BareServer.built.clear()

    assert run_cli(BareServer, mode)[0] == 0

    [(_, _, env)] = BareServer.built
    assert [server.config.base_url for server in env.server.servers] == ["http://own:1/v1"]


# Modes


def test_what_the_modes_change(resolved: Type) -> None:
    serve, process, evaluate = (resolved(OldEnv, mode)["env"] for mode in MODES)

    names = ("ensure_scores_are_not_same", "include_messages", "data_path_to_save_groups", "use_wandb")
    assert [serve[name] for name in names] == [True, False, None, True]
    assert [process[name] for name in names] == [False, True, "data/old.jsonl", True]
    assert [evaluate[name] for name in names] == [True, False, None, True]


@pytest.mark.parametrize("mode", MODES)
def test_an_environment_has_a_name_in_every_mode(resolved: Type, mode: str) -> None:
    nameless = type("Nameless", (OldEnv,), {"name": None})

    assert resolved(OldEnv, mode)["env"]["wandb_name"] == "old"
    assert resolved(nameless, mode)["env"]["wandb_name"] == "Nameless"


def test_process_writes_total_steps_groups_and_sets_its_attributes(run_cli: Type) -> None:
    OldEnv.built.clear()

    status, out, _ = run_cli(OldEnv, "process", "--env.total_steps", "4")

    lines = [json.loads(line) for line in Path("data/old.jsonl").read_text().splitlines()]
    [(_, _, env)] = OldEnv.built
    assert status == 0
    assert len(lines) == 4
    assert Path("data/old.html").exists()
    assert (env.process_mode, env.n_groups_to_process, env.group_size_to_process) == (True, 4, 2)
    assert "4 groups" in out


def test_process_ends_when_there_is_no_item(run_cli: Type) -> None:
    short = type("Short", (OldEnv,), {"items": 2})

    assert run_cli(short, "process", "--env.total_steps", "10")[0] == 0
    assert len(Path("data/old.jsonl").read_text().splitlines()) == 2


def test_process_ends_with_status_1_when_nothing_comes_out(run_cli: Type) -> None:
    async def fail(self: Any, item: Any) -> Any:
        raise RuntimeError("no such thing")

    broken = type("Broken", (OldEnv,), {"collect_trajectories": fail})

    status, _, err = run_cli(broken, "process")

    assert status == 1
    assert "no such thing" in err


def test_evaluate_writes_its_configuration_which_can_be_given_back(run_cli: Type, resolved: Type) -> None:
    words = ("--env.data_dir_to_save_evals", "evals", "--env.group_size", "5", "--openai.timeout", "9")

    assert run_cli(OldEnv, "evaluate", *words)[0] == 0

    written = Path("evals/evaluate_config.yaml").read_text()
    again = resolved(OldEnv, "evaluate", file=written)
    assert json.loads(Path("evals/metrics.json").read_text())["results"]["all"] == {"eval/x": 0.5}
    assert set(yaml.safe_load(written)["env"]) == set(OldConfig.model_fields)
    assert again == yaml.safe_load(written)
    assert (again["env"]["group_size"], again["openai"][0]["timeout"]) == (5, 9)


def test_serve_without_a_trainer_says_so_with_status_1(run_cli: Type) -> None:
    with rollout_server_on_a_thread(ServerConfig(port=0, store="memory")) as url:
        words = ("--env.rollout_server_url", f"{url}/", "--env.server_deadline_s", "0.1")
        status, _, err = run_cli(OldEnv, "serve", *words)

    assert status == 1
    assert "no trainer opened a run" in err
    assert "Traceback" not in err


def test_the_enum_of_evaluation_handling_has_its_old_values() -> None:
    assert {member.name: member.value for member in EvalHandlingEnum} == {
        "STOP_TRAIN": "STOP_TRAIN",
        "LIMIT_TRAIN": "LIMIT_TRAIN",
        "NONE": "NONE",
    }
