"""Keys that a method does not take, each with what to do instead. No torch."""

from __future__ import annotations

from atroposlib.data.config import DataConfig

_ONE_BATCH = "batch_size is sequences a step over all ranks; max_tokens_per_micro_batch bounds memory"
_NO_DATASET = "batches come from the rollout server, not from a dataset"
_NO_EVAL = "environments evaluate, not this trainer"
_NO_LOGITS = "the loss is computed from logprobs of the sampled tokens"
_ONE_LOADER = "rows are loaded once, and cut into passes by tokens"
_NOT_OURS = "set it through DeepSpeed, or leave it"

REFUSED: dict[str, str] = {
    "auto_find_batch_size": _ONE_BATCH,
    "num_train_epochs": "use max_steps",
    **dict.fromkeys(
        (
            "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
            "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
            "remove_unused_columns", "label_names", "train_sampling_strategy", "length_column_name", "data_seed",
            "ignore_data_skip", "include_num_input_tokens_seen",
        ),
        _NO_DATASET,
    ),
    **dict.fromkeys(
        (
            "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
            "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics",
            "per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics", "bf16_full_eval",
            "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
        ),
        _NO_EVAL,
    ),
    **dict.fromkeys(
        ("label_smoothing_factor", "average_tokens_across_devices"),
        _NO_LOGITS,
    ),
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "ddp_find_unused_parameters"), _NOT_OURS
    ),
    "fp16": "use bf16",
    "neftune_noise_alpha": "the policy that is trained must be the policy that was sampled",
    "use_cache": "generation happens in the inference servers",
    "save_only_model": "a checkpoint must be able to resume",
    "enable_jit_checkpoint": "SIGTERM already saves a checkpoint at the end of the step",
    "resume_from_checkpoint": "the trainer resumes from the newest whole checkpoint in output_dir by itself",
    "local_rank": "the launcher sets it",
    "logging_strategy": "use logging_steps; metrics.jsonl has every step in any case",
    "logging_nan_inf_filter": "metrics.jsonl shows what happened",
    **dict.fromkeys(("hub_strategy", "hub_always_push"), "the final model is uploaded once it is saved"),
    "disable_tqdm": "one line of log a step is all there is",
    "restore_callback_states_from_checkpoint": "there are no such callbacks",
}  # fmt: skip
"""Keys of transformers that would have no effect with method=grpo."""

_EVALUATION = (
    "num_train_epochs", "do_eval", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "disable_tqdm",
)  # fmt: skip
REFUSED_SUPERVISED: dict[str, str] = {
    **{key: reason for key, reason in REFUSED.items() if key not in _EVALUATION},
    **{
        key: _ONE_LOADER
        for key, reason in REFUSED.items()
        if reason in (_NO_DATASET, _NO_EVAL) and key not in _EVALUATION
    },
    "data_seed": "use seed",
    "label_smoothing_factor": "the loss is the mean of what trained tokens cost, and nothing else",
    "average_tokens_across_devices": "the loss is always a mean over the tokens of all ranks",
    "do_train": "the command trains",
    "do_predict": "serve the final model, and ask it",
    "neftune_noise_alpha": "noise in the embeddings is not implemented",
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel_config"),
        "the loss takes logprob_chunk_size tokens at a time, so that what its largest kernel saves never exists; its others are "
        "put into models by method=grpo alone",
    ),
    "use_cache": "training passes have no cache of keys and values",
    "prediction_loss_only": "an evaluation measures loss and perplexity, and keeps no logits",
}
"""The same with method=sft and method=gkd."""

_SAMPLING = "environments sample: their code passes it to sample(), and it travels with each group"
_SCHEDULING = "environments ask for completions whenever there is room, and the inference server schedules: leave it"
_ENVIRONMENT = "an option of the environment: --env.{key}, or options of environments in the file of atropos up"
_CLIENT = "an option of the environment's inference client: --openai.{key}"
_ENVIRONMENT_COMMAND = "a flag of the environment's command: --{key}"
_TEACHER = "part of the teacher protocol: {key} of the teaching environment's options"
_STUDENT = "the student is served, not loaded: section frozen of the file of atropos up"
_REWARD = "rewards are computed by environments: {key} of their section rim"
_REWARD_FUNCS = "rewards are computed by environments, or by the reward functions of local mode: GRPOTrainer takes it"
_DATASET = "the dataset is the environment's: set it there"
_TOKENS = "token ids arrive ready: the trainer neither pads nor tokenizes"
_LAUNCHER = "atropos up names and starts runs: set it there, or use run_name and run_dir"
_PRESET = "presets are chosen by file name: model=NAME"
_CHUNKS = "each micro batch has its own backward pass: lower max_tokens_per_micro_batch instead"
_DRAIN = "use num_minibatches for several optimizer steps on one batch"

