"""Every option that trainers of this family document: taken under its name by one component, or refused with where it goes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from atroposlib.data.config import DataConfig
from atroposlib.envs.base import BaseEnv
from atroposlib.envs.command_line.options import RootOptions
from atroposlib.envs.config import BaseEnvConfig
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManagerConfig
from atroposlib.errors import ConfigError
from atroposlib.launch.commands import Plan
from atroposlib.launch.config import InferenceSection, ProcessSection, UpConfig
from atroposlib.launch.run_folder import RunFolder
from atroposlib.rim.config import RIMConfig
from atroposlib.teaching.config import TeacherEnvConfig
from tests.compat.named_tests import TESTS, can_fail, find_test
from trainer.config.checks import doubts
from trainer.config.compose import Composition, load_config, load_config_with_origins
from trainer.config.grammar import canonical
from trainer.config.grpo import GRPOConfig
from trainer.config.layers import layers
from trainer.config.refused import ELSEWHERE, ELSEWHERE_SUPERVISED, why_refused
from trainer.config.shared import deepspeed_config
from trainer.grpo_trainer import GRPOTrainer
from trainer.methods import METHODS
from trainer.weight_sync.config import WeightSyncConfig

CONFIG_MD = (TESTS.parent / "CONFIG.md").read_text(encoding="utf-8")


class Taken(NamedTuple):
    """An option that this trainer takes."""

    row: int
    """In the table; 0 for an option that only the code of others has."""
    key: str
    default: Any
    """Of the option that it sets, on a CPU without flash attention; None for the two that only say the batch size."""
    given: str
    expected: Any
    bad: str
    """An override, or several with a blank between them, that is refused."""
    message: str
    method: str = "grpo"


TAKEN = [
    Taken(1, "model_name_or_path", "", ".", ".", "model_name_or_path=./nowhere", "does not exist"),
    Taken(2, "tokenizer_name_or_path", None, ".", ".", "tokenizer_name_or_path=./nowhere", "does not exist"),
    Taken(3, "trust_remote_code", False, "true", True, "trust_remote_code=maybe", "should be a valid boolean"),
    Taken(4, "use_peft", False, "true", True, "lora_r=4", "give use_peft=true as well"),
    Taken(5, "load_in_4bit", False, "false", False, "load_in_4bit=true", "give use_peft=true as well"),
    Taken(9, "torch_dtype", "float32", "bfloat16", "bfloat16", "torch_dtype=float16", "'float32' or 'bfloat16'"),
    Taken(10, "attn_implementation", "sdpa", "eager", "eager", "attn_implementation=flesh", "must be one of auto, sdpa"),
    Taken(11, "model_init_kwargs", None, "{use_cache: false}", {"use_cache": False},
          "model_init_kwargs={use_cache: true}", "is for generation"),
    Taken(25, "output_dir", "runs/atropos/checkpoints", "x", "x", "output_dir=pyproject.toml", "is a file"),
    Taken(26, "max_steps", 200, "450", 450, "max_steps=-1", "max_steps must be at least 1"),
    Taken(28, "train_batch_size", 64, "256", 256, "train_batch_size=60 num_generations=8", "56 or 64"),
    Taken(29, "per_device_train_batch_size", None, "3", 3, "per_device_train_batch_size=0", "must be at least 1"),
    Taken(30, "gradient_accumulation_steps", None, "5", 5,
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
    Taken(19, "completion_only_training", True, "false", False, "completion_only_training=false train_on_last_turn_only=true",
          "give one of them", "sft"),
    Taken(27, "num_train_epochs", 1.0, "10", 10.0, "num_train_epochs=0", "num_train_epochs must be over 0", "sft"),
    Taken(41, "eval_steps", 0, "50", 50, "eval_steps=-1", "eval_steps must be at least 0", "sft"),
    Taken(43, "load_best_model_at_end", False, "false", False, "load_best_model_at_end=true", "needs evaluations", "sft"),
    Taken(44, "metric_for_best_model", "eval_loss", "eval_perplexity", "eval_perplexity",
          "metric_for_best_model=eval_reward eval_steps=50", "is measured by nobody", "sft"),
    Taken(45, "greater_is_better", False, "false", False, "greater_is_better=true", "contradicts metric_for_best_model", "sft"),
    Taken(47, "do_eval", False, "false", False, "do_eval=often", "should be a valid boolean", "sft"),
    Taken(101, "max_seq_length", 4096, "16384", 16384, "max_seq_length=0", "max_seq_length must be at least 2", "sft"),
    Taken(102, "packing", True, "false", False, "packing=x", "should be a valid boolean", "sft"),
    Taken(117, "lmbda", 1.0, "0.5", 0.5, "lmbda=1.5", "lmbda must be in [0, 1]", "gkd"),
    Taken(118, "beta", 0.5, "0.9", 0.9, "beta=1.5", "beta must be in [0, 1]", "gkd"),
    Taken(119, "temperature", 0.9, "0.6", 0.6, "temperature=0", "temperature must be over 0", "gkd"),
    Taken(119, "kd_temperature", 1.0, "2", 2.0, "kd_temperature=0", "kd_temperature must be over 0", "gkd"),
    Taken(120, "max_new_tokens", 512, "128", 128, "max_new_tokens=0", "max_new_tokens must be at least 1", "gkd"),
    Taken(121, "seq_kd", False, "false", False, "seq_kd=true", "give lmbda below 1", "gkd"),
    Taken(122, "disable_dropout", True, "true", True, "disable_dropout=false", "is not taken", "gkd"),
    Taken(123, "teacher_model_name_or_path", "", ".", ".", "teacher_model_name_or_path=./nowhere", "does not exist", "gkd"),
    Taken(123, "teacher_model_init_kwargs", None, "{torch_dtype: bfloat16}", {"torch_dtype": "bfloat16"},
          "teacher_model_init_kwargs=3", "should be a valid dictionary", "gkd"),
    Taken(124, "align_teacher_template", "auto", "false", False, "align_teacher_template=x", "align_teacher_template", "gkd"),
    Taken(124, "teacher_tokenizer_name_or_path", None, ".", ".", "teacher_tokenizer_name_or_path=./nowhere", "does not exist",
          "gkd"),
    Taken(126, "baseline_success", None, "0.75", 0.75, "baseline_success=2", "baseline_success must be in [0, 1]", "gkd"),
    Taken(126, "baseline_tokens", None, "200", 200.0, "baseline_tokens=0", "baseline_tokens must be at least 1", "gkd"),
    Taken(0, "adam_beta1", 0.9, "0.8", 0.8, "adam_beta1=x", "should be a valid number"),
    Taken(0, "adam_beta2", 0.999, "0.95", 0.95, "adam_beta2=x", "should be a valid number"),
    Taken(0, "adam_epsilon", 1e-8, "1e-6", 1e-6, "adam_epsilon=x", "should be a valid number"),
    Taken(0, "lr_scheduler_kwargs", None, "{num_cycles: 2}", {"num_cycles": 2}, "lr_scheduler_kwargs=3", "valid dictionary"),
    Taken(0, "gradient_checkpointing_kwargs", None, "{use_reentrant: false}", {"use_reentrant": False},
          "gradient_checkpointing_kwargs=3", "valid dictionary"),
    Taken(0, "save_strategy", "steps", "no", "no", "save_strategy=often", "save_strategy must be one of steps, no"),
    Taken(0, "seed", 42, "7", 7, "seed=x", "should be a valid integer"),
    Taken(0, "eval_strategy", "no", "no", "no", "eval_strategy=often", "eval_strategy in the command line", "sft"),
    Taken(0, "eval_on_start", True, "false", False, "eval_on_start=x", "should be a valid boolean", "gkd"),
    Taken(0, "custom_start_of_response", None, "x", "x", "custom_start_of_response=''", "is empty", "sft"),
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


class Elsewhere(NamedTuple):
    """An option that another component takes."""

    row: int
    key: str
    owner: type[BaseModel]
    default: Any
    """A dict: of a part, what is promised of it."""
    good: Any
    bad: Any
    """A value that is refused; one of another type where every value of the type is possible, see ACCEPTED, or only a data set
    or a server can tell, see RULES_TESTED_ELSEWHERE."""
    message: str
    beside: Mapping[str, Any] | None = None
    """What `bad` contradicts."""


REQUIRED = PydanticUndefined
RIM = {"models": {"small_model": "http://judge/v1#m"}}
"""The option without which there are no judges."""

OWNED = [
    Elsewhere(13, "dataset_id_or_path", DataConfig, None, "org/set", 3, "valid string"),
    Elsewhere(14, "dataset_split", DataConfig, None, "train", 3, "valid string"),
    Elsewhere(15, "dataset_level_filter", DataConfig, None, "level_4_5", 3, "valid string"),
    Elsewhere(16, "dataset_max_samples", DataConfig, None, 1000, 0, "greater than or equal to 1"),
    Elsewhere(17, "eval_split_ratio", DataConfig, 0.1, 0.2, 1.0, "less than 1"),
    Elsewhere(18, "shuffle", DataConfig, True, False, "x", "valid boolean"),
    Elsewhere(20, "dataset_path", DataConfig, None, "a.jsonl", 3, "not a valid path"),
    Elsewhere(21, "loader", DataConfig, "rows", "runtime_traces", "nobody", "there is no loader 'nobody'"),
    Elsewhere(22, "train_split", DataConfig, "train", "train", 3, "valid string"),
    Elsewhere(22, "val_split", DataConfig, None, "validation", "validation", "both say", {"eval_split_ratio": 0.2}),
    Elsewhere(23, "keep_columns", DataConfig, None, ["prompt"], "prompt", "valid tuple"),
    Elsewhere(54, "max_prompt_length", TeacherEnvConfig, 2048, 1024, 0, "greater than or equal to 1"),
    Elsewhere(88, "max_probe_tokens", TeacherEnvConfig, 500, 50, 5000, "must not exceed max_completion_length"),
    Elsewhere(93, "degradation_penalty_multiplier", TeacherEnvConfig, 2.0, 1.0, -1, "greater than or equal to 0"),
    Elsewhere(94, "efficiency_weight", TeacherEnvConfig, 1.0, 0.3, -1, "greater than or equal to 0"),
    Elsewhere(95, "logging_prob", TeacherEnvConfig, 0.1, 0.0, 2, "less than or equal to 1"),
    Elsewhere(96, "student_model", TeacherEnvConfig, None, "Qwen/Qwen3-4B", 3, "valid string"),
    Elsewhere(97, "use_reference_teacher_model", TeacherEnvConfig, False, True, "x", "valid boolean"),
    Elsewhere(98, "trainer_args", TeacherEnvConfig, {}, {"max_probe_tokens": 50}, {"max_probe_tokens": 50}, "with two values",
              {"max_probe_tokens": 51}),
    Elsewhere(103, "reward_log_name", RIMConfig, "interpretation_teaching", "a_b", "a b", "should match pattern", RIM),
    Elsewhere(104, "teacher_reward", RIMConfig, {"target": "rim"}, {"_target_": "RIM.reward_adapter.RIMReward"},
              {"_target_": "x.Y"}, "known: rim", RIM),
    Elsewhere(105, "teacher_reward", RIMConfig, {"tokenizer": None}, {"tokenizer": None}, {"tokenizer": "x"}, "should be None", RIM),
    Elsewhere(106, "temperatures", RIMConfig, (0.2, 0.5, 0.8), [0.5], [], "at least 1 item", RIM),
    Elsewhere(107, "models", RIMConfig, REQUIRED, RIM["models"], {}, "Field required"),
    Elsewhere(108, "models", RIMConfig, REQUIRED, {"small_model": "a/b", "large_model": None}, {"small_model": ""}, "at least 1 char"),
    # None: those of the preset, which is the offline one where none is given: tests/rim/test_config.py.
    Elsewhere(109, "active_judges", RIMConfig, None, {"accuracy": True},
              {"wisdom": True}, "Input should be 'accuracy'", RIM),
    Elsewhere(110, "anti_gaming", RIMConfig, {"cap_score": 0.3}, {"cap_score": 0.1}, {"cap_score": 2}, "less than or equal to 1", RIM),
    Elsewhere(111, "parallel_execution", RIMConfig, {"max_workers": 8}, {"max_workers": 2}, {"max_workers": 0},
              "greater than or equal to 1", RIM),
    Elsewhere(125, "db_url", DataConfig, None, "postgresql://h/d", 3, "valid string"),
    Elsewhere(125, "min_reward", DataConfig, 0.0, 0.8, "x", "valid number"),
    Elsewhere(125, "learning_key", DataConfig, None, "k", 3, "valid string"),
    Elsewhere(140, "group_size", BaseEnvConfig, 4, 4, 0, "greater than or equal to 1"),
    Elsewhere(141, "max_num_workers", BaseEnvConfig, -1, -1, -2, "greater than or equal to -1"),
    Elsewhere(142, "max_num_workers_per_node", BaseEnvConfig, 8, 8, 0, "greater than or equal to 1"),
    Elsewhere(143, "max_eval_workers", BaseEnvConfig, 16, 16, "x", "valid integer"),
    Elsewhere(144, "steps_per_eval", BaseEnvConfig, 100, 100, "x", "valid integer"),
    Elsewhere(145, "max_token_length", BaseEnvConfig, 2048, 2048, 0, "greater than or equal to 1"),
    Elsewhere(146, "eval_handling", BaseEnvConfig, "STOP_TRAIN", "STOP_TRAIN", "REST", "Input should be"),
    Elsewhere(147, "eval_limit_ratio", BaseEnvConfig, 0.5, 0.5, 2, "less than or equal to 1"),
    Elsewhere(148, "inference_weight", BaseEnvConfig, 1.0, 1.0, "x", "valid number"),
    Elsewhere(149, "batch_size", BaseEnvConfig, -1, -1, -2, "greater than or equal to -1"),
    Elsewhere(150, "max_batches_offpolicy", BaseEnvConfig, 3, 3, "x", "valid integer"),
    Elsewhere(151, "tokenizer_name", BaseEnvConfig, "NousResearch/DeepHermes-3-Llama-3-3B-Preview", "org/model", 3, "valid string"),
    Elsewhere(152, "use_wandb", BaseEnvConfig, True, True, "x", "valid boolean"),
    Elsewhere(153, "rollout_server_url", BaseEnvConfig, "http://localhost:8000", "http://h:1", 3, "valid string"),
    Elsewhere(154, "total_steps", BaseEnvConfig, 1000, 1000, -2, "greater than or equal to -1"),
    Elsewhere(155, "wandb_name", BaseEnvConfig, None, "a", 3, "valid string"),
    Elsewhere(156, "num_rollouts_to_keep", BaseEnvConfig, 32, 32, -1, "greater than or equal to 0"),
    Elsewhere(157, "num_rollouts_per_group_for_logging", BaseEnvConfig, 1, 1, -2, "greater than or equal to -1"),
    Elsewhere(158, "ensure_scores_are_not_same", BaseEnvConfig, True, True, "x", "valid boolean"),
    Elsewhere(159, "data_path_to_save_groups", BaseEnvConfig, None, "a.jsonl", 3, "valid string"),
    Elsewhere(160, "min_items_sent_before_logging", BaseEnvConfig, 2, 2, "x", "valid integer"),
    Elsewhere(161, "slurm", ServerManagerConfig, False, True, "x", "valid boolean"),
    Elsewhere(162, "testing", ServerManagerConfig, False, True, "x", "valid boolean"),
    Elsewhere(163, "timeout", APIServerConfig, 1200, 1200, 0, "greater than 0"),
    Elsewhere(164, "num_max_requests_at_once", APIServerConfig, 512, 512, 0, "greater than or equal to 1"),
    Elsewhere(165, "num_requests_for_eval", APIServerConfig, 64, 64, 0, "greater than or equal to 1"),
    Elsewhere(166, "model_name", APIServerConfig, "default", "default", 3, "valid string"),
    Elsewhere(167, "rolling_buffer_length", APIServerConfig, 1000, 1000, "x", "valid integer"),
    Elsewhere(168, "api_key", APIServerConfig, "", "x", 3, "valid string"),
    Elsewhere(169, "base_url", APIServerConfig, "", "http://h/v1", 3, "valid string"),
    Elsewhere(0, "variance_threshold", RIMConfig, 0.15, 0.15, -1, "greater than or equal to 0", RIM),
    Elsewhere(0, "model_configs", RIMConfig, {"large": {"max_tokens": 32768, "response_format": "json"}}, 
              {"large": {"max_tokens": 9}}, {"huge": {}}, "Extra inputs", RIM),
    Elsewhere(0, "consistency_rules", RIMConfig, {"alignment_completeness_bound": 0.1}, {"alignment_completeness_bound": 0.2},
              {"contradiction_penalty": 0.2}, "has never had an effect", RIM),
    Elsewhere(0, "include_messages", BaseEnvConfig, False, True, "x", "valid boolean"),
    Elsewhere(0, "min_batch_allocation", BaseEnvConfig, None, 0.1, "x", "valid number"),
    Elsewhere(0, "worker_timeout", BaseEnvConfig, 600, 600, "x", "valid number"),
    Elsewhere(0, "data_dir_to_save_evals", BaseEnvConfig, None, "x", 3, "valid string"),
    Elsewhere(0, "max_n_completions", ServerManagerConfig, 8, 8, 0, "greater than or equal to 1"),
    Elsewhere(0, "n_kwarg_is_ignored", APIServerConfig, False, True, "x", "valid boolean"),
    Elsewhere(0, "server_type", APIServerConfig, "openai", "vllm", "abacus", "Input should be"),
]  # fmt: skip
ACCEPTED = [
    (143, BaseEnvConfig, "max_eval_workers", 0, "0 or less: all"),
    (144, BaseEnvConfig, "steps_per_eval", -1, "0 or less: never"),
    (148, BaseEnvConfig, "inference_weight", -7.0, "0 or less: only places that no other environment waits for"),
    (150, BaseEnvConfig, "max_batches_offpolicy", 0, "0 or less: no such bound"),
    (153, BaseEnvConfig, "rollout_server_url", "", "Base URL of the rollout server"),
    (0, BaseEnvConfig, "worker_timeout", -1.0, "0 or less: no deadline"),
    (160, BaseEnvConfig, "min_items_sent_before_logging", 0, "Groups accepted before the metrics"),
    (162, ServerManagerConfig, "testing", True, "harness of canned answers"),
    (167, APIServerConfig, "rolling_buffer_length", 0, "Requests that the timing metrics look back on"),
]
"""Values that are refused elsewhere and taken here, for compatibility: Atropos has no bounds."""
TEMPLATES = [
    (89, "student_diagnostic_template", "question"),
    (90, "teacher_adaptive_template", "approach"),
    (91, "student_with_teaching_template", "teaching"),
    (92, "student_baseline_template", "question"),
]

ENVIRONMENT, INFERENCE, CLIENT = "option of the environment", "section inference", "inference client"
COMMAND, REWARD_FUNCS, STUDENT = "flag of the environment's command", "GRPOTrainer takes it", "section frozen"
DATA, REWARD, TEACHER = "dataset is the environment's", "computed by environments", "teacher protocol"
SAMPLING, SCHEDULING = "passes it to sample()", "the inference server schedules"
ENGINE, RAY = "inference.{} of the file of atropos up", "Ray is not supported"
TOKENS, NO_EVAL = "token ids arrive ready", "environments evaluate"
SFT, GKD = "it is a key of method=sft", "it is a key of method=gkd"

REFUSED = [
    (6, "tokenizer.padding_side", TOKENS),
    (6, "tokenizer_kwargs.padding_side", TOKENS), (7, "tokenizer_kwargs.use_fast", TOKENS),
    (8, "unsafe_tokenizer_loading", TOKENS), (12, "name", "chosen by file name"), (13, "dataset_id_or_path", DATA),
    (14, "dataset_split", DATA), (15, "dataset_level_filter", DATA), (16, "dataset_max_samples", DATA),
    (17, "eval_split_ratio", DATA), (18, "shuffle", DATA), (19, "completion_only_training", SFT), (20, "dataset_path", DATA),
    (21, "make_dataset_fn._target_", DATA), (22, "train_split", DATA), (22, "val_split", DATA), (23, "keep_columns", DATA),
    (24, "artificial_epochs", "without end: use max_steps"),
    (27, "num_train_epochs", "use max_steps; it is a key of method=sft"), (41, "eval_steps", NO_EVAL),
    (43, "load_best_model_at_end", NO_EVAL), (44, "metric_for_best_model", NO_EVAL), (45, "greater_is_better", NO_EVAL),
    (47, "do_eval", NO_EVAL), (49, "remove_unused_columns", "not from a dataset"), (50, "trainer_log_name", "run_name"),
    (54, "max_prompt_length", TEACHER), (56, "reward_weights", REWARD_FUNCS), (57, "top_k", SAMPLING), (58, "top_p", SAMPLING),
    (59, "min_p", SAMPLING), (60, "repetition_penalty", SAMPLING), (61, "generation_aggregation_steps", SCHEDULING),
    (62, "shuffle_generation_inputs", SCHEDULING), (67, "ds3_gather_for_generation", "get whole weights"),
    (69, "backprop_accumulation_steps", "max_tokens_per_micro_batch"),
    (70, "backprop_accumulation_micro_batch_size", "max_tokens_per_micro_batch"), (74, "use_vllm", INFERENCE),
    (75, "use_vllm_server", INFERENCE), (76, "vllm_device", "processes.inference.env"),
    (77, "vllm_gpu_memory_utilization", ENGINE.format("gpu_memory_utilization")), (78, "vllm_dtype", ENGINE.format("dtype")),
    (79, "vllm_max_model_len", ENGINE.format("max_model_len")), (80, "vllm_host", "inference_servers"),
    (81, "vllm_port", "inference_servers"), (82, "vllm_server_timeout", "inference.ready_timeout_s"), (83, "use_ray", RAY),
    (84, "ray_tensor_parallelism", ENGINE.format("tensor_parallel_size")), (85, "num_vllm_clients", "inference_servers"),
    (86, "enable_prefix_caching", ENGINE.format("extra_args")),
    (87, "enforce_eager", ENGINE.format("extra_args")), (88, "max_probe_tokens", TEACHER),
    (89, "student_diagnostic_template", TEACHER), (90, "teacher_adaptive_template", TEACHER),
    (91, "student_with_teaching_template", TEACHER), (92, "student_baseline_template", TEACHER),
    (93, "degradation_penalty_multiplier", TEACHER), (94, "efficiency_weight", TEACHER), (95, "logging_prob", TEACHER),
    (96, "student_model", TEACHER), (97, "use_reference_teacher_model", TEACHER), (98, "trainer_args.max_probe_tokens", TEACHER),
    (99, "diagnostic_probe.max_tokens", "max_probe_tokens of the teaching environment"),
    (100, "generate_guidance.max_tokens", "max_guidance_tokens of the teaching environment"), (101, "max_seq_length", SFT),
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
    (160, "min_items_sent_before_logging", ENVIRONMENT), (161, "slurm", COMMAND), (162, "testing", COMMAND),
    (163, "timeout", CLIENT), (164, "num_max_requests_at_once", CLIENT), (165, "num_requests_for_eval", CLIENT),
    (166, "model_name", "model_name_or_path"), (167, "rolling_buffer_length", CLIENT), (168, "api_key", CLIENT),
    (169, "base_url", CLIENT),
    (0, "vllm_group_port", "weight_sync"), (0, "vllm_guided_decoding_regex", "not supported"),
    (0, "ray_share_training_devices", RAY), (0, "ray_data_parallelism", RAY), (0, "ray_no_memory_duplication", RAY),
    (0, "vllm_sleep_level", ENGINE.format("gpu_memory_utilization")), (0, "student_model_init_kwargs", STUDENT),
    (0, "disable_student_offloading", STUDENT), (0, "logging_strategy", "use logging_steps"), (0, "eval_strategy", NO_EVAL),
    (0, "eval_on_start", NO_EVAL), (0, "eval_accumulation_steps", NO_EVAL), (0, "per_device_eval_batch_size", NO_EVAL),
    (0, "save_final_model", "RUN_DIR/final"), (0, "resume_from", "by itself"), (0, "tags", "WANDB_TAGS"),
    (0, "call_post_training", "a line of its own"), (0, "wandb_project", "use project"), (0, "wandb_group_name", "run_name"),
    (0, "wandb_run_name", "run_name"), (0, "results_dir", "run_dir"), (0, "exp_name", "run_name"),
    (0, "custom_start_of_response", SFT), (0, "add_dataset_indices", "keep their source_id"), (0, "variance_threshold", REWARD),
    (0, "model_configs", REWARD), (0, "consistency_rules", REWARD), (0, "include_messages", ENVIRONMENT),
    (0, "min_batch_allocation", ENVIRONMENT), (0, "worker_timeout", ENVIRONMENT), (0, "data_dir_to_save_evals", ENVIRONMENT),
    (0, "max_n_completions", COMMAND), (0, "n_kwarg_is_ignored", CLIENT), (0, "server_type", CLIENT),
]  # fmt: skip
"""With method=grpo."""
REFUSED_IN_SFT = [
    (6, "padding_side", "nothing is padded"), (8, "unsafe_tokenizer_loading", "nothing is padded"),
    (24, "artificial_epochs", "use num_train_epochs"), (37, "fp16", "use bf16"), (49, "remove_unused_columns", "loaded once"),
    (57, "top_k", "by temperature alone"), (74, "use_vllm", INFERENCE), (88, "max_probe_tokens", TEACHER),
    (106, "temperatures", REWARD), (117, "lmbda", GKD), (140, "group_size", "it is a key of method=grpo"),
    (141, "max_num_workers", ENVIRONMENT),
]  # fmt: skip

ONLY_EXTENSIONS = {
    "vllm_group_port", "vllm_guided_decoding_regex", "ray_share_training_devices", "ray_data_parallelism",
    "ray_no_memory_duplication", "vllm_sleep_level", "student_model_init_kwargs", "disable_student_offloading", "adam_beta1",
    "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "save_strategy", "logging_strategy",
    "eval_strategy", "eval_on_start", "eval_accumulation_steps", "per_device_eval_batch_size", "save_final_model", "resume_from",
    "seed", "tags", "call_post_training", "wandb_project", "wandb_group_name", "wandb_run_name", "results_dir", "exp_name",
    "custom_start_of_response", "add_dataset_indices", "variance_threshold", "model_configs", "consistency_rules",
    "include_messages", "min_batch_allocation", "worker_timeout", "data_dir_to_save_evals", "max_n_completions",
    "n_kwarg_is_ignored", "server_type",
}  # fmt: skip
"""Options without a row of their own."""

TESTED_ELSEWHERE = {
    112: "trainer/config/test_compose.py::test_all_spellings_of_a_preset_mean_the_preset",
    113: "trainer/config/test_compose.py::test_the_teachers_recipes_are_those_of_the_documents",
    114: "trainer/config/test_compose.py::test_the_teachers_recipes_are_those_of_the_documents",
    115: "trainer/test_grpo_trainer.py::test_both_names_of_the_configuration_and_of_the_tokenizer_are_taken",
    116: "trainer/test_grpo_trainer.py::test_override_points_and_callbacks_are_called_and_their_errors_end_the_run",
    133: "trainer/policy/test_hub.py::test_the_token_comes_from_the_environment",
    134: "trainer/reporting/test_tracking.py::test_wandb_without_a_key_stays_in_the_run_folder",
    137: "trainer/config/test_config_variables.py::test_a_variable_that_nobody_reads_any_more_is_named",
    139: "compat/test_training_spec.py::test_processes_of_the_trainer_are_counted_by_name",
}
"""Rows that are no options: selectors and recipes, the Python interface, variables, arguments of launching."""
RULES_TESTED_ELSEWHERE = {
    13: "data/test_lines.py::test_a_file_that_is_not_there_is_named",
    14: "data/test_loaders.py::test_arc_atlas_reads_the_split_that_is_asked_for",
    15: "data/test_load.py::test_no_row_at_all_is_an_error_with_the_funnel",
    20: "data/test_lines.py::test_a_file_that_is_not_there_is_named",
    23: "data/test_load.py::test_columns_to_keep_are_checked",
    96: "teaching/test_student_server.py::test_a_student_that_is_not_served_is_named_at_the_start",
    125: "data/test_postgres_urls.py::test_the_configuration_comes_before_the_variables",
    144: "envs/test_eval_handling.py::test_nothing_is_due_where_nothing_was_crossed",
    148: "compat/sdk/test_pitfalls_environment.py::test_pitfall_44_a_weight_of_minus_one_registers",
    151: "trainer/test_trainer_batches.py::test_token_ids_of_another_model_end_the_run_before_the_step",
    159: "compat/sdk/test_file_formats.py::test_existing_files_are_left_alone_and_the_config_names_the_one_in_use",
    161: "compat/sdk/test_base_env.py::test_slurm_outside_of_a_job_leaves_the_servers_as_given",
    168: "envs/test_cli.py::test_an_api_key_is_not_printed",
}
"""Rows whose value is only wrong beside a data set, a database or a server, or that mean something instead (see ACCEPTED)."""
DOCUMENTED_VARIABLES = {
    133: "HF_TOKEN", 134: "WANDB_API_KEY", 135: "HF_HUB_ENABLE_HF_TRANSFER", 136: "CUDA_VISIBLE_DEVICES",
    137: "TRANSFORMERS_CACHE", 138: "VLLM_WORKER_MULTIPROC_METHOD",
}  # fmt: skip
"""Variables of libraries: CONFIG.md says who honours them."""
THE_TYPE_IS_THE_RULE = {18, 97, 152, 153, 155, 158, 162, 166, 169}
"""Switches, and texts of which any may be right."""
ONLY_SAYS_THE_BATCH_SIZE = ("per_device_train_batch_size", "gradient_accumulation_steps")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return f"model_name_or_path={tmp_path}"


def field_of(key: str) -> str:
    return "batch_size" if key in ONLY_SAYS_THE_BATCH_SIZE else canonical(key)


def options_of(row: Taken, folder: Path) -> list[str]:
    """What a configuration of the row's method needs besides."""
    teacher = [f"teacher_model_name_or_path={folder}"] if row.method == "gkd" else []
    return [f"method={row.method}", f"model_name_or_path={folder}", *teacher]


