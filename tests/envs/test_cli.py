"""The command line of an environment, in the user's words."""

from __future__ import annotations

import contextlib
import json
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ServerBaseline
from atroposlib.envs.cli import main
from atroposlib.envs.command_line.commands import command_class
from atroposlib.envs.command_line.launching import build, mode_defaults
from atroposlib.envs.command_line.options import UsageError, resolve
from atroposlib.envs.server_handling.server_manager import server_list
from atroposlib.envs.server_pools import handed_over
from atroposlib.errors import AtroposError, ConfigError
from environments.teaching import TeachingConfig, TeachingEnv
from tests.envs.fakes import a_scored_group


class Flavour(Enum):
    SWEET = "SWEET"
    SOUR = "SOUR"


class TaskConfig(BaseEnvConfig):
    tokenizer_name: str | None = None
    bias: float = 0.0
    words: list[str] = Field(default=["a"], description="Words to use.")
    numbers: list[int] = Field(default=[])
    flavour: Flavour = Flavour.SWEET
    limits: dict[str, int] = Field(default={})
    maybe: int | None = 3
    max_token_length: int = 64


class TaskEnv(BaseEnv):
    """A task for tests."""

    name: ClassVar[str | None] = "task"
    env_config_cls = TaskConfig
    servers: ClassVar[Any] = [APIServerConfig(base_url="http://default:1/v1", model_name="m", server_type="vllm")]

    @classmethod
    def config_init(cls) -> tuple[TaskConfig, Any]:
        return TaskConfig(group_size=16, total_steps=3), cls.servers

    async def get_next_item(self) -> int:
        return 1

    async def collect_trajectories(self, item: int) -> Any:
        return {**a_scored_group(), "messages": [[{"role": "user", "content": "hi"}]] * 2}, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"heldout_reward": 0.25}


class TwoServers(TaskEnv):
    servers: ClassVar[Any] = [APIServerConfig(base_url=f"http://s{i}:1/v1", model_name="m") for i in range(2)]


class Baseline(TaskEnv):
    servers: ClassVar[Any] = ServerBaseline(timeout=7)


def env_of(*argv: str) -> Any:
    return resolve(TaskEnv, argv, mode_defaults={}).env


def servers_of(cls: type[BaseEnv], *argv: str) -> Any:
    return resolve(cls, argv, mode_defaults={}).servers


def test_both_spellings_of_a_flag() -> None:
    for argv in (["--group_size", "8"], ["--env.group_size", "8"], ["--group_size=8"], ["--env.group-size=8"]):
        assert env_of(*argv).group_size == 8
    assert env_of().group_size == 16, "config_init's value, not the class's"


def test_values_keep_their_meaning() -> None:
    config = env_of(
        "--total_steps", "-1", "--bias", "-0.5", "--words", "x", "y z", "--numbers", "[1, 2]", "--flavour", "SOUR",
        "--limits", '{"a": 1}', "--maybe", "None", "--use_wandb", "--include_messages", "false",
    )  # fmt: skip

    assert (config.total_steps, config.bias, config.words, config.numbers) == (-1, -0.5, ["x", "y z"], [1, 2])
    assert (config.flavour, config.limits, config.maybe, config.use_wandb, config.include_messages) == (
        Flavour.SOUR,
        {"a": 1},
        None,
        True,
        False,
    )
    assert env_of("--wandb_name", "None").wandb_name is None


def test_flags_win_over_the_file_over_config_init(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text(yaml.safe_dump({"env": {"group_size": 4, "total_steps": 9}, "openai": {"model_name": "from-file"}}))

    resolved = resolve(
        TaskEnv, ["--config", str(file), "--group_size", "2"], mode_defaults={"total_steps": 5, "bias": 1.5}
    )
    env: Any = resolved.env
    [server] = server_list(resolved.servers)

    assert (env.group_size, env.total_steps, env.bias) == (2, 9, 1.5)
    assert server.model_name == "from-file"
    assert server.base_url == "http://default:1/v1"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")

    assert env_of("--config", str(tmp_path / "empty.yaml")).group_size == 16


def test_what_a_dry_run_prints_can_be_given_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(TaskEnv, ["serve", "--group_size", "2", "--openai.model_name", "other", "--dry-run"])
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)

    again = resolve(TaskEnv, ["--config", str(tmp_path / "again.yaml")], mode_defaults={})

    assert yaml.safe_load(printed)["env"]["group_size"] == 2
    assert again.as_yaml() == printed


