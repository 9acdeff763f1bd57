"""Every option that trainers of this family document: taken under its name, or refused with where it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from atroposlib.errors import ConfigError
from trainer.compose import Composition, layers, load_config, load_config_with_origins
from trainer.config import GRPOConfig, settable_keys
from trainer.config_checks import doubts
from trainer.deepspeed_presets import PRESETS
from trainer.grammar import canonical


class Taken(NamedTuple):
    """An option that this trainer takes."""

    row: int
    key: str
    default: Any
    """Of the option that it sets, on a CPU without flash attention."""
    given: str
    expected: Any
    bad: str
    """An override, or several with a blank between them, that is refused."""
    message: str


TAKEN = [
    Taken(1, "model_name_or_path", "", ".", ".", "model_name_or_path=./nowhere", "does not exist"),
    Taken(2, "tokenizer_name_or_path", None, ".", ".", "tokenizer_name_or_path=./nowhere", "does not exist"),
    Taken(3, "trust_remote_code", False, "true", True, "trust_remote_code=maybe", "should be a valid boolean"),
    Taken(4, "use_peft", False, "true", True, "lora_r=4", "give use_peft=true as well"),
    Taken(9, "torch_dtype", "float32", "bfloat16", "bfloat16", "torch_dtype=float16", "'float32' or 'bfloat16'"),
    Taken(10, "attn_implementation", "sdpa", "eager", "eager", "attn_implementation=flesh", "must be one of auto, sdpa"),
    Taken(11, "model_init_kwargs", None, "{use_cache: false}", {"use_cache": False},
          "model_init_kwargs={use_cache: true}", "is for generation"),
    Taken(25, "output_dir", "runs/atropos/checkpoints", "x", "x", "output_dir=3", "should be a valid string"),
    Taken(26, "max_steps", 200, "450", 450, "max_steps=-1", "max_steps must be at least 1"),
    Taken(28, "train_batch_size", 64, "256", 256, "train_batch_size=60 num_generations=8", "56 or 64"),
    Taken(29, "per_device_train_batch_size", 64, "3", 3, "per_device_train_batch_size=0", "must be at least 1"),
    Taken(30, "gradient_accumulation_steps", 64, "5", 5,
          "gradient_accumulation_steps=5 batch_size=64", "nearest valid batch_size: 60 or 65"),
    Taken(31, "gradient_checkpointing", False, "true", True, "gradient_checkpointing=often", "should be a valid boolean"),
    Taken(32, "learning_rate", 1e-6, "5e-7", 5e-7, "learning_rate=0", "learning_rate must be over 0"),
    Taken(33, "weight_decay", 0.0, "0.01", 0.01, "weight_decay=-1", "weight_decay must be at least 0"),
    Taken(34, "max_grad_norm", 1.0, "0.5", 0.5, "max_grad_norm=-1", "max_grad_norm must be at least 0"),
    Taken(35, "lr_scheduler_type", "constant_with_warmup", "cosine", "cosine", "lr_scheduler_type=cosin",
          "is not a valid SchedulerType"),
    Taken(36, "warmup_ratio", 10, "0.03", 0.03, "warmup_ratio=0.03 warmup_steps=10", "are the same key"),
    Taken(37, "bf16", False, "true", True, "fp16=true", "use bf16"),
    Taken(37, "tf32", None, "null", None, "tf32=perhaps", "should be a valid boolean"),
    Taken(38, "ddp_timeout", 1800, "18000", 18000, "ddp_timeout=5", "ddp_timeout must be at least 60"),
    Taken(39, "logging_steps", 1, "5", 5, "logging_steps=0", "logging_steps must be at least 1"),
    Taken(40, "save_steps", 50, "25", 25, "save_steps=0", "save_steps must be at least 1"),
    Taken(42, "save_total_limit", 3, "5", 5, "save_total_limit=1", "save_total_limit must be at least 2"),
    Taken(46, "report_to", [], "[jsonl, wandb]", ["wandb"], "report_to=3", "report_to"),
    Taken(48, "push_to_hub", False, "false", False, "push_to_hub=true", "needs hub_model_id"),
    Taken(51, "beta", 0.0, "0.04", 0.04, "beta=-0.1", "beta must be at least 0"),
    Taken(52, "temperature", 1.0, "0.7", 0.7, "temperature=0", "temperature must be over 0"),
    Taken(53, "num_generations", None, "8", 8, "num_generations=8 group_size=4", "are the same key"),
    Taken(55, "max_completion_length", None, "256", 256, "max_completion_length=0", "must be at least 1"),
    Taken(63, "sync_ref_model", False, "false", False, "sync_ref_model=true", "give beta over 0"),
    Taken(64, "ref_model_mixup_alpha", 0.9, "0.6", 0.6, "ref_model_mixup_alpha=0", "must be in (0, 1]"),
    Taken(65, "ref_model_sync_steps", 64, "2", 2, "ref_model_sync_steps=0", "must be at least 1"),
    Taken(66, "unbias_log_probabilities", True, "false", False, "unbias_log_probabilities=x", "should be a valid boolean"),
    Taken(68, "offload_untrained_models", False, "true", True, "offload_untrained_models=x", "should be a valid boolean"),
    Taken(71, "activate_debugging_logs", False, "true", True, "activate_debugging_logs=x", "should be a valid boolean"),
    Taken(72, "log_completions", False, "true", True, "log_completions=x", "should be a valid boolean"),
    Taken(73, "save_completions_probability", None, "0.1", 0.1, "save_completions_probability=2", "must be in [0, 1]"),
    Taken(140, "group_size", None, "4", 4, "group_size=7", "nearest valid batch_size: 63 or 70"),
    Taken(149, "batch_size", 64, "8", 8, "batch_size=-1", "batch_size must be at least 1"),
    Taken(153, "rollout_server_url", "http://127.0.0.1:8000", "http://h:1", "http://h:1", "rollout_server_url=[]",
          "should be a valid string"),
]  # fmt: skip

DEEPSPEED = [
    (128, "gradient_accumulation_steps", "1", "gradient_accumulation_steps=8", "max_tokens_per_micro_batch"),
    (129, "gradient_clipping", "1.0", "", ""),
    (130, "zero_stage", "1", "zero_stage=4", "must be 0, 1, 2 or 3"),
    (131, "offload_optimizer_device", "cpu", "offload_optimizer_device=disk", "must be none or cpu"),
    (131, "offload_param_device", "none", "offload_param_device=cpu", "needs zero_stage=3"),
    (132, "zero3_init_flag", "false", "zero3_init_flag=true", "needs zero_stage=3"),
    (132, "zero3_save_16bit_model", "false", "zero3_save_16bit_model=true", "needs zero_stage=3"),
]

ENVIRONMENT, INFERENCE, CLIENT = "option of the environment", "section inference", "inference client"
DATA, REWARD, TEACHER, GKD = (
    "dataset is the environment's",
    "computed by environments",
    "teacher protocol",
    "no separate GKD",
)
SAMPLING, TOKENS, SFT, NO_EVAL = (
    "environments sample",
    "token ids arrive ready",
    "supervised fine-tuning",
    "environments evaluate",
)

REFUSED = [
    (5, "load_in_4bit", "use_peft=true torch_dtype=bfloat16"), (6, "tokenizer.padding_side", TOKENS),
    (6, "tokenizer_kwargs.padding_side", TOKENS), (7, "tokenizer_kwargs.use_fast", TOKENS),
    (8, "unsafe_tokenizer_loading", TOKENS), (12, "name", "chosen by file name"), (13, "dataset_id_or_path", DATA),
    (14, "dataset_split", DATA), (15, "dataset_level_filter", DATA), (16, "dataset_max_samples", DATA),
    (17, "eval_split_ratio", DATA), (18, "shuffle", DATA), (19, "completion_only_training", SFT), (20, "dataset_path", DATA),
    (21, "make_dataset_fn._target_", DATA), (22, "train_split", DATA), (22, "val_split", DATA), (23, "keep_columns", DATA),
    (24, "artificial_epochs", DATA), (27, "num_train_epochs", "use max_steps"), (41, "eval_steps", NO_EVAL),
    (43, "load_best_model_at_end", NO_EVAL), (44, "metric_for_best_model", NO_EVAL), (45, "greater_is_better", NO_EVAL),
    (47, "do_eval", NO_EVAL), (49, "remove_unused_columns", "not from a dataset"), (50, "trainer_log_name", "run_name"),
    (54, "max_prompt_length", SAMPLING), (56, "reward_weights", REWARD), (57, "top_k", SAMPLING), (58, "top_p", SAMPLING),
    (59, "min_p", SAMPLING), (60, "repetition_penalty", SAMPLING), (61, "generation_aggregation_steps", SAMPLING),
    (62, "shuffle_generation_inputs", SAMPLING), (67, "ds3_gather_for_generation", "get whole weights"),
    (69, "backprop_accumulation_steps", "max_tokens_per_micro_batch"),
    (70, "backprop_accumulation_micro_batch_size", "max_tokens_per_micro_batch"), (74, "use_vllm", INFERENCE),
    (75, "use_vllm_server", INFERENCE), (76, "vllm_device", INFERENCE), (77, "vllm_gpu_memory_utilization", INFERENCE),
    (78, "vllm_dtype", INFERENCE), (79, "vllm_max_model_len", INFERENCE), (80, "vllm_host", "inference_servers"),
    (81, "vllm_port", "inference_servers"), (82, "vllm_server_timeout", "inference.ready_timeout_s"), (83, "use_ray", INFERENCE),
    (84, "ray_tensor_parallelism", INFERENCE), (85, "num_vllm_clients", "inference_servers"),
    (86, "enable_prefix_caching", INFERENCE), (87, "enforce_eager", INFERENCE), (88, "max_probe_tokens", TEACHER),
    (89, "student_diagnostic_template", TEACHER), (90, "teacher_adaptive_template", TEACHER),
    (91, "student_with_teaching_template", TEACHER), (92, "student_baseline_template", TEACHER),
    (93, "degradation_penalty_multiplier", TEACHER), (94, "efficiency_weight", TEACHER), (95, "logging_prob", TEACHER),
    (96, "student_model", TEACHER), (97, "use_reference_teacher_model", TEACHER), (98, "trainer_args.max_probe_tokens", TEACHER),
    (99, "diagnostic_probe.max_tokens", TEACHER), (100, "generate_guidance.max_tokens", TEACHER), (101, "max_seq_length", SFT),
    (102, "packing", SFT), (103, "reward_log_name", REWARD), (104, "teacher_reward._target_", REWARD),
    (105, "teacher_reward.tokenizer", REWARD), (106, "temperatures", REWARD), (107, "models.small_model", REWARD),
    (108, "models.large_model", REWARD), (109, "active_judges", REWARD), (110, "anti_gaming.cap_score", REWARD),
    (111, "parallel_execution.max_workers", REWARD), (117, "lmbda", GKD), (118, "kd_temperature", GKD),
    (119, "kd_temperature", GKD), (120, "max_new_tokens", GKD), (121, "seq_kd", GKD), (122, "disable_dropout", "always off"),
    (123, "teacher_model_name_or_path", GKD), (123, "teacher_model_init_kwargs", GKD), (124, "align_teacher_template", GKD),
    (124, "teacher_tokenizer_name_or_path", GKD), (125, "db_url", DATA), (125, "min_reward", DATA), (125, "learning_key", DATA),
    (126, "baseline_success", GKD), (126, "baseline_tokens", GKD), (127, "compute_environment", "deepspeed=FILE"),
    (127, "distributed_type", "deepspeed=FILE"), (141, "max_num_workers", ENVIRONMENT),
    (142, "max_num_workers_per_node", ENVIRONMENT), (143, "max_eval_workers", ENVIRONMENT), (144, "steps_per_eval", ENVIRONMENT),
    (145, "max_token_length", ENVIRONMENT), (146, "eval_handling", ENVIRONMENT), (147, "eval_limit_ratio", ENVIRONMENT),
    (148, "inference_weight", ENVIRONMENT), (150, "max_batches_offpolicy", "max_staleness"), (151, "tokenizer_name", ENVIRONMENT),
    (152, "use_wandb", ENVIRONMENT), (154, "total_steps", "max_steps"), (155, "wandb_name", ENVIRONMENT),
    (156, "num_rollouts_to_keep", ENVIRONMENT), (157, "num_rollouts_per_group_for_logging", ENVIRONMENT),
    (158, "ensure_scores_are_not_same", ENVIRONMENT), (159, "data_path_to_save_groups", ENVIRONMENT),
    (160, "min_items_sent_before_logging", ENVIRONMENT), (161, "slurm", ENVIRONMENT), (162, "testing", ENVIRONMENT),
    (163, "timeout", CLIENT), (164, "num_max_requests_at_once", CLIENT), (165, "num_requests_for_eval", CLIENT),
    (166, "model_name", "model_name_or_path"), (167, "rolling_buffer_length", CLIENT), (168, "api_key", CLIENT),
    (169, "base_url", CLIENT),
]  # fmt: skip

NO_OPTIONS = {112, 113, 114, 115, 116, *range(133, 140)}
"""Preset selectors and recipes (see test_compose), the Python interface, environment variables and positional arguments."""
ONLY_SAYS_THE_BATCH_SIZE = ("per_device_train_batch_size", "gradient_accumulation_steps")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"model_name_or_path={tmp_path}"


def field_of(key: str) -> str:
    return "batch_size" if key in ONLY_SAYS_THE_BATCH_SIZE else canonical(key)


def test_every_row_is_here() -> None:
    rows = {row.row for row in TAKEN} | {row for row, *_ in DEEPSPEED} | {row for row, *_ in REFUSED}

    assert rows | NO_OPTIONS == set(range(1, 170))
    assert not rows & NO_OPTIONS


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: row.key)
def test_a_row_of_the_trainer_is_taken_under_its_name(row: Taken, model: str) -> None:
    key = field_of(row.key)

    config, origins = load_config_with_origins(None, [model, f"{row.key}={row.given}"])

    assert getattr(config, key) == row.expected
    assert key in settable_keys()
    assert origins[key].startswith("the command line")


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: row.key)
def test_a_row_of_the_trainer_has_the_default_that_is_promised(row: Taken) -> None:
    assert getattr(GRPOConfig(), field_of(row.key)) == row.default


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: row.key)
def test_a_wrong_value_of_a_row_is_explained(row: Taken, model: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [model, *(row.bad.split(" ") if "{" not in row.bad else [row.bad])])

    assert row.message in str(caught.value)


@pytest.mark.parametrize(("row", "key", "given", "bad", "message"), DEEPSPEED, ids=lambda value: str(value))
def test_a_field_of_accelerates_deepspeed_block_is_taken(
    row: int, key: str, given: str, bad: str, message: str, model: str
) -> None:
    options = layers(None, [model, f"deepspeed_config.{key}={given}"])

    assert "zero_optimization" in Composition(options).values()["deepspeed"]
    if bad:
        with pytest.raises(ConfigError, match=message):
            Composition(layers(None, [model, f"deepspeed_config.{bad}"])).values()


def test_two_bounds_of_the_gradient_are_refused(model: str) -> None:
    with pytest.raises(ConfigError, match=r"contradicts max_grad_norm=1\.0"):
        load_config(None, [model, "deepspeed_config.gradient_clipping=0.3"])


@pytest.mark.parametrize(("row", "key", "hint"), REFUSED, ids=lambda value: str(value))
def test_a_row_of_others_is_refused_with_where_it_goes(row: int, key: str, hint: str, model: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [model, f"{key}=1"])

    assert hint in str(caught.value)
    assert f"key {key!r} in the command line has no use in this trainer" in str(caught.value)


@pytest.mark.parametrize("section", ["data", "model", "reward", "trainer", "trainer.args", "trainer_args"])
def test_a_refused_key_is_recognised_in_each_legacy_section(section: str, model: str) -> None:
    with pytest.raises(ConfigError, match="has no use in this trainer"):
        load_config(None, [model, f"{section}.dataset_path=x"])


def test_the_presets_of_deepspeed_exist() -> None:
    assert PRESETS == ("zero1", "zero2", "zero3", "zero3_offload")


def test_the_plain_configuration_raises_no_doubts() -> None:
    assert doubts(GRPOConfig()) == []