_ENGINE = "an option of the inference server: inference.{} of the file of atropos up"
_NO_RAY = "Ray is not supported: start several inference servers, and list their base URLs in inference_servers"
_INFERENCE: dict[str, str] = {
    **dict.fromkeys(
        ("use_vllm", "use_vllm_server"),
        "inference servers generate, always: section inference of the file of atropos up",
    ),
    "vllm_dtype": _ENGINE.format("dtype"),
    "vllm_gpu_memory_utilization": _ENGINE.format("gpu_memory_utilization"),
    "vllm_max_model_len": _ENGINE.format("max_model_len"),
    "ray_tensor_parallelism": _ENGINE.format("tensor_parallel_size"),
    "enforce_eager": f"{_ENGINE.format('extra_args')}, as [--enforce-eager]",
    "enable_prefix_caching": f"always on; {_ENGINE.format('extra_args')}, as [--no-enable-prefix-caching]",
    "vllm_device": "set CUDA_VISIBLE_DEVICES in processes.inference.env of the file of atropos up",
    "vllm_sleep_level": f"engines do not sleep; {_ENGINE.format('gpu_memory_utilization')}",
    "vllm_guided_decoding_regex": "not supported: let the reward judge the form of an answer",
    **dict.fromkeys(
        ("use_ray", "ray_share_training_devices", "ray_data_parallelism", "ray_no_memory_duplication"), _NO_RAY
    ),
}

ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("padding_side", "tokenizer", "tokenizer_kwargs", "unsafe_tokenizer_loading"), _TOKENS),
    "name": _PRESET,
    **dict.fromkeys(DataConfig.model_fields, _DATASET),
    "make_dataset_fn": "the dataset is the environment's: loader of its section data",
    "train_dataset": "the dataset is the environment's, or local mode's: GRPOTrainer takes it",
    "artificial_epochs": "environments go through their items without end: use max_steps",
    "add_dataset_indices": "rows of an environment's section data keep their source_id",
    **dict.fromkeys(("trainer_log_name", "wandb_run_name", "wandb_group_name", "exp_name", "results_dir"), _LAUNCHER),
    "wandb_project": "use project",
    "tags": "set the environment variable WANDB_TAGS",
    "call_post_training": "give the command that comes next a line of its own: atropos-trainer ends when the model is saved",
    "resume_from": REFUSED["resume_from_checkpoint"],
    "save_final_model": "the final model is always saved, in RUN_DIR/final",
    **dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty"), _SAMPLING),
    **dict.fromkeys(("generation_aggregation_steps", "shuffle_generation_inputs"), _SCHEDULING),
    **dict.fromkeys(("reward_weights", "reward_funcs", "reward_model"), _REWARD_FUNCS),
    "ds3_gather_for_generation": "generation happens in the inference servers, which get whole weights",
    **dict.fromkeys(("backprop_accumulation_steps", "backprop_accumulation_micro_batch_size"), _CHUNKS),
    **_INFERENCE,
    **dict.fromkeys(("vllm_host", "vllm_port", "num_vllm_clients"), "list base URLs in inference_servers"),
    "vllm_server_timeout": "inference.ready_timeout_s of the file of atropos up; weight_sync.timeout_s for a transfer",
    "vllm_group_port": "the transport finds a free port; see weight_sync",
    **dict.fromkeys(
        (
            "max_prompt_length", "max_probe_tokens", "student_diagnostic_template", "teacher_adaptive_template",
            "student_with_teaching_template", "student_baseline_template", "degradation_penalty_multiplier",
            "efficiency_weight", "logging_prob", "student_model", "use_reference_teacher_model",
        ),
        _TEACHER,
    ),
    **dict.fromkeys(("student_model_init_kwargs", "disable_student_offloading"), _STUDENT),
    "diagnostic_probe": _TEACHER.format(key="max_probe_tokens"),
    "generate_guidance": _TEACHER.format(key="max_guidance_tokens"),
    **dict.fromkeys(
        (
            "reward_log_name", "teacher_reward", "temperatures", "models", "active_judges", "anti_gaming",
            "parallel_execution", "variance_threshold", "consistency_rules", "model_configs",
        ),
        _REWARD,
    ),
    "disable_dropout": "dropout is always off, so that the policy that is trained is the one that was sampled",
    **dict.fromkeys(("compute_environment", "distributed_type"), "a field of accelerate's file: give deepspeed=FILE"),
    **dict.fromkeys(
        (
            "max_num_workers", "max_num_workers_per_node", "max_eval_workers", "steps_per_eval", "max_token_length",
            "eval_handling", "eval_limit_ratio", "inference_weight", "tokenizer_name", "use_wandb", "wandb_name",
            "num_rollouts_to_keep", "num_rollouts_per_group_for_logging", "ensure_scores_are_not_same",
            "data_path_to_save_groups", "min_items_sent_before_logging", "include_messages",
            "min_batch_allocation", "worker_timeout", "data_dir_to_save_evals", "env",
        ),
        _ENVIRONMENT,
    ),
    **dict.fromkeys(("slurm", "testing", "max_n_completions"), _ENVIRONMENT_COMMAND),
    "max_batches_offpolicy": "the bound is in policy versions here: use max_staleness",
    "total_steps": "use max_steps",
    **dict.fromkeys(
        (
            "timeout", "num_max_requests_at_once", "num_requests_for_eval", "rolling_buffer_length", "openai",
            "api_key", "base_url", "n_kwarg_is_ignored", "server_type",
        ),
        _CLIENT,
    ),
    "model_name": f"the policy is model_name_or_path; else {_CLIENT}",
    "epsilon": "use epsilon_low and epsilon_high",
    "delta": "use dual_clip_c",
    "scale_rewards": "use advantage_scale",
    "num_iterations": "use ppo_epochs",
    **dict.fromkeys(("steps_per_generation", "generation_batch_size"), _DRAIN),
    "importance_sampling_level": "loss_type=gspo has one ratio for a sequence; correction=seq_tis or seq_mis corrects by sequence",
    "vllm_importance_sampling_cap": "use is_cap",
    "vllm_importance_sampling_correction": "use correction",
    "mask_truncated_completions": "use overlong=mask or overlong=keep",
}  # fmt: skip
"""Keys of other components and projects that a user may bring along to method=grpo."""