def test_a_base_url_means_exactly_one_server() -> None:
    for cls in (TaskEnv, TwoServers, Baseline):
        [server] = servers_of(cls, "--openai.base_url", "http://x:9/v1")
        assert server.base_url == "http://x:9/v1"
    assert servers_of(Baseline, "--openai.base_url", "http://x:9/v1")[0].timeout == 7


def test_other_server_options_change_every_server() -> None:
    assert [server.model_name for server in servers_of(TwoServers, "--openai.model_name", "n")] == ["n", "n"]
    assert servers_of(Baseline, "--openai.timeout", "3") == ServerBaseline(timeout=3)


def test_a_file_may_list_several_servers(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text(
        yaml.safe_dump({"openai": [{"base_url": "http://a/v1"}, {"base_url": "http://b/v1", "weight": 1.0}]})
    )

    assert [server.base_url for server in servers_of(TaskEnv, "--config", str(file))] == ["http://a/v1", "http://b/v1"]
    with pytest.raises(UsageError, match="which of the file's servers"):
        servers_of(TaskEnv, "--config", str(file), "--openai.model_name", "n")


@pytest.mark.parametrize(
    ("argv", "error", "hint"),
    [
        (["serve", "--group_sise", "8"], "unknown option --group_sise", "did you mean --group_size?"),
        (["serve", "--openai.base_uri", "x"], "unknown option --openai.base_uri", "--openai.base_url"),
        (["serve", "--group_size", "many"], "--group_size 'many'", "Sequences per group"),
        (["serve", "--group_size", "0"], "--group_size '0'", "Sequences per group"),
        (["serve", "--group_size"], "--group_size needs a value", "--group_size VALUE"),
        (["serve", "--group_size", "1", "2"], "--group_size takes one value", "quote"),
        (["serve", "8"], "unexpected argument '8'", "--group_size 8"),
        (["serve", "--flavour", "BITTER"], "--flavour 'BITTER'", ""),
        (["serve", "--config", "/nowhere.yaml"], "cannot read --config /nowhere.yaml", ""),
        (["train"], "unknown command 'train'", "serve, process, evaluate"),
    ],
)
def test_a_mistake_is_named_with_a_hint_and_status_2(
    argv: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(TaskEnv, argv)

    stderr = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert stderr.startswith(f"error: {error}")
    assert hint in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [("- 1", "must hold"), ("{", "not YAML"), ("env: 3", "must be a mapping"), ("openai: [1, 2]", "must be a mapping")],
)
def test_a_mistake_in_the_file_is_named_too(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)

    with pytest.raises(SystemExit) as exit_info:
        main(TaskEnv, ["serve", "--config", str(tmp_path / "bad.yaml")])

    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err


def test_unknown_keys_of_the_file_are_ignored_with_a_warning_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("env: {group_sise: 1, group_size: 5}\nopenia: {}\nopenai: {weight: 1.0, base_uri: x}\n")

    main(TaskEnv, ["serve", "--config", str(file), "--dry-run"])

    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["env"]["group_size"] == 5
    assert printed.err.splitlines() == [
        f"warning: {file}: unknown key 'openia' is ignored; did you mean openai?",
        f"warning: {file}: env: unknown key 'group_sise' is ignored; did you mean group_size?",
        f"warning: {file}: openai: unknown key 'base_uri' is ignored; did you mean base_url?",
    ]


def test_no_command_is_usage_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(TaskEnv, [])

    assert exit_info.value.code == 2
    assert "{serve|process|evaluate}" in capsys.readouterr().err


def test_the_root_options_may_stand_in_the_file_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("slurm: true\ntesting: true\nmax_n_completions: 3\nproxy_url: http://p:1\n")

    root = resolve(TaskEnv, ["--config", str(tmp_path / "e.yaml"), "--slurm", "false"], mode_defaults={}).root

    assert (root.slurm, root.testing, root.max_n_completions, root.proxy_url) == (False, True, 3, "http://p:1")


def test_n_completions_and_proxy_reach_the_server_manager() -> None:
    env = build(
        TaskEnv,
        resolve(TaskEnv, ["--max_n_completions", "3", "--proxy_url", "http://p:1"], mode_defaults={}),
    )
    manager: Any = env.server

    assert (manager.max_n_completions, manager.proxy_url, manager.use_proxy) == (3, "http://p:1", True)


@pytest.mark.parametrize(("own_name", "expected"), [("task", "task"), (None, "Nameless")])
def test_wandb_name_falls_back_to_the_name_then_the_class(own_name: str | None, expected: str) -> None:
    nameless = type("Nameless", (TaskEnv,), {"name": own_name})

    assert mode_defaults(nameless, "serve", TaskConfig())["wandb_name"] == expected
    assert "wandb_name" not in mode_defaults(nameless, "serve", TaskConfig(wandb_name="mine"))


def test_an_api_key_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["serve", "--openai.api_key", "s3cret", "--dry-run"], ["serve", "--help"]):
        with contextlib.suppress(SystemExit):
            main(
                type("Secret", (TaskEnv,), {"servers": [APIServerConfig(base_url="http://x/v1", api_key="s3cret")]}),
                argv,
            )

    assert "s3cret" not in capsys.readouterr().out


