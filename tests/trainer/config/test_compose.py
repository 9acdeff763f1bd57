"""Presets, recipe, file and command line become one configuration, and each value knows where it comes from."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.data.presets import PRESETS as DATA_SETS
from atroposlib.errors import ConfigError
from atroposlib.launch.trainer_section import TrainerSection
from trainer.config import presets
from trainer.config.compose import Composition, load_config, load_config_with_origins
from trainer.config.deepspeed_presets import PRESETS, from_accelerate, zero_stage
from trainer.config.grammar import SECTIONS, canonical
from trainer.config.interpolation import Interpolation
from trainer.config.layers import layers
from trainer.config.shared import deepspeed_config
from trainer.config.values import read_file

ALL_PRESETS = [(group, name) for group in presets.GROUPS for name in presets.names(group)]
RECIPES = [
    "atlas_compat", "cispo", "dapo", "default", "dr_grpo", "gkd_quickstart", "grpo", "gsm8k_rlvr", "gspo", "meta_math_rlvr",
    "sft_quickstart", "smoke_cpu", "teacher_gkd", "teacher_rcl", "teacher_rcl_compat", "teacher_sft",
]  # fmt: skip
OF_THE_PLACE = {
    "model_name_or_path", "teacher_model_name_or_path", "deepspeed", "loss_type", "attn_implementation",
}  # fmt: skip
"""Keys that a test gives itself, or that are resolved to another value."""


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"model_name_or_path={tmp_path}"


def a_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trainer.yaml"
    path.write_text(f"model_name_or_path: {tmp_path}\n{text}")
    return path


def options_of(group: str, name: str, folder: str) -> list[str]:
    """A preset with what it leaves open, and without what needs an accelerator."""
    options = [f"{group}={name}", f"model_name_or_path={folder}", "deepspeed=null"]
    if group == "data" and name in DATA_SETS:
        options.append("method=sft")
    if "gkd" in name and group in ("recipe", "trainer"):
        options.append(f"teacher_model_name_or_path={folder}")
    return options


def test_the_presets_are_these() -> None:
    assert presets.names("recipe") == RECIPES
    assert presets.names("trainer") == ["base", "base_sft", "gkd", "grpo", "sft", "teacher_grpo"]
    assert {"runtime_traces", "runtime_pg", "arc_atlas_rl", "arc_atlas_sft", "big_math_rl", "gsm8k_gkd", "gsm8k_grpo",
            "meta_math_grpo"} <= set(presets.names("data"))  # fmt: skip


@pytest.mark.parametrize(("group", "name"), ALL_PRESETS)
def test_every_preset_composes_and_is_valid(group: str, name: str, tmp_path: Path) -> None:
    config, origins = load_config_with_origins(None, options_of(group, name, str(tmp_path)))

    _, own = presets.load(group, name)
    for key in {canonical(key) for key in own} - OF_THE_PLACE:
        assert origins[key].startswith(f"{group}={name}")
    assert config.model_name_or_path == str(tmp_path)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set_is_the_environments_where_batches_come_from_a_server(name: str, model: str) -> None:
    with pytest.raises(
        ConfigError, match=f"in data={name} has no use with method=grpo: the dataset is the environment's"
    ):
        load_config(None, [model, f"data={name}"])


@pytest.mark.parametrize("name", ["interpretation_teaching", "rim_teaching"])
def test_judges_are_the_environments(name: str, model: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=f"reward={name} has no use in a trainer: it chooses judges, who are"):
        load_config(None, [model, f"reward@_global_={name}"])

    assert load_config(None, [model, f"reward={name}", "strict=false"]).advantage_scale == "none"
    assert f"reward={name} has no use in a trainer" in caplog.text


def test_the_teachers_recipes_are_those_of_the_documents(tmp_path: Path) -> None:
    rcl, compat, sft, gkd = (
        load_config(None, options_of("recipe", name, str(tmp_path)))
        for name in ("teacher_rcl", "teacher_rcl_compat", "teacher_sft", "teacher_gkd")
    )

    assert (rcl.batch_size, rcl.group_size, rcl.max_steps, rcl.save_steps) == (128, 32, 250, 10)
    assert (rcl.temperature, rcl.beta, rcl.lr_scheduler_type, rcl.sync_ref_model) == (0.7, 0.04, "constant", False)
    assert rcl.correction == "tis"
    assert (compat.sync_ref_model, compat.ref_model_sync_steps, compat.ref_model_mixup_alpha) == (True, 2, 0.9)
    assert (compat.loss_type, compat.correction, compat.advantage_scale) == ("reinforce", "none", "group_std")
    assert (compat.batch_size, compat.max_staleness) == (128, 0)
    assert (sft.num_train_epochs, sft.batch_size, sft.learning_rate, sft.adam_beta2) == (10, 16, 1e-5, 0.95)
    assert (sft.max_seq_length, sft.warmup_steps, sft.weight_decay) == (16384, 0.05, 1e-4)
    assert (sft.packing, sft.save_strategy, sft.lr_scheduler_type) == (False, "epoch", "cosine")
    assert (gkd.packing, gkd.save_strategy, gkd.lr_scheduler_type) == (True, "steps", "cosine")
    assert (rcl.pack, rcl.save_strategy, compat.lr_scheduler_type) == (True, "steps", "constant")


def test_the_documented_name_of_the_supervised_preset_is_taken(model: str) -> None:
    documented, own = (load_config(None, [f"trainer={name}", model]) for name in ("base_sft", "sft"))

    assert documented.to_dict() == own.to_dict()


def test_a_model_that_was_not_prepared_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match=r"does not exist \(looked in .*\n.*make model prepares models/SmolLM2-135M"):
        load_config(None, ["recipe=sft_quickstart"])


def test_a_key_that_stands_twice_in_a_file_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = a_file(tmp_path, "beta: 0.1\nweight_sync: {keep: 3}\nbeta: 0.2\n")

    with pytest.raises(ConfigError, match=f"{path}: 'beta' in line 4 stands in line 2 already"):
        load_config(path)
    with pytest.raises(ConfigError, match="'keep' in line 1 stands in line 1 already"):
        load_config(None, ["weight_sync={keep: 3, keep: 4}"])


def test_no_shipped_file_has_a_key_twice() -> None:
    for path in presets.FOLDER.rglob("*.yaml"):
        read_file(path)


@pytest.mark.parametrize("name", PRESETS)
def test_deepspeed_presets_are_chosen_like_the_others(name: str, model: str) -> None:
    values = Composition(layers(None, [f"deepspeed@_global_={name}", model])).values()

    assert values["deepspeed"] == name
    assert zero_stage(deepspeed_config(name, max_grad_norm=1.0)) == int(name[4])


def test_a_deepspeed_preset_may_be_written_with_a_hyphen() -> None:
    assert deepspeed_config("zero3-offload", 1.0) == deepspeed_config("zero3_offload", 1.0)


def test_atlas_compat_is_the_loss_of_atlas(model: str) -> None:
    config = load_config(None, ["recipe=atlas_compat", model])

    assert (config.loss_type, config.advantage_scale, config.loss_aggregation) == (
        "reinforce",
        "group_std",
        "sequence_mean",
    )
    assert (config.beta, config.kl_estimator, config.kl_placement) == (0.04, "k3", "loss")
    assert (config.correction, config.overlong, config.max_staleness) == ("none", "keep", 0)
    assert (config.lr_scheduler_type, config.warmup_steps, config.learning_rate) == ("cosine", 0.03, 1e-6)
    assert (config.batch_size, config.max_steps, config.max_completion_length) == (252, 200, 16384)


def test_the_default_recipe_spells_out_the_defaults_of_the_loss(model: str) -> None:
    _, own = presets.load("recipe", "default")
    plain, recipe = load_config(None, [model]), load_config(None, [model, "recipe=default"])

    assert {key: getattr(plain, key) for key in own} == {key: getattr(recipe, key) for key in own} == own


def test_later_sources_win(tmp_path: Path) -> None:
    path = a_file(tmp_path, "recipe: grpo\nbeta: 0.5\nmax_steps: 7\n")

    config, origins = load_config_with_origins(path, ["beta=0.25"])

    assert (config.batch_size, origins["batch_size"]) == (128, "trainer=grpo")
    assert (config.kl_estimator, origins["kl_estimator"]) == ("k3", "recipe=grpo")
    assert (config.max_steps, origins["max_steps"]) == (7, str(path))
    assert (config.beta, origins["beta"]) == (0.25, "the command line")


def test_a_recipe_in_the_file_of_atropos_up_reaches_the_trainer(tmp_path: Path) -> None:
    four = {"batch_size": 16, "max_steps": 9, "max_staleness": 1, "learning_rate": 1e-6}
    section = TrainerSection.model_validate({"recipe": "dapo", "beta": 0.5, **four})
    path = a_file(tmp_path, yaml.safe_dump(section.model_dump(mode="json")))

    config = load_config(path)

    assert (config.overlong, config.beta) == ("soft", 0.5)
    assert {key: getattr(config, key) for key in four} == four


@pytest.mark.parametrize("name", presets.RUNS)
@pytest.mark.parametrize("strict", ["strict=true", "strict=false"])
def test_a_recipe_of_atropos_up_is_refused_with_its_command(name: str, strict: str) -> None:
    with pytest.raises(
        ConfigError, match=f"recipe={name} is a run with servers .*: start it with atropos up recipe={name}"
    ):
        load_config(None, [f"recipe={name}", strict])


def test_a_file_of_atropos_up_is_refused_with_its_command(tmp_path: Path) -> None:
    path = a_file(tmp_path, "environments: [{command: x.py}]\ntrainer: {batch_size: 8}\n")

    with pytest.raises(ConfigError, match=f"{path} is a config of atropos up.* run atropos up --config {path}"):
        load_config(path)


def test_a_chosen_preset_replaces_the_recipes_choice(model: str) -> None:
    config, origins = load_config_with_origins(None, ["recipe=dapo", "reward=leave_one_out", model])

    assert (config.advantage_scale, origins["advantage_scale"]) == ("loo", "reward=leave_one_out")


@pytest.mark.parametrize(
    "written",
    [
        "learning_rate=3e-6", "trainer.learning_rate=3e-6", "trainer.args.learning_rate=3e-6",
        "trainer_args.learning_rate=3e-6", "optim.learning_rate=3e-6", "+learning_rate=3e-6", "++trainer.learning_rate=3e-6",
    ],
)  # fmt: skip
def test_all_spellings_of_a_key_mean_the_key(model: str, written: str) -> None:
    assert load_config(None, [model, written]).learning_rate == 3e-6


@pytest.mark.parametrize(
    "written",
    ["recipe=grpo", "run=grpo", "recipe@_global_=grpo", "run@_global_=grpo", "+override /recipe@_global_=grpo"],
)
def test_all_spellings_of_a_preset_mean_the_preset(model: str, written: str) -> None:
    assert load_config(None, [model, written]).advantage_scale == "group_std"


def test_sections_of_a_file_may_nest(tmp_path: Path) -> None:
    path = a_file(tmp_path, "trainer:\n  args: {max_steps: 9}\n  weight_sync: {keep: 5}\nrecipe@_global_: dapo\n")

    config, origins = load_config_with_origins(path)

    assert (config.max_steps, config.weight_sync.keep, config.overlong) == (9, 5, "soft")
    assert origins["weight_sync.keep"] == str(path)


@given(st.lists(st.sampled_from(SECTIONS), max_size=3), st.sampled_from(["", "+", "++"]))
def test_what_stands_before_a_key_changes_nothing(sections: list[str], plus: str) -> None:
    assert canonical(plus + ".".join([*sections, "beta"])) == "beta"


def test_a_tilde_takes_the_default_again(tmp_path: Path) -> None:
    path = a_file(tmp_path, "recipe: grpo\nweight_sync: {keep: 5, transport: disk}\n")

    config, origins = load_config_with_origins(path, ["~beta", "~weight_sync.keep"])

    assert (config.beta, config.weight_sync.keep, config.weight_sync.transport) == (0.0, 2, "disk")
    assert "beta" not in origins


def test_references_take_values_types_and_defaults_of_other_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X2_STEPS", "12")
    path = a_file(
        tmp_path,
        "max_steps: ${oc.env:X2_STEPS}\nsave_steps: ${max_steps}\nproject: p-${loss_type}-${weight_sync.keep}\n"
        "run_name: ${oc.env:X2_NOBODY,${project}}\nrun_dir: runs/${now:%Y}/${run_name}\n"
    )  # fmt: skip

    config = load_config(path)

    assert (config.max_steps, config.save_steps) == (12, 12)
    assert config.run_name == config.project == "p-ppo_clip-2"
    assert config.run_dir == f"runs/{datetime.now():%Y}/p-ppo_clip-2"


@pytest.mark.parametrize("options", [["run_dir=r/${now:%S}"], ["run_dir=r/${project}", "project=${now:%S}"]])
def test_ranks_must_meet_in_one_folder(model: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match=r"run_dir refers to \$\{now:%S\}, and every rank reads its own clock"):
        Composition(layers(None, [model, *options])).values()
    assert Composition(layers(None, [model, "project=${now:%Y}"])).values()["project"] == f"{datetime.now():%Y}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["beta=${cispo_cap}", "cispo_cap=${beta}"], "refer to each other in a circle: beta -> cispo_cap -> beta"),
        (["beta=${beta}"], "in a circle: beta -> beta"),
        (["beta=${bata}"], "${bata} refers to an unknown key; did you mean ${beta}?"),
        (["project=${oc.env:X2_NOBODY}"], "the environment variable X2_NOBODY, which is not set"),
        (["project=${hydra:x}"], "unknown reference ${hydra:x}"),
        (["project=a${"], "cannot resolve the references"),
        (["max_steps=${project}"], "max_steps in the command line should be a valid integer"),
        (["recipe=dapoo"], "recipe=dapoo is no preset; did you mean 'dapo'? There are: atlas_compat, cispo"),
        (["model=Qwen/Qwen3-8B"], "for a checkpoint give model_name_or_path=FOLDER"),
        (["reward=rubric"], "reward functions are the environments'"),
        (["recipe=3"], "recipe in the command line should be the name of a preset, is 3"),
        (["trainer.temprature=1"], "unknown key 'trainer.temprature' in the command line; did you mean 'temperature'?"),
        (["recipee=grpo"], "unknown key 'recipee' in the command line; did you mean 'recipe'?"),
        (["~temprature"], "unknown key '~temprature' in the command line; did you mean 'temperature'?"),
        (["num_generations=4", "group_size=8"], "num_generations and group_size in the command line are the same key"),
        (["deepspeed_config.zero_stge=1"], "did you mean 'deepspeed_config.zero_stage'?"),
        (["deepspeed=zero1", "deepspeed_config.zero_stage=1"], "both configure DeepSpeed"),
        (["a b=1"], "'a b=1' is not key=value"),
    ],
)
def test_what_cannot_be_composed_is_explained(model: str, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [model, *options])

    assert message in str(caught.value)


def test_a_key_of_others_is_an_error_unless_strict_is_off(model: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"key 'data.dataset_path' in the command line has no use"):
        load_config(None, [model, "data.dataset_path=x"])

    load_config(None, [model, "data.dataset_path=x", "strict=false"])
    assert "data.dataset_path" in caplog.text
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(None, [model, "temprature=1", "strict=false"])


def test_names_of_other_trainers_for_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = a_file(tmp_path, "per_device_train_batch_size: 3\ntrain_batch_size: 252\n")

    composition = Composition(layers(path, ["num_generations=12"]))
    values = composition.values()

    assert (values["batch_size"], values["group_size"]) == (252, 12)
    assert composition.origins["batch_size"] == f"{path} (train_batch_size)"
    assert composition.origins["group_size"] == "the command line (num_generations)"
    assert "per_device_train_batch_size" not in composition.origins
    with pytest.raises(ConfigError, match="252 is no multiple of per_device_train_batch_size=5 x 4 ranks"):
        load_config(path, ["per_device_train_batch_size=5"])


def test_passes_given_above_a_recipe_replace_its_batch_size(model: str) -> None:
    passes = ["per_device_train_batch_size=4", "gradient_accumulation_steps=8"]

    config, origins = load_config_with_origins(None, ["recipe=grpo", model, *passes])

    assert config.batch_size == 32
    assert "per_device_train_batch_size" in origins["batch_size"]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"zero_stage": 1}, (1, False, False)),
        ({"zero_stage": 2, "offload_optimizer_device": "cpu"}, (2, True, False)),
        (
            {
                "zero_stage": 3,
                "offload_optimizer_device": "cpu",
                "offload_param_device": "cpu",
                "zero3_init_flag": True,
            },
            (3, True, True),
        ),
    ],
)
def test_a_file_of_accelerate_is_understood(
    tmp_path: Path, block: dict[str, Any], expected: tuple[int, bool, bool]
) -> None:
    zero = from_accelerate(block)["zero_optimization"]

    assert (zero["stage"], "offload_optimizer" in zero, "offload_param" in zero) == expected
    (tmp_path / "zero.yaml").write_text(f"compute_environment: LOCAL_MACHINE\ndeepspeed_config: {block}\n")
    assert deepspeed_config(str(tmp_path / "zero.yaml"), max_grad_norm=1.0)["zero_optimization"] == zero


def test_fields_of_a_file_of_accelerate_may_be_given_one_by_one(model: str) -> None:
    options = ["deepspeed_config.zero_stage=3", "deepspeed_config.offload_param_device=cpu"]

    values = Composition(layers(None, [model, *options])).values()

    assert zero_stage(values["deepspeed"]) == 3


@pytest.mark.parametrize(
    ("in_file", "above", "stage"),
    [
        ("deepspeed: zero1", "deepspeed_config.zero_stage=3", 3),
        ("deepspeed_config: {zero_stage: 3}", "deepspeed=zero1", 1),
    ],
)
def test_the_higher_of_two_ways_to_configure_deepspeed_wins(
    tmp_path: Path, in_file: str, above: str, stage: int
) -> None:
    composition = Composition(layers(a_file(tmp_path, f"{in_file}\n"), [above]))

    assert zero_stage(deepspeed_config(composition.values()["deepspeed"], max_grad_norm=1.0)) == stage
    assert composition.origins["deepspeed"] == "the command line"


def write_presets(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_recipe_upon_a_recipe_chooses_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    write_presets(
        tmp_path,
        {
            "data/a": "max_staleness: 1", "data/b": "max_staleness: 2",
            "recipe/low": "defaults: [data/a]", "recipe/high": "defaults: [recipe/low, data/b]",
        },
    )  # fmt: skip

    assert Composition(layers(None, ["recipe=high"])).values() == {"max_staleness": 2}


def test_only_a_recipe_chooses_presets_of_other_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    write_presets(tmp_path, {"data/a": "max_staleness: 1", "reward/c": "defaults: [data/a]"})

    with pytest.raises(ConfigError, match="reward=c builds upon data=a: only a recipe"):
        layers(None, ["reward=c"])


def test_a_value_is_found_through_any_chain_of_references() -> None:
    values = {f"k{i}": f"${{k{i + 1}}}" for i in range(20)} | {"k20": [1, {"a": "${now:%Y}"}]}
    references = Interpolation(values.__getitem__, environ={}, now=datetime(2030, 1, 1))

    assert references.resolve("${k0}", key="x") == [1, {"a": "2030"}]


def test_a_variable_that_holds_a_reference_to_itself_ends() -> None:
    nothing: dict[str, Any] = {}
    references = Interpolation(nothing.__getitem__, environ={"A": "${oc.env:A} "}, now=datetime(2030, 1, 1))

    with pytest.raises(ConfigError, match="cannot resolve"):
        references.resolve("b ${oc.env:A}", key="x")