def test_every_row_is_here() -> None:
    tables = (TAKEN, DEEPSPEED, OWNED, TEMPLATES, REFUSED)
    rows = {row[0] for table in tables for row in table} - {0}

    assert rows | TESTED_ELSEWHERE.keys() | DOCUMENTED_VARIABLES.keys() == set(range(1, 170))
    assert not rows & (TESTED_ELSEWHERE.keys() | DOCUMENTED_VARIABLES.keys())


@pytest.mark.parametrize("test", [*TESTED_ELSEWHERE.values(), *RULES_TESTED_ELSEWHERE.values()])
def test_what_is_tested_elsewhere_has_its_test(test: str) -> None:
    assert can_fail(find_test(test))


def test_every_rule_is_tested_here_or_elsewhere() -> None:
    """A value of another type is no example of a rule, unless the rule is the type."""
    words = ("valid ", "not a valid ")
    of_types = {row.row for row in OWNED if row.message.startswith(words)}
    of_rules = {row.row for row in OWNED if not row.message.startswith(words)}
    meant = {row for row, *_ in ACCEPTED}

    assert of_types - of_rules - RULES_TESTED_ELSEWHERE.keys() - meant - THE_TYPE_IS_THE_RULE == set()


def test_the_page_shows_every_key() -> None:
    shown = set(re.findall(r"`([^`\n]+)`", CONFIG_MD))
    keys = {row[1] for table in (TAKEN, DEEPSPEED, OWNED, TEMPLATES, REFUSED, REFUSED_IN_SFT) for row in table}

    # A dotted key stands there whole, or as its section or its last name.
    assert [key for key in sorted(keys) if not shown & {key, *key.split(".")}] == []