def test_defaults_that_the_class_does_not_check_survive() -> None:
    class OldConfig(TaskConfig):
        prompt: str = None  # type: ignore[assignment]

    class OldEnv(TaskEnv):
        @classmethod
        def config_init(cls) -> tuple[OldConfig, Any]:
            return OldConfig(group_size=3), cls.servers

    env: Any = resolve(OldEnv, ["--bias", "2"], mode_defaults={}).env
    assert (env.prompt, env.group_size, env.bias) == (None, 3, 2.0)


def test_a_mapping_in_the_file_changes_the_keys_that_it_names(tmp_path: Path) -> None:
    class Judge(BaseModel):
        model: str = "small"
        votes: int = 1

    class JudgeConfig(TaskConfig):
        judge: Judge = Judge()
        limits: dict[str, int] = Field(default={})

    class JudgeEnv(TaskEnv):
        @classmethod
        def config_init(cls) -> tuple[JudgeConfig, Any]:
            return JudgeConfig(judge=Judge(votes=3), limits={"a": 1, "b": 2}), cls.servers

    (tmp_path / "e.yaml").write_text("env: {judge: {model: big}, limits: {b: 5}}")
    env: Any = resolve(JudgeEnv, ["--config", str(tmp_path / "e.yaml")], mode_defaults={}).env

    assert (env.judge.model, env.judge.votes) == ("big", 3)
    assert env.limits == {"a": 1, "b": 5}
    flagged: Any = resolve(JudgeEnv, ["--judge", '{"votes": 9}', "--limits", "{}"], mode_defaults={}).env
    assert (flagged.judge.votes, flagged.limits) == (9, {})


def test_it_keeps_the_other_keys_of_what_only_the_class_sets(tmp_path: Path) -> None:
    class Penalty(BaseModel):
        cap: float = 1.0
        repeats: int = 1

    class Judge(BaseModel):
        model: str = "small"
        votes: int = 1
        penalty: Penalty = Penalty(repeats=4)

    class JudgeConfig(TaskConfig):
        judge: Judge = Judge(votes=3)
        second: Judge | None = None

    class JudgeEnv(TaskEnv):
        @classmethod
        def config_init(cls) -> tuple[JudgeConfig, Any]:
            return JudgeConfig(), cls.servers

    (tmp_path / "e.yaml").write_text("env: {judge: {model: big, penalty: {cap: 0.5}}, second: {model: other}}")
    env: Any = resolve(JudgeEnv, ["--config", str(tmp_path / "e.yaml")], mode_defaults={}).env

    assert env.judge == Judge(model="big", votes=3, penalty=Penalty(cap=0.5, repeats=4))
    assert env.second == Judge(model="other")


def test_a_section_of_the_data_keeps_the_data_set_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("env: {data: {eval_split_ratio: 0.1}}")

    data = resolve(TeachingEnv, ["--config", str(tmp_path / "e.yaml")], mode_defaults={}).env.data  # type: ignore[attr-defined]

    usual = TeachingConfig().data
    assert data == usual.model_copy(update={"eval_split_ratio": 0.1})
    assert data != usual


def test_a_field_that_yaml_cannot_hold_does_not_stop_a_dry_run() -> None:
    class OddConfig(TaskConfig):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        odd: object = object()

    class OddEnv(TaskEnv):
        @classmethod
        def config_init(cls) -> tuple[OddConfig, Any]:
            return OddConfig(), cls.servers

    assert "odd: <object" in resolve(OddEnv, [], mode_defaults={}).as_yaml()


