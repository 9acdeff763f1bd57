"""recipe=NAME is the file configs/NAME.yaml, and each of these files is a whole run that its processes understand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from atroposlib.cli.main import main
from atroposlib.data.presets import PRESETS as DATA_SETS
from atroposlib.envs.base import BaseEnv
from atroposlib.envs.command_line.options import resolve
from atroposlib.launch.commands import Plan
from atroposlib.launch.config import EnvironmentSection, check_files, load_config
from atroposlib.launch.recipes import ON_DATA_SETS, ON_ROLLOUTS
from atroposlib.launch.run_folder import RunFolder
from environments.chain_sum import ChainSumEnv
from environments.number_game.env import NumberGameEnv
from environments.teaching import TeachingConfig, TeachingEnv
from trainer.config import compose, presets
from trainer.config.grpo import GRPOConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
ENVIRONMENTS: dict[str, type[BaseEnv]] = {
    "environments/chain_sum.py": ChainSumEnv,
    "environments/number_game": NumberGameEnv,
    "environments/teaching": TeachingEnv,
}
TEMPLATES = (
    "student_diagnostic_template", "teacher_adaptive_template", "student_with_teaching_template", "student_baseline_template",
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint's config; the current folder is the project's."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def overrides_of(name: str, model: Path) -> list[str]:
    """A model in place of one that is not here."""
    return [] if name == "smoke_cpu" else [f"model={model}"]


def plan_of(name: str, model: Path) -> Plan:
    config = load_config(Path("configs") / f"{name}.yaml", overrides_of(name, model))
    check_files(config)
    ports = {server: 9002 + number for number, server in enumerate(config.frozen)}
    plan = Plan(config, RunFolder(model / "run"), 9000, 9001, has_gpu=False, frozen_ports=ports)
    plan.model.mkdir(parents=True, exist_ok=True)
    return plan


def trainer_config_of(plan: Plan, folder: Path, *overrides: str) -> Any:
    file = folder / "trainer.yaml"
    file.write_text(yaml.safe_dump(plan.trainer_keys()))
    return compose.load_config(file, ["deepspeed=null", *overrides])


def environment_of(plan: Plan, section: EnvironmentSection) -> Any:
    _, file, mode, *flags = plan.environment(section).argv
    assert mode == "serve"
    return resolve(ENVIRONMENTS[str(Path(file))], flags, mode_defaults={}).env


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["up", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_every_process_understands_its_part(name: str, model: Path) -> None:
    plan = plan_of(name, model)

    trainer = trainer_config_of(plan, model)

    assert trainer.batch_size == plan.config.trainer.batch_size
    assert trainer.inference_servers == ([] if plan.config.is_mock else [plan.inference_url])
    for section in plan.config.environments:
        config = environment_of(plan, section)
        assert config.group_size == section.group_size
        assert trainer.group_size in (None, section.group_size)


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_shows_every_command(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (ROOT / "configs" / f"{name}.yaml").read_bytes()

    assert main(["up", "--dry-run", f"recipe={name}", *overrides_of(name, model), "name=elsewhere"]) == 0

    shown = capsys.readouterr().out
    assert yaml.safe_load(shown.split("# rollout-server")[0])["name"] == "elsewhere"
    assert "-m trainer.cli --config" in shown
    assert (ROOT / "configs" / f"{name}.yaml").read_bytes() == before


def test_teacher_rcl_is_the_documented_run(model: Path) -> None:
    plan = plan_of("teacher_rcl", model)
    [section] = plan.config.environments

    trainer, config = trainer_config_of(plan, model), environment_of(plan, section)

    assert (trainer.batch_size, trainer.group_size, trainer.max_steps, trainer.save_steps) == (128, 32, 250, 10)
    assert (trainer.learning_rate, trainer.beta, trainer.lr_scheduler_type) == (1e-6, 0.04, "constant")
    assert trainer.temperature == config.temperature == 0.7
    assert trainer.max_completion_length == config.guidance_tokens == config.max_prompt_length == 4096
    assert config.data.model_dump(exclude_unset=True) == DATA_SETS["arc_atlas_rl"]
    assert [getattr(config, name) for name in TEMPLATES] == [None] * 4
    assert plan.config.frozen["student"].model == "models/Qwen3-4B"
    assert config.max_token_length <= plan.config.inference.max_model_len


def test_what_teacher_rcl_repeats_of_the_trainers_recipe_is_the_same(model: Path) -> None:
    alone = compose.load_config(None, ["recipe=teacher_rcl", f"model_name_or_path={model}", "deepspeed=null"])

    section = plan_of("teacher_rcl", model).config.trainer

    assert {key: getattr(alone, key) for key in type(section).model_fields} == {
        key: getattr(section, key) for key in type(section).model_fields
    }


def test_the_quickstart_keeps_its_own_prompts(model: Path) -> None:
    plan = plan_of("teacher_quickstart", model)

    config = environment_of(plan, plan.config.environments[0])

    assert [getattr(config, name) for name in TEMPLATES] == [getattr(TeachingConfig(), name) for name in TEMPLATES]


def test_the_trainer_knows_which_recipes_are_not_its_own() -> None:
    assert set(presets.RUNS) == set(RECIPES) - set(presets.names("recipe"))


def test_a_recipe_that_there_is_not_is_refused_with_those_that_there_are(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused("recipe=dappo", capsys=capsys)

    assert "recipe=dappo: there is no configs/dappo.yaml" in told
    assert f"atropos up has: {', '.join(RECIPES)}. The trainer has: atlas_compat, cispo, dapo, default" in told


@pytest.mark.parametrize("name", ["default", "dapo", "gsm8k_rlvr"])
def test_a_recipe_that_needs_an_environment_is_refused_with_the_command_beside_one(
    name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(f"recipe={name}", capsys=capsys)

    assert f"recipe={name} is the trainer's alone: it names neither a model server nor an environment" in told
    assert f"atropos up --config FILE trainer.recipe={name}; or start" in told
    assert f"atropos-trainer --config trainer.yaml recipe={name}. atropos up has: {', '.join(RECIPES)}" in told


@pytest.mark.parametrize("name", ["teacher_sft", "teacher_gkd"])
def test_a_recipe_that_learns_from_a_data_set_is_refused_with_its_command(
    name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(f"recipe={name}", capsys=capsys)

    assert f"recipe={name} learns from a data set, without servers and environments" in told
    assert f"run atropos-trainer recipe={name}. atropos up has: {', '.join(RECIPES)}" in told


def test_atropos_up_knows_which_recipes_of_the_trainer_need_an_environment() -> None:
    def method_of(name: str) -> str:
        options = [f"recipe={name}", "model_name_or_path=org/model", "deepspeed=null"]
        options += ["teacher_model_name_or_path=org/teacher"] if "gkd" in name else []
        return "rollouts" if isinstance(compose.load_config(None, options), GRPOConfig) else "data set"

    found = {name: method_of(name) for name in presets.names("recipe")}

    assert found == dict.fromkeys(ON_ROLLOUTS, "rollouts") | dict.fromkeys(ON_DATA_SETS, "data set")


def test_outside_the_project_the_hint_says_where_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    told = refused("recipe=demo", capsys=capsys)

    assert str(tmp_path) in told
    assert "start in the project's folder" in told


@pytest.mark.parametrize(
    ("arguments", "problem", "hint"),
    [
        (
            ["--config", "configs/demo.yaml", "recipe=dapo"],
            "two configs",
            "--config configs/demo.yaml trainer.recipe=dapo",
        ),
        (["--resume", "runs/demo", "recipe=demo"], "leave --config and recipe= away", "trainer.max_steps=40"),
        (["recipe=demo", "recipe=teacher_rcl"], "two whole runs", "trainer.recipe=NAME"),
        ([], "atropos up needs a config", "try recipe=demo"),
    ],
)
def test_a_recipe_is_the_only_config(
    arguments: list[str], problem: str, hint: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(*arguments, capsys=capsys)

    assert problem in told
    assert hint in told