def test_processes_of_the_trainer_are_counted_by_name(tmp_path: Path) -> None:
    environment = {"command": "environments/chain_sum.py"}
    config = UpConfig.model_validate({"model": tmp_path, "environments": [environment], "trainer_ranks": 3})

    argv = Plan(config, RunFolder(tmp_path), 9000, 9001, has_gpu=False).trainer().argv

    assert argv[argv.index("--nproc-per-node") + 1] == "3"


@pytest.mark.parametrize("variable", DOCUMENTED_VARIABLES.values())
def test_a_variable_of_a_library_is_documented(variable: str) -> None:
    assert f"| `{variable}` |" in CONFIG_MD


def test_every_option_without_a_row_is_here() -> None:
    keys = {row[1] for table in (TAKEN, OWNED, REFUSED) for row in table if row[0] == 0}

    assert keys == ONLY_EXTENSIONS


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: f"{row.method}-{row.key}")
def test_a_row_of_the_trainer_is_taken_under_its_name(row: Taken, tmp_path: Path) -> None:
    key = field_of(row.key)

    config, origins = load_config_with_origins(None, [*options_of(row, tmp_path), f"{row.key}={row.given}"])

    assert getattr(config, key) == row.expected
    assert key in METHODS[row.method].schema.keys
    assert origins[key].startswith("the command line")


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: f"{row.method}-{row.key}")
def test_a_row_of_the_trainer_has_the_default_that_is_promised(row: Taken) -> None:
    config_class = METHODS[row.method].config_class
    if row.key in ONLY_SAYS_THE_BATCH_SIZE:
        assert config_class.__dataclass_fields__[row.key].default is row.default
    else:
        assert getattr(config_class(), field_of(row.key)) == row.default


