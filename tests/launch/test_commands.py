"""A config becomes command lines: values of every kind reach the process that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from atroposlib.envs.command_line.options import resolve
from atroposlib.envs.server_handling.server_manager import server_list
from atroposlib.launch.commands import Plan
from atroposlib.launch.config import UpConfig
from atroposlib.launch.run_folder import RunFolder
from atroposlib.teaching.env import TeacherEnv


def plan_of(folder: Path, **changes: Any) -> Plan:
    config = {"model": str(folder), "environments": [{"command": "x.py", "servers": []}], **changes}
    return Plan(
        UpConfig.model_validate(config), RunFolder(folder), 9000, 9001, has_gpu=False, frozen_ports={"student": 9002}
    )


def flag(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (True, "true"), (512, "512"), (1e-5, "1e-05"), ("a b", "a b"), (None, "null"), (["é", 1], '["é", 1]'),
        ({"loader": "arc_atlas", "shuffle": False}, '{"loader": "arc_atlas", "shuffle": false}'),
    ],
)  # fmt: skip
def test_an_option_of_any_kind_becomes_one_word(tmp_path: Path, value: Any, word: str) -> None:
    plan = plan_of(tmp_path, environments=[{"command": "x.py", "options": {"data": value, "openai.timeout": 3}}])

    argv = plan.environment(plan.config.environments[0]).argv

    assert flag(argv, "--env.data") == word
    assert flag(argv, "--openai.timeout") == "3"


def test_a_mapping_survives_the_saved_config(tmp_path: Path) -> None:
    options = {"rim": {"models": {"small_model": "http://127.0.0.1:9/v1#judge"}}, "template": None, "names": ["a"]}
    plan = plan_of(tmp_path, environments=[{"command": "x.py", "options": options}])

    assert yaml.safe_load(plan.config.to_yaml())["environments"][0]["options"] == options


def test_each_engine_has_its_own_environment_over_the_shared_one(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        frozen={"student": {"env": {"CUDA_VISIBLE_DEVICES": 1}}, "judge": {"url": "http://127.0.0.1:9"}},
        processes={"inference": {"env": {"CUDA_VISIBLE_DEVICES": "0", "NCCL_DEBUG": "WARN"}}},
    )

    policy, student = plan.inference().env, plan.frozen("student").env

    assert (policy["CUDA_VISIBLE_DEVICES"], student["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
    assert policy["NCCL_DEBUG"] == student["NCCL_DEBUG"] == "WARN"


def test_an_environment_is_told_where_every_server_is_that_it_names(tmp_path: Path) -> None:
    """As flags that a teaching environment knows."""
    plan = plan_of(
        tmp_path,
        frozen={
            "student": {"model": "m/small"},
            "reference": {"url": "http://h:7/v1", "served_model_name": "old"},
        },
        environments=[{"command": "x.py", "servers": ["student", "reference"]}],
    )

    _, *argv = plan.environment(plan.config.environments[0]).argv
    flags = argv[argv.index("serve") + 1 :]
    known = resolve(TeacherEnv, flags, mode_defaults={}).pools

    asked = {name: [(one.base_url, one.model_name) for one in server_list(known[name] or [])] for name in known}
    assert asked == {"student": [("http://127.0.0.1:9002/v1", "small")], "reference": [("http://h:7/v1", "old")]}


def test_only_the_policys_server_gets_weights(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, frozen={"student": {}, "judge": {"url": "http://127.0.0.1:9"}})

    assert plan.trainer_keys()["inference_servers"] == ["http://127.0.0.1:9001"]
