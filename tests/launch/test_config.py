"""What the config file promises: one clear message with the fix, before anything starts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from atroposlib.launch.config import LaunchConfigError, UpConfig, check_files, load_config
from atroposlib.launch.ports import assign_ports

WriteConfig = Callable[..., Path]


def problem_of(path: Path, *overrides: str) -> tuple[str, str]:
    with pytest.raises(LaunchConfigError) as caught:
        check_files(load_config(path, overrides))
    return str(caught.value), caught.value.hint


@pytest.mark.parametrize(
    ("changes", "key", "nearest"),
    [
        ({"trainer_rank": 1}, "trainer_rank", "trainer_ranks"),
        ({"rollout_server": {"prot": 8000}}, "rollout_server.prot", "port"),
        ({"inference": {"max_modl_len": 9}}, "inference.max_modl_len", "max_model_len"),
        ({"inference": {"ulr": "http://x"}}, "inference.ulr", "url"),
        ({"evaluation": {"befor": True}}, "evaluation.befor", "before"),
        ({"processes": {"trainer": {"envs": {}}}}, "processes.trainer.envs", "env"),
        ({"environments": [{"command": "x.py", "group_sise": 4}]}, "environments.0.group_sise", "group_size"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(
    write_config: WriteConfig, changes: dict[str, Any], key: str, nearest: str
) -> None:
    problem, hint = problem_of(write_config(**changes))

    assert problem == f"unknown key {key!r}"
    assert hint.startswith(f"did you mean {nearest!r}?")


def test_a_missing_model_comes_with_the_way_to_get_it(write_config: WriteConfig) -> None:
    problem, hint = problem_of(write_config(model="/nowhere/model"))

    assert "/nowhere/model does not exist" in problem
    assert "make demo" in hint
    assert "scripts/prepare_model.py" in hint


def test_a_folder_without_a_checkpoint_is_no_model(write_config: WriteConfig, tmp_path: Path) -> None:
    problem, _ = problem_of(write_config(model=str(tmp_path)))

    assert "has no config.json" in problem


def test_a_missing_environment_file_says_where_relative_paths_start(write_config: WriteConfig) -> None:
    problem, hint = problem_of(write_config(environments=[{"command": "no.py", "group_size": 4}]))

    assert "no.py is neither a file nor a folder" in problem
    assert str(Path.cwd()) in hint


@pytest.mark.parametrize(("batch_size", "nearest"), [(60, "56 or 64"), (5, "8"), (9, "8 or 16")])
def test_a_batch_that_would_split_a_group_is_refused(write_config: WriteConfig, batch_size: int, nearest: str) -> None:
    environments = [{"command": "x.py", "group_size": 8}]

    problem, _ = problem_of(write_config(environments=environments), f"trainer.batch_size={batch_size}")

    assert f"trainer.batch_size={batch_size}" in problem
    assert problem.endswith(f"nearest valid batch_size: {nearest}")


def test_the_wiring_between_processes_is_not_the_users(write_config: WriteConfig) -> None:
    problem, _ = problem_of(write_config(trainer={"rollout_server_url": "http://x"}))

    assert "rollout_server_url: set by atropos up" in problem


def test_group_size_stands_in_one_place_only(write_config: WriteConfig) -> None:
    environments = [{"command": "x.py", "options": {"env.group_size": 4}}]

    problem, _ = problem_of(write_config(environments=environments))

    assert "group_size belongs beside options" in problem


def test_two_environments_of_one_name_are_refused(write_config: WriteConfig) -> None:
    problem, _ = problem_of(write_config(environments=[{"command": "a/x.py"}, {"command": "b/x.py"}]))

    assert "two environments are named 'x'" in problem


def test_a_misspelt_key_of_a_frozen_server_gets_a_hint(write_config: WriteConfig) -> None:
    problem, hint = problem_of(write_config(frozen={"student": {"max_modl_len": 9}}))

    assert problem == "unknown key 'frozen.student.max_modl_len'"
    assert hint.startswith("did you mean 'max_model_len'? keys of frozen.student: model, ")


@pytest.mark.parametrize("name", ["openai", "env"])
def test_a_frozen_server_cannot_have_the_flags_of_the_policy(write_config: WriteConfig, name: str) -> None:
    problem, _ = problem_of(write_config(frozen={name: {}}))

    assert f"frozen: {name!r} is no name for a frozen server" in problem
    assert "choose another" in problem


def test_a_value_of_the_wrong_type_is_shown(write_config: WriteConfig) -> None:
    problem, _ = problem_of(write_config(), "seed=many")

    assert problem.startswith("seed='many'")


@pytest.mark.parametrize("text", ["a: [", "- a list", ""])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)

    problem, _ = problem_of(path)

    assert "config.yaml" in problem


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    problem, hint = problem_of(tmp_path / "nothing.yaml")

    assert "nothing.yaml: No such file" in problem
    assert "configs/demo.yaml" in hint


def test_overrides_reach_every_level(write_config: WriteConfig) -> None:
    config = load_config(
        write_config(),
        [
            "seed=7",
            "trainer.max_steps=3",
            "trainer.learning_rate=1e-6",
            "trainer.deepspeed=zero2",
            "environments.0.options.env.max_token_length=64",
            "processes.trainer.env.OMP_NUM_THREADS=1",
            "inference.url=http://localhost:9000",
        ],
    )

    assert config.seed == 7
    assert config.trainer.max_steps == 3
    assert config.trainer.learning_rate == 1e-6
    assert config.trainer.model_extra == {"deepspeed": "zero2"}
    assert config.environments[0].options == {"env.max_token_length": 64}
    assert config.processes.trainer.env["OMP_NUM_THREADS"] == "1"
    assert config.inference.base_url == "http://localhost:9000"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "no override"),
        ("environments.3.name=x", "no entry '3'"),
        ("seed.deep=1", "cannot be set inside the value"),
        ("sead=1", "unknown key 'sead'"),
    ],
)
def test_a_bad_override_is_refused(write_config: WriteConfig, override: str, problem: str) -> None:
    path = write_config(seed=1)

    assert problem in problem_of(path, override)[0]


def test_the_resolved_config_reads_back_the_same(write_config: WriteConfig, tmp_path: Path) -> None:
    config = load_config(write_config()).absolute()
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml())

    assert load_config(saved) == config


def test_the_demo_config_is_valid() -> None:
    path = Path(__file__).parents[2] / "configs" / "demo.yaml"

    config = UpConfig.model_validate(yaml.safe_load(path.read_text()))

    assert config.environments[0].command.name == "chain_sum.py"


def test_ports_are_distinct_and_fixed_ones_are_kept() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        fixed = probe.getsockname()[1]

    ports = assign_ports({"a": ("127.0.0.1", 0), "b": ("127.0.0.1", fixed), "c": ("127.0.0.1", 0)})

    assert ports["b"] == fixed
    assert len(set(ports.values())) == 3


def test_a_port_in_use_is_named_with_its_user_and_the_fix() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]

        with pytest.raises(LaunchConfigError, match=rf"inference.port: .*:{port}: in use by .+pid") as caught:
            assign_ports({"inference.port": ("127.0.0.1", port)})

    assert "inference.port=0" in caught.value.hint
