"""Options are checked whole at start, and every error says what to change."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from atroposlib.errors import ConfigError
from trainer.config.checks import attention, doubts
from trainer.config.compose import load_config, load_config_with_origins
from trainer.config.grpo import GRPOConfig
from trainer.policy.lora import LoraOptions, options_of

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    return str(folder)


def a_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trainer.yaml"
    path.write_text(text)
    return path


def test_overrides_win_over_the_file(tmp_path: Path, model_dir: str) -> None:
    path = a_file(tmp_path, f"model_name_or_path: {model_dir}\nmax_steps: 7\nlearning_rate: 1e-5\n")

    config = load_config(path, ["max_steps=9"])

    assert (config.max_steps, config.learning_rate) == (9, 1e-5)


@pytest.mark.parametrize(
    ("text", "expected"), [("1e-6", 1e-6), ("1.5E-3", 1.5e-3), ("2e2", 200.0), ("1", 1.0), ("0.5", 0.5)]
)
def test_numbers_are_read_as_numbers(model_dir: str, text: str, expected: float) -> None:
    config = load_config(None, [f"model_name_or_path={model_dir}", f"learning_rate={text}"])

    assert config.learning_rate == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("no", False), ("off", False), ("false", False), ("yes", True), ("True", True)]
)
def test_a_switch_may_be_said_in_words(model_dir: str, text: str, expected: bool) -> None:
    assert load_config(None, [f"model_name_or_path={model_dir}", f"bf16={text}"]).bf16 is expected


def test_no_is_a_word_where_a_word_is_asked_for(model_dir: str) -> None:
    config = load_config(None, [f"model_name_or_path={model_dir}", "save_strategy=no", "project=off", "strict=no"])

    assert (config.save_strategy, config.project) == ("no", "off")


def test_names_and_folders_follow_the_run_folder(model_dir: str) -> None:
    config = load_config(None, [f"model_name_or_path={model_dir}", "run_dir=runs/demo"])

    assert (config.run_name, config.output_dir) == ("demo", "runs/demo/checkpoints")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temprature=1", "unknown key 'temprature' in the command line; did you mean 'temperature'?"),
        ("xyzzy=1", "unknown key 'xyzzy' in the command line; see --print-config"),
        ("num_train_epochs=3", "key 'num_train_epochs' in the command line has no use with method=grpo: use max_steps"),
        ("learning_rate=fast", "learning_rate in the command line should be a valid number"),
        ("max_steps=1.5", "max_steps in the command line should be a valid integer"),
        (
            "loss_type=grpo",
            "loss_type in the command line should be 'ppo_clip', 'reinforce', 'cispo', 'gspo', 'dppo' or 'dr_grpo', is 'grpo'",
        ),
        ("learning_rate", "'learning_rate' is not key=value"),
        ("learning_rate=[", "the value of 'learning_rate=[' is not YAML"),
        ("batch_size=0", "batch_size must be at least 1, is 0"),
        ("temperature=0", "temperature must be over 0, is 0"),
        ("group_size=7", "batch_size=64 is no multiple of group_size=7"),
        ("loss_aggregation=constant", "divides by max_completion_length: give that too"),
        ("inference_servers=[http://h:1/v1]", "should be a base URL"),
        ("inference_servers=h:1", "inference_servers in the command line should be a valid list"),
        ("save_total_limit=1", "save_total_limit must be at least 2"),
        ("deepspeed=zero9", "deepspeed='zero9' is neither a preset (zero1, zero2, zero3, zero3_offload) nor a file"),
        (
            "weight_sync.transprt=disk",
            "unknown key 'weight_sync.transprt' in the command line; did you mean 'weight_sync.transport'?",
        ),
        ("weight_sync.xyzzy=1", "unknown key 'weight_sync.xyzzy' in the command line; see --print-config"),
        ("pause_mode=wait", "unknown key 'pause_mode' in the command line; did you mean 'weight_sync.pause_mode'?"),
        ("weight_sync.keep=two", "weight_sync.keep in the command line should be a valid integer"),
        ("weight_sync.keep=1", "weight_sync.keep must be at least 2, is 1"),
        ("weight_sync.transport=carrier_pigeon", "weight_sync.transport in the command line should be 'auto', 'gloo'"),
        ("weight_sync=disk", "weight_sync in the command line should be"),
        ("weight_sync.transport=lora", "weight_sync.transport=lora sends an adapter: give use_peft=true"),
        ("lora_r=8", "lora_r is an option of LoRA: give use_peft=true as well"),
        ("lora_r=0", "lora_r must be at least 1, is 0"),
        ("lora_dropout=1", "lora_dropout in [0, 1)"),
        ("lora_target_modules=[]", "lora_target_modules is"),
        ("overlong=soft", "overlong=soft and overlong_cache go together"),
        ("mis_low=2", "mis_low <= 1 <= mis_high is needed, are 2.0 and 5.0"),
        ("sync_ref_model=true", "sync_ref_model moves a reference that beta=0 never loads"),
        ("ref_model_mixup_alpha=0", "ref_model_mixup_alpha must be in (0, 1], is 0.0"),
        ("distill_beta=1.5", "distill_beta must be in [0, 1], is 1.5"),
        ("ref_model_name_or_path=./nowhere", "ref_model_name_or_path='./nowhere' does not exist"),
        ("model_init_kwargs={use_cache: true}", "use_cache=true is for generation"),
        ("model_init_kwargs={rope_theta: 1}", "model_init_kwargs.rope_theta is not taken"),
        ("push_to_hub=true", "push_to_hub needs hub_model_id"),
        ("optim=adamm", "adamm is not a valid OptimizerNames"),
        ("model_name_or_path=./nowhere", "does not exist (looked in"),
    ],
)
def test_a_wrong_option_is_named_with_what_to_do(model_dir: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"model_name_or_path={model_dir}", override])

    assert message in str(caught.value)


def test_a_group_is_merged_key_by_key_and_each_key_has_its_origin(tmp_path: Path, model_dir: str) -> None:
    path = a_file(tmp_path, f"model_name_or_path: {model_dir}\nweight_sync: {{transport: disk, timeout_s: 9}}\n")

    config, origins = load_config_with_origins(path, ["weight_sync.timeout_s=7"])

    assert (config.weight_sync.transport, config.weight_sync.timeout_s, config.weight_sync.keep) == ("disk", 7.0, 2)
    assert origins == {
        "model_name_or_path": str(path),
        "weight_sync.transport": str(path),
        "weight_sync.timeout_s": "the command line",
    }


def test_a_wrong_key_in_a_group_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = a_file(tmp_path, "weight_sync:\n  timeout: 3\n")

    with pytest.raises(ConfigError, match=f"'weight_sync.timeout' in {path}; did you mean 'weight_sync.timeout_s'"):
        load_config(path)


def test_sinks_get_plain_values(model_dir: str) -> None:
    config = load_config(None, [f"model_name_or_path={model_dir}", "weight_sync.transport=disk"])

    assert json.loads(config.to_json_string())["weight_sync"]["transport"] == "disk"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["use_peft=true"], True),
        (["use_peft=true", "weight_sync.transport=lora"], True),
        (["use_peft=true", "weight_sync.transport=gloo"], False),
        ([], False),
    ],
)
def test_the_adapter_alone_is_sent_where_the_transport_takes_it(
    model_dir: str, overrides: list[str], expected: bool
) -> None:
    assert load_config(None, [f"model_name_or_path={model_dir}", *overrides]).sends_adapter is expected


def test_the_adapters_options_are_handed_down(model_dir: str) -> None:
    options = ["use_peft=true", "lora_r=4", "lora_alpha=6", "lora_dropout=0.1", "lora_target_modules=[q_proj]"]

    config = load_config(None, [f"model_name_or_path={model_dir}", *options])

    assert options_of(config) == LoraOptions(r=4, alpha=6.0, dropout=0.1, target_modules=("q_proj",))
    assert options_of(load_config(None, [f"model_name_or_path={model_dir}"])) is None


def test_ranks_that_would_give_up_on_rank_0_too_early_are_refused(
    model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"model_name_or_path={model_dir}"]
    load_config(None, [*options, "ddp_timeout=60"])  # one rank waits for nobody
    monkeypatch.setattr(GRPOConfig, "world_size", 2)

    load_config(None, options)
    with pytest.raises(ConfigError, match=r"ddp_timeout=60 is too short.*give ddp_timeout=\d+"):
        load_config(None, [*options, "ddp_timeout=60"])
    with pytest.raises(ConfigError, match="ddp_timeout=1800 is too short"):
        load_config(None, [*options, "weight_sync.timeout_s=300"])


def test_a_wrong_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = a_file(tmp_path, "max_step: 3\n")

    with pytest.raises(ConfigError, match=f"unknown key 'max_step' in {path}; did you mean 'max_steps'"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b\n", "must hold keys and values"), ("a: [", "is not YAML")], ids=["list", "broken"]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(a_file(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config file .*none.yaml: No such file"):
        load_config(tmp_path / "none.yaml")


def test_a_missing_model_is_an_error_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="model_name_or_path is missing"):
        load_config(None)


def test_dr_grpo_is_ppo_clip_without_the_two_divisions(model_dir: str) -> None:
    options = [f"model_name_or_path={model_dir}", "loss_type=dr_grpo"]

    config = load_config(None, [*options, "max_completion_length=32"])

    assert (config.loss_type, config.advantage_scale, config.loss_aggregation) == ("ppo_clip", "none", "constant")
    with pytest.raises(ConfigError, match="divides by max_completion_length"):
        load_config(None, options)
    with pytest.raises(ConfigError, match="dr_grpo means advantage_scale=none"):
        load_config(None, [*options, "advantage_scale=group_std"])


def test_a_reference_that_an_adapter_switches_off_cannot_be_moved(model_dir: str) -> None:
    options = [f"model_name_or_path={model_dir}", "sync_ref_model=true", "beta=0.1"]
    load_config(None, options)

    with pytest.raises(ConfigError, match="sync_ref_model and use_peft exclude each other"):
        load_config(None, [*options, "use_peft=true"])


def test_options_of_the_model_may_come_as_its_keyword_arguments(model_dir: str) -> None:
    config = GRPOConfig(model_init_kwargs={"dtype": "bfloat16", "use_cache": False, "attn_implementation": "eager"})

    assert (config.torch_dtype, config.attn_implementation) == ("bfloat16", "eager")
    assert GRPOConfig(attn_implementation="auto", model_init_kwargs={"attn_implementation": "eager"})
    with pytest.raises(ConfigError, match=r"attn_implementation=sdpa and model_init_kwargs.attn_implementation=eager"):
        GRPOConfig(attn_implementation="sdpa", model_init_kwargs={"attn_implementation": "eager"})


def test_an_option_with_its_default_value_is_given_all_the_same() -> None:
    assert GRPOConfig(batch_size=64, per_device_train_batch_size=4).batch_size == 64
    assert GRPOConfig(per_device_train_batch_size=4).batch_size == 4
    with pytest.raises(ConfigError, match=r"torch_dtype=float32 and model_init_kwargs.torch_dtype=bfloat16"):
        GRPOConfig(torch_dtype="float32", model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"trust_remote_code=False and model_init_kwargs.trust_remote_code=True"):
        GRPOConfig(trust_remote_code=False, model_init_kwargs={"trust_remote_code": True})


def test_the_names_of_other_trainers_work_in_python_too() -> None:
    config = GRPOConfig(num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=2)

    assert (config.group_size, config.num_generations, config.batch_size) == (4, 4, 16)
    with pytest.raises(ConfigError, match="group_size=2 and num_generations=4 are the same option"):
        GRPOConfig(num_generations=4, group_size=2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"learning_rate": 5.1e-5}, "learning_rate=5.1e-05 is high for all weights; 1e-6 to 1e-5 is usual"),
        ({"trust_remote_code": True}, "runs code that can change"),
        ({"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2}, "almost no effect"),
        ({"beta": 0.1, "kl_estimator": "k1"}, "no expected gradient"),
        ({"unbias_log_probabilities": False, "temperature": 0.7}, "not the logprobs that were sampled"),
        ({"loss_type": "gspo"}, "epsilon_low=0.2 and epsilon_high=0.28 clip nothing; 3e-4 and 4e-4 are usual"),
    ],
)
def test_what_is_seldom_meant_is_said_and_allowed(options: dict[str, Any], expected: str) -> None:
    assert any(expected in doubt for doubt in doubts(GRPOConfig(**options)))


@pytest.mark.parametrize("options", [{}, {"learning_rate": 5e-5}, {"learning_rate": 2e-4, "use_peft": True}])
def test_what_is_usual_raises_no_doubts(options: dict[str, Any]) -> None:
    assert doubts(GRPOConfig(**options)) == []


@pytest.mark.parametrize("name", ["demo", "teacher_quickstart"])
def test_a_newcomers_first_run_raises_no_doubts(tmp_path: Path, model_dir: str, name: str) -> None:
    shipped = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["trainer"]

    config = load_config(a_file(tmp_path, yaml.safe_dump({**shipped, "model_name_or_path": model_dir})))

    assert config.learning_rate == shipped["learning_rate"]
    assert doubts(config) == []


def test_attention_falls_back_only_where_nobody_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert attention("auto", has_cuda=True) == "sdpa"
    with pytest.raises(ConfigError, match="is not installed: pip install flash-attn"):
        attention("flash_attention_2", has_cuda=True)

    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert attention("auto", has_cuda=True) == "flash_attention_2"
    assert attention("auto", has_cuda=False) == "sdpa"


def test_two_bounds_of_the_gradient_norm_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gradient_clipping=0.5 of deepspeed contradicts max_grad_norm=1.0"):
        GRPOConfig(deepspeed={"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5})


RESOLVED = {"model_init_kwargs", "num_generations", "tokenizer_name_or_path"}
"""Options that the configuration turns into others; the tokenizer's name waits for GRPOTrainer to save by it."""


def test_each_own_option_is_read_somewhere() -> None:
    """No inert keys: each option that we add to transformers' own occurs in code that does not only check it."""
    inherited = {f.name for base in GRPOConfig.__mro__[1:] for f in getattr(base, "__dataclass_fields__", {}).values()}
    own = {f.name for f in fields(GRPOConfig)} - inherited - RESOLVED
    only_check = ("config.py", "grpo.py", "checks.py", "compose.py", "methods.py")
    package = Path(__file__).parents[3] / "trainer"
    code = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name not in only_check)
    read = set(re.findall(r"(?:config|args|options)\.(\w+)", code))

    assert own - read == set()


@pytest.mark.parametrize(
    ("name", "stage", "offloads"),
    [("zero1", 1, False), ("zero2", 2, False), ("zero3", 3, False), ("zero3_offload", 3, True)],
)
def test_the_deepspeed_presets_are_named_by_their_stage(name: str, stage: int, offloads: bool) -> None:
    from trainer.config.deepspeed_presets import preset

    zero: dict[str, Any] = preset(name)["zero_optimization"]
    assert zero["stage"] == stage
    assert [key in zero for key in ("offload_param", "offload_optimizer")] == [offloads] * 2