@pytest.mark.parametrize("row", TAKEN, ids=lambda row: f"{row.method}-{row.key}")
def test_a_wrong_value_of_a_row_is_explained(row: Taken, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*options_of(row, tmp_path), *(row.bad.split(" ") if "{" not in row.bad else [row.bad])])

    assert row.message in str(caught.value)


@pytest.mark.parametrize("row", OWNED, ids=lambda row: f"{row.owner.__name__}-{row.row}-{row.key}")
def test_a_row_of_another_component_is_taken_there(row: Elsewhere) -> None:
    needed = RIM if row.owner is RIMConfig else {}

    config = row.owner.model_validate({**needed, row.key: row.good})

    assert row.key in config.model_fields_set or row.key == "trainer_args"
    with pytest.raises((ValidationError, ConfigError)) as caught:
        row.owner.model_validate({**(row.beside or {}), row.key: row.bad})
    assert row.message in str(caught.value)


@pytest.mark.parametrize("row", OWNED, ids=lambda row: f"{row.owner.__name__}-{row.row}-{row.key}")
def test_a_row_of_another_component_has_the_default_that_is_promised(row: Elsewhere) -> None:
    default = row.owner.model_fields[row.key].get_default(call_default_factory=True)

    assert part(default, row.default) == row.default


def part(value: Any, promised: Any) -> Any:
    """What of a value a promise is about."""
    if isinstance(value, BaseModel):
        return {key: part(getattr(value, key), inner) for key, inner in promised.items()}
    return getattr(value, "value", value)