def test_servers_of_a_class_of_their_own_keep_it() -> None:
    class Special(APIServerConfig):
        region: str = "here"

    special = type("SpecialEnv", (TaskEnv,), {"servers": [Special(base_url="http://x/v1")]})

    [server] = servers_of(special, "--openai.region", "there")
    assert isinstance(server, Special)
    assert server.region == "there"


def test_help_of_process_shows_what_process_changes(capsys: pytest.CaptureFixture[str]) -> None:
    for mode, shown in (("process", "(default: 'data/task.jsonl')"), ("serve", "JSONL file that gets every group")):
        with pytest.raises(SystemExit):
            main(TaskEnv, [mode, "--help"])
        assert shown in capsys.readouterr().out


class TeacherTask(TaskEnv):
    """With the names by which a teacher environment is known."""

    teacher_namespace = "teacher"

    @classmethod
    def teacher_config_init(cls) -> Any:
        return None


def test_teacher_flags_belong_to_teacher_environments(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("teacher: {model_name: big, timeout: 5}\n")
    argv = ["--config", str(tmp_path / "t.yaml"), "--teacher.base_url", "http://t:1/v1", "--teacher.timeout=9"]

    resolved = resolve(TeacherTask, argv, mode_defaults={})

    [teacher] = server_list(resolved.pools["teacher"])  # type: ignore[arg-type]
    assert (teacher.model_name, teacher.base_url, teacher.timeout) == ("big", "http://t:1/v1", 9)
    assert yaml.safe_load(resolved.as_yaml())["teacher"][0]["model_name"] == "big"
    assert resolve(TeacherTask, [], mode_defaults={}).pools == {"teacher": None}
    with pytest.raises(UsageError, match=r"unknown option --teacher\.base_url"):
        resolve(TaskEnv, ["--teacher.base_url", "x"], mode_defaults={})


def test_the_teacher_servers_reach_the_constructor() -> None:
    class Pupil(TeacherTask):
        def __init__(self, config: Any, servers: Any, teacher_server_configs: Any = None, **more: Any) -> None:
            super().__init__(config, servers, **more)
            self.teacher = teacher_server_configs

    env: Any = build(Pupil, resolve(Pupil, ["--teacher.base_url", "http://t:1/v1"], mode_defaults={}))

    assert [server.base_url for server in env.teacher] == ["http://t:1/v1"]


class PooledTask(TaskEnv):
    """With two further pools, one of which has a default."""

    @classmethod
    def server_pools(cls) -> dict[str, Any]:
        return {"judge": None, "critic": [APIServerConfig(base_url="http://c:1/v1", model_name="c", timeout=7)]}


def test_each_pool_of_an_environment_has_flags_and_a_section(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("judge: {model_name: j, base_url: 'http://j:1/v1'}\n")

    resolved = resolve(PooledTask, ["--config", str(tmp_path / "p.yaml"), "--critic.model_name", "d"], mode_defaults={})

    assert resolved.warnings == ()
    shown = yaml.safe_load(resolved.as_yaml())
    found = {
        name: [(server["base_url"], server["model_name"]) for server in shown[name]] for name in ("judge", "critic")
    }
    assert found == {"judge": [("http://j:1/v1", "j")], "critic": [("http://c:1/v1", "d")]}
    assert shown["critic"][0]["timeout"] == 7
    (tmp_path / "again.yaml").write_text(resolved.as_yaml())
    again = resolve(PooledTask, ["--config", str(tmp_path / "again.yaml")], mode_defaults={})
    assert again.as_yaml() == resolved.as_yaml()
    unnamed = resolve(PooledTask, [], mode_defaults={})
    assert unnamed.pools["judge"] is None
    assert "judge" not in yaml.safe_load(unnamed.as_yaml())


def test_each_pool_reaches_the_constructor_under_its_name() -> None:
    class Judged(PooledTask):
        def __init__(self, *arguments: Any, judge_server_configs: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self.judge, self.critic = judge_server_configs, handed_over("critic")

    env: Any = build(Judged, resolve(Judged, ["--judge.base_url", "http://j:1/v1"], mode_defaults={}))

    assert ([one.base_url for one in env.judge], [one.model_name for one in env.critic]) == (["http://j:1/v1"], ["c"])
    assert handed_over("critic") is None, "only while it is constructed"


def test_help_shows_each_pool(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(PooledTask, ["serve", "--help"])

    text = capsys.readouterr().out
    assert "judge server options:" in text
    assert "  --critic.model_name str\n" in text
    assert "sections env:, openai:, judge:, critic:," in text


def test_a_pool_cannot_take_the_policy_s_name() -> None:
    taken = type("Taken", (TaskEnv,), {"server_pools": classmethod(lambda cls: {"openai": None})})

    with pytest.raises(ConfigError, match=r"Taken\.server_pools names 'openai', and --openai\.\* is taken"):
        resolve(taken, [], mode_defaults={})


class OwnCommand(BaseModel):
    """A command as an environment might bring it."""

    ran: ClassVar[list[Any]] = []
    extra: int = 1

    def run(self) -> None:
        self.ran.append(self)


def test_a_command_class_of_the_environment_is_run_with_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    replaced = type("Replaced", (TaskEnv,), {"get_cli_serve_config_cls": classmethod(lambda cls: OwnCommand)})

    main(replaced, ["serve", "--extra", "7"])

    assert OwnCommand.ran.pop().extra == 7
    with pytest.raises(SystemExit):
        main(replaced, ["serve", "--extar", "7"])
    assert "did you mean --extra?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(replaced, ["serve", "--help"])
    assert "--extra int\n        (default: 1)" in capsys.readouterr().out


def test_the_usual_command_class_can_be_extended(capsys: pytest.CaptureFixture[str]) -> None:
    class Extended(TaskEnv):
        @classmethod
        def get_cli_serve_config_cls(cls) -> type:
            class Command(super().get_cli_serve_config_cls()):  # type: ignore[misc]
                shout: bool = False

            return Command

    main(Extended, ["serve", "--shout", "--group_size", "5", "--openai.model_name", "n", "--dry_run", "true"])

    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["env"]["group_size"], printed["openai"][0]["model_name"]) == (5, "n")


def test_pydantic_cli_runs_the_command_class_and_the_file_wins_over_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pydantic_cli = pytest.importorskip("pydantic_cli")
    (tmp_path / "e.yaml").write_text("env: {group_size: 7, total_steps: 8}\n")
    argv = ["serve", "--config", str(tmp_path / "e.yaml"), "--env.total_steps", "3", "--dry_run", "true"]
    monkeypatch.setattr("sys.argv", ["env.py", *argv])

    run = pydantic_cli.to_runner({"serve": command_class(TaskEnv, "serve")})
    assert run(argv) == 0

    env = yaml.safe_load(capsys.readouterr().out)["env"]
    assert (env["group_size"], env["total_steps"]) == (7, 3), "3 is config_init's value too, but it was typed"


def test_help_lists_every_option_with_its_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(TaskEnv, ["serve", "--help"])

    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    for name, info in TaskConfig.model_fields.items():
        assert f"--{name} " in text
        assert (info.description or "") in text
    assert BaseEnvConfig.model_fields["max_token_length"].description in text, "a new default keeps the words"  # type: ignore[operator]
    for name in APIServerConfig.model_fields:
        assert f"--openai.{name} " in text
    assert "(default: 16)" in text
    assert "SWEET|SOUR\n        (default: SWEET)" in text
    assert "A task for tests." in text
    assert "examples:" in text


def test_the_constructor_ignores_what_it_does_not_know() -> None:
    assert TaskConfig(score_buffer_size=3).group_size == 4  # type: ignore[call-arg]


def test_evaluate_writes_the_upstream_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(TaskEnv, ["evaluate", "--data_dir_to_save_evals", str(tmp_path / "evals")])

    report = json.loads((tmp_path / "evals" / "metrics.json").read_text())
    assert report["results"]["all"] == report["results"]["atropos|task_eval|0"] == {"heldout_reward": 0.25}
    assert report["config_general"]["model_name"] == "m"
    assert yaml.safe_load((tmp_path / "evals" / "evaluate_config.yaml").read_text())["env"]["group_size"] == 16


def test_process_writes_as_many_groups_as_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_text("an earlier file\n")

    main(TaskEnv, ["process", "--group_size", "2", "--data_path_to_save_groups", str(path)])

    groups = [json.loads(line) for line in (tmp_path / "groups_1.jsonl").read_text().splitlines()]
    assert len(groups) == 3
    assert groups[0]["scores"] == [0.0, 1.0]
    assert path.read_text() == "an earlier file\n"


def test_a_failed_run_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    class NoData(TaskEnv):
        async def setup(self) -> None:
            raise AtroposError("the data folder is empty")

    with pytest.raises(SystemExit) as exit_info:
        main(NoData, ["serve"])

    assert exit_info.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: the data folder is empty"
