"""The key `method` decides which options there are; each method is loaded when it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atroposlib.errors import ConfigError
from trainer.config.compose import Composition, load_config, load_config_with_origins
from trainer.config.grammar import NESTED
from trainer.config.grpo import GRPOConfig
from trainer.config.layers import layers
from trainer.config.resolved import describe
from trainer.config.schema import FLAT_GROUPS
from trainer.methods import METHODS, method_of
from trainer.supervised.config import GKDConfig, SFTConfig


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"model_name_or_path={tmp_path}"


def test_naming_the_methods_loads_neither_torch_nor_a_trainer() -> None:
    code = "import sys, trainer.methods; print([m for m in ('torch', 'transformers', 'trainer.config.grpo') if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == "[]"


def test_the_method_decides_the_class(model: str, tmp_path: Path) -> None:
    teacher = f"teacher_model_name_or_path={tmp_path}"

    assert type(load_config(None, [model])) is GRPOConfig
    assert type(load_config(None, [model, "method=sft"])) is SFTConfig
    assert type(load_config(None, [model, "trainer=sft"])) is SFTConfig
    assert type(load_config(None, [model, "trainer=gkd", teacher])) is GKDConfig


def test_the_highest_layer_chooses_the_method(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(f"method: sft\nmodel_name_or_path: {tmp_path}\nlearning_rate: 3e-5\n")

    assert load_config(path).learning_rate == 3e-5
    assert type(load_config(path)) is SFTConfig
    assert type(load_config(path, ["method=grpo"])) is GRPOConfig
    assert type(load_config(path, ["~method"])) is GRPOConfig


def test_each_config_belongs_to_its_method() -> None:
    assert [method_of(cls()).name for cls in (GRPOConfig, SFTConfig, GKDConfig)] == ["grpo", "sft", "gkd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method=sfft"], "method in the command line should be one of grpo, sft, gkd, is 'sfft'; did you mean 'sft'?"),
        (["method=3"], "should be one of grpo, sft, gkd, is 3"),
        (["completion_only_training=true"],
         "'completion_only_training' in the command line has no use with method=grpo: it is a key of method=sft and method=gkd"),
        (["lmbda=0.5"], "'lmbda' in the command line has no use with method=grpo: it is a key of method=gkd"),
        (["method=sft", "lmbda=0.5"], "has no use with method=sft: it is a key of method=gkd"),
        (["method=sft", "advantage_scale=none"], "has no use with method=sft: it is a key of method=grpo"),
        (["method=sft", "weight_sync.transport=disk"], "has no use with method=sft: it is a key of method=grpo"),
        (["method=gkd", "fp16=true"], "has no use with method=gkd: use bf16"),
        (["method=sft", "recipe=dapo"], "in data=asynchronous has no use with method=sft: it is a key of method=grpo"),
        (["method=sft", "dataset_pth=x"], "unknown key 'dataset_pth' in the command line; did you mean 'dataset_path'?"),
        (["method=sft", "lerning_rate=1"], "did you mean 'learning_rate'?"),
        (["dataset_path=x"], "the dataset is the environment's: set it there; it is a key of method=sft and method=gkd"),
        (["method=sft", "eval_split_ratio=2"], "data.eval_split_ratio in the command line should be less than 1"),
        (["method=sft", "packing=sometimes"], "packing in the command line should be a valid boolean"),
        (["method=gkd"], "teacher_model_name_or_path is missing; give the folder or Hub id of the teacher"),
        (["method=sft", "loader=nobody"], "there is no loader 'nobody'"),
    ],
)  # fmt: skip
def test_a_key_of_another_method_says_whose_it_is(model: str, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [model, *options])

    assert message in str(caught.value)


def test_keys_of_the_data_set_are_written_with_and_without_their_section(model: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {dataset_path: c.jsonl, dataset_max_samples: 9}\n")
    flat = load_config(None, [model, "method=sft", "dataset_path=a.jsonl", "seed=7"])
    dotted, origins = load_config_with_origins(tmp_path / "c.yaml", [model, "method=sft", "data.dataset_path=b.jsonl"])

    assert (flat.data.dataset_path, flat.data.seed, flat.seed) == (Path("a.jsonl"), 7, 7)
    assert (dotted.data.dataset_path, dotted.data.dataset_max_samples) == (Path("b.jsonl"), 9)
    assert (origins["dataset_path"], origins["dataset_max_samples"]) == ("the command line", str(tmp_path / "c.yaml"))


def test_the_documented_function_of_a_data_set_names_its_loader(model: str) -> None:
    target = "make_dataset_fn._target_=atlas_core.data.runtime_traces.get_runtime_trace_dataset"

    config = load_config(None, [model, "method=sft", target, "make_dataset_fn.dataset_path=a.jsonl"])

    assert (config.data.loader, config.data.dataset_path) == ("runtime_traces", Path("a.jsonl"))


def test_batch_sizes_of_other_trainers_are_understood_by_every_method(model: str) -> None:
    config = load_config(None, [model, "method=sft", "per_device_train_batch_size=4", "gradient_accumulation_steps=8"])

    assert config.batch_size == 32


def test_a_reference_finds_keys_and_defaults_of_the_method(model: str) -> None:
    values = Composition(
        layers(None, [model, "method=sft", "run_dir=runs/${method}-${loader}", "project=p${max_seq_length}"])
    ).values()

    assert (values["run_dir"], values["project"]) == ("runs/sft-rows", "p4096")


@pytest.mark.parametrize("name", METHODS)
def test_a_resolved_configuration_of_every_method_is_one(name: str, tmp_path: Path) -> None:
    teacher = [f"teacher_model_name_or_path={tmp_path}"] if name == "gkd" else []
    data = ["dataset_path=a.jsonl", "db_url=postgresql://u:hunter2@h/d"] if name != "grpo" else []
    config, origins = load_config_with_origins(
        None, [f"method={name}", f"model_name_or_path={tmp_path}", *teacher, *data]
    )

    text = describe(config, origins)
    (tmp_path / "resolved.yaml").write_text(text.replace("<hidden>", "null"))
    again, _ = load_config_with_origins(tmp_path / "resolved.yaml")

    assert f"method: {name}  # the command line" in text
    assert "hunter2" not in text
    resolved = yaml.safe_load(text.replace("<hidden>", "null"))
    assert yaml.safe_load(describe(again, {})) == resolved
    if data:
        assert "  dataset_path: a.jsonl  # the command line" in text


def test_a_resolved_configuration_with_a_split_of_its_own_for_evaluation_is_one(model: str, tmp_path: Path) -> None:
    config, origins = load_config_with_origins(None, [model, "method=sft", "dataset_path=a.jsonl", "val_split=test"])
    (tmp_path / "resolved.yaml").write_text(describe(config, origins))

    again = load_config(tmp_path / "resolved.yaml")

    assert (again.data.val_split, again.data.held_out_share) == ("test", 0.0)


@pytest.mark.parametrize("name", METHODS)
def test_each_refused_key_exists_and_is_not_offered(name: str) -> None:
    method = METHODS[name]
    fields = set(method.config_class.__dataclass_fields__)

    assert set(method.refused) <= fields
    assert not set(method.refused) & set(method.schema.keys)
    assert set(method.required) <= set(method.schema.keys)


def test_groups_whose_name_is_written_are_known_before_the_method_is() -> None:
    for method in METHODS.values():
        assert set(method.schema.named_groups) <= set(NESTED)
        assert set(method.schema.groups) - set(method.schema.named_groups) <= set(FLAT_GROUPS)