_ANYWHERE = {
    _ENVIRONMENT, _ENVIRONMENT_COMMAND, _CLIENT, _TEACHER, _STUDENT, _REWARD, _REWARD_FUNCS, _LAUNCHER, _PRESET,
    *_INFERENCE.values(),
    *(
        ELSEWHERE[key]
        for key in (
            "diagnostic_probe", "generate_guidance", "compute_environment", "model_name", "wandb_project", "tags",
            "call_post_training", "resume_from", "save_final_model", "vllm_host", "vllm_server_timeout",
            "vllm_group_port", "total_steps",
        )
    ),
}  # fmt: skip
"""Reasons that have nothing to do with the method."""

ELSEWHERE_SUPERVISED: dict[str, str] = {
    **{key: reason for key, reason in ELSEWHERE.items() if reason in _ANYWHERE},
    "padding_side": "rows are laid end to end: nothing is padded",
    **dict.fromkeys(
        ("tokenizer", "tokenizer_kwargs"), "the tokenizer is tokenizer_name_or_path, with its own settings"
    ),
    "unsafe_tokenizer_loading": "nothing is padded, so the padding token may be any; see trust_remote_code for code",
    "artificial_epochs": "use num_train_epochs",
    "add_dataset_indices": "every row has a source_id",
    "make_dataset_fn": "use loader",
    "load_in_4bit": "only method=grpo trains over 4-bit weights: train LoRA over bfloat16, use_peft=true torch_dtype=bfloat16",
    "train_dataset": "use dataset_path or dataset_id_or_path",
    **dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty"), "completions are sampled by temperature alone"),
    "max_prompt_length": "max_seq_length bounds a whole example",
    "max_completion_length": "max_seq_length bounds a whole example, max_new_tokens what method=gkd samples",
    **dict.fromkeys(
        ("backprop_accumulation_steps", "backprop_accumulation_micro_batch_size"),
        "each micro batch has its own backward pass: lower max_tokens_per_micro_batch instead",
    ),
    "ds3_gather_for_generation": "method=gkd samples from whole weights only: stage 2 or lower",
    "loss_type": "there is one loss: use method=grpo for others",
}
"""The same with method=sft and method=gkd."""


def why_refused(key: str, method: str) -> str | None:
    """What to do instead of a key, which may be dotted; None where there is nothing against it.

    Args:
        method: grpo, sft or gkd.
    """
    refused, elsewhere = (REFUSED, ELSEWHERE) if method == "grpo" else (REFUSED_SUPERVISED, ELSEWHERE_SUPERVISED)
    first = key.split(".")[0]
    if key in refused:
        return refused[key]
    if first in elsewhere:
        return elsewhere[first].format(key=key.removeprefix("env.").removeprefix("openai."))
    return None