@pytest.mark.parametrize(("row", "owner", "key", "value", "meaning"), ACCEPTED, ids=[row[2] for row in ACCEPTED])
def test_a_value_that_existing_environments_may_hold_is_taken_and_explained(
    row: int, owner: type[BaseModel], key: str, value: Any, meaning: str
) -> None:
    assert getattr(owner.model_validate({key: value}), key) == value
    assert meaning in str(owner.model_fields[key].description)


@pytest.mark.parametrize(("row", "key", "variable"), TEMPLATES, ids=[key for _, key, _ in TEMPLATES])
def test_a_template_without_its_variable_is_refused(row: int, key: str, variable: str) -> None:
    config = TeacherEnvConfig.model_validate({key: "{question} {approach} {teaching}"})
    assert config.template(key)

    without = "{question} {approach} {teaching}".replace(f"{{{variable}}}", "")
    with pytest.raises(ConfigError, match=f"{key} must contain .*{variable}"):
        TeacherEnvConfig.model_validate({key: without}).template(key)


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
    assert f"key {key!r} in the command line has no use with method=grpo" in str(caught.value)


@pytest.mark.parametrize(("row", "key", "hint"), REFUSED_IN_SFT, ids=lambda value: str(value))
def test_a_row_of_others_is_refused_by_supervised_training_too(row: int, key: str, hint: str, model: str) -> None:
    with pytest.raises(ConfigError, match=f"{key!r} in the command line has no use with method=sft: .*{hint}"):
        load_config(None, [model, "method=sft", f"{key}=1"])


HINTED = {
    r"\buse (?:method=)?(\w+)": {*METHODS, *(key for method in METHODS.values() for key in method.schema.names())},
    r"--env\.(\w+)": BaseEnvConfig.model_fields,
    r"--openai\.(\w+)": APIServerConfig.model_fields,
    r"environment's command: --(\w+)": RootOptions.model_fields,
    r"(?<!\.)\binference\.(\w+)": InferenceSection.model_fields,
    r"processes\.inference\.(\w+)": ProcessSection.model_fields,
    r"section (\w+) of the file of atropos up": UpConfig.model_fields,
    r"(\w+) of the teaching environment": TeacherEnvConfig.model_fields,
    r"(\w+) of their section rim": RIMConfig.model_fields,
    r"(\w+) of its section data": DataConfig.model_fields,
    r"passes it to (\w+)": dir(BaseEnv),
    r"base URLs in (\w+)": GRPOConfig.__dataclass_fields__,
    r"weight_sync\.(\w+)": WeightSyncConfig.__dataclass_fields__,
}
"""How a hint names what to use instead, and who has something of that name."""
NAMESPACES = {"env", "openai"}
"""Refused with the name after the dot."""


@pytest.mark.parametrize(
    ("method", "key"),
    [("grpo", key) for key in sorted(ELSEWHERE.keys() - NAMESPACES)]
    + [("sft", key) for key in sorted(ELSEWHERE_SUPERVISED.keys() - NAMESPACES)],
)
def test_what_a_hint_names_exists(method: str, key: str) -> None:
    hint = str(why_refused(key, method))
    named = {name: names for pattern, names in HINTED.items() for name in re.findall(pattern, hint)}

    assert [name for name, names in named.items() if name not in names] == []
    if "dataset is the environment's: set it there" in hint:
        assert key in DataConfig.model_fields
    if hint.endswith("GRPOTrainer takes it"):
        assert key in inspect.signature(GRPOTrainer).parameters


@pytest.mark.parametrize("section", ["data", "model", "reward", "trainer", "trainer.args", "trainer_args"])
def test_a_refused_key_is_recognised_in_each_legacy_section(section: str, model: str) -> None:
    with pytest.raises(ConfigError, match="has no use with method=grpo"):
        load_config(None, [model, f"{section}.dataset_path=x"])


@pytest.mark.parametrize(
    ("name", "stage", "offloads"),
    [("zero1", 1, False), ("zero2", 2, False), ("zero3", 3, False), ("zero3_offload", 3, True)],
)
def test_the_presets_of_deepspeed_are_what_they_are_called(name: str, stage: int, offloads: bool) -> None:
    zero = deepspeed_config(name, max_grad_norm=1.0)["zero_optimization"]

    assert zero["stage"] == stage
    devices = {zero.get(f"offload_{kind}", {}).get("device") for kind in ("param", "optimizer")}
    assert devices == ({"cpu"} if offloads else {None})


def test_the_plain_configuration_raises_no_doubts() -> None:
    assert doubts(GRPOConfig()) == []
