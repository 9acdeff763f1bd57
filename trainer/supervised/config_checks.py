"""What makes a configuration of SFT or GKD impossible, or unwise. All raise ConfigError with the fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atroposlib.errors import ConfigError
from trainer.config.checks import check_folders, check_sources
from trainer.config.deepspeed_presets import zero_stage
from trainer.config.fingerprint import is_secret

if TYPE_CHECKING:
    from trainer.supervised.config import DatasetTrainingConfig, GKDConfig

AT_LEAST = {
    "max_seq_length": 2, "max_tokens_per_micro_batch": 1, "logprob_chunk_size": 1, "batch_size": 1, "eval_steps": 0,
    "lora_r": 1, "warmup_steps": 0, "max_grad_norm": 0, "weight_decay": 0, "logging_steps": 1, "save_steps": 1,
    "save_total_limit": 2, "ddp_timeout": 60, "max_new_tokens": 1, "generation_batch_size": 1, "eval_samples": 0,
    "baseline_tokens": 1,
}  # fmt: skip
ONE_OF: dict[str, Sequence[Any]] = {
    "torch_dtype": ("float32", "bfloat16"),
    "save_strategy": ("steps", "epoch", "no"),
    "eval_strategy": ("no", "steps", "epoch"),
    "align_teacher_template": ("auto", True, False),
}
SHARES = ("lmbda", "beta", "baseline_success")
"""Numbers from 0 to 1."""
OVER_ZERO = ("learning_rate", "num_train_epochs", "kd_temperature", "temperature", "lora_alpha")
EVAL_METRICS = ("eval_loss", "eval_perplexity")
"""What every evaluation measures."""
GENERATION_METRICS = ("eval_success_rate", "eval_avg_tokens")
"""What an evaluation that samples measures too."""
_SMALL_IS_BETTER = ("loss", "perplexity", "avg_tokens")


def is_better_when_small(metric: str) -> bool:
    """Whether a figure of the evaluation improves by falling."""
    return metric.endswith(_SMALL_IS_BETTER)


def check(config: DatasetTrainingConfig) -> None:
    """What SFT and GKD have in common.

    Raises:
        ConfigError: the first problem.
    """
    check_ranges(config)
    check_rows(config)
    check_length(config)
    check_best(config)
    check_adapter(config)
    check_places(config)


def check_ranges(config: DatasetTrainingConfig) -> None:
    """Each number and each name by itself."""
    for name, least in AT_LEAST.items():
        value: Any = getattr(config, name, None)
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, is {value}")
    for name, allowed in ONE_OF.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, is {value!r}")
    for name in SHARES:
        value = getattr(config, name, None)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name} must be in [0, 1], is {value}")
    for name in OVER_ZERO:
        value = getattr(config, name, 1.0)
        if not value > 0:
            raise ConfigError(f"{name} must be over 0, is {value}")


def check_rows(config: DatasetTrainingConfig) -> None:
    """Which tokens are learnt."""
    if not config.completion_only_training and config.train_on_last_turn_only:
        raise ConfigError(
            "completion_only_training=false learns every token and train_on_last_turn_only=true one turn: give one of them"
        )
    if config.custom_start_of_response == "":
        raise ConfigError(
            "custom_start_of_response is empty; give the text before a reply, such as '<|im_start|>assistant', or leave it"
        )


def check_length(config: DatasetTrainingConfig) -> None:
    """How long a run is."""
    if config.max_steps == 0 or config.max_steps < -1:
        raise ConfigError(f"max_steps must be over 0, or -1 to go by num_train_epochs, is {config.max_steps}")


def saves_where_it_evaluates(config: DatasetTrainingConfig) -> bool:
    """Whether there is a checkpoint at each evaluation."""
    if not config.evaluates or str(config.save_strategy) != str(config.eval_strategy):
        return False
    return config.eval_strategy != "steps" or config.save_steps == config.eval_steps


def check_best(config: DatasetTrainingConfig) -> None:
    """The best checkpoint can be known, and is on disk."""
    metric = config.metric_for_best_model or ""
    if config.greater_is_better and is_better_when_small(metric):
        raise ConfigError(f"greater_is_better=true contradicts metric_for_best_model={metric}: leave greater_is_better")
    if not config.load_best_model_at_end:
        return
    if not config.evaluates:
        raise ConfigError(
            "load_best_model_at_end=true needs evaluations: give eval_steps=N with rows held out (eval_split_ratio), "
            "or load_best_model_at_end=false"
        )
    if str(config.save_strategy) != str(config.eval_strategy):
        raise ConfigError(
            f"load_best_model_at_end=true needs a checkpoint at each evaluation: save_strategy={config.save_strategy} and "
            f"eval_strategy={config.eval_strategy} differ; give both alike"
        )
    if config.eval_strategy == "steps" and config.save_steps != config.eval_steps:
        raise ConfigError(
            f"load_best_model_at_end=true needs a checkpoint at each evaluation: save_steps={config.save_steps} must be "
            f"eval_steps={config.eval_steps}; or give load_best_model_at_end=false"
        )
    known = [*EVAL_METRICS, *(GENERATION_METRICS if getattr(config, "eval_samples", 0) else ())]
    if (metric if metric.startswith("eval_") else f"eval_{metric}") not in known:
        raise ConfigError(f"metric_for_best_model={metric!r} is measured by nobody; give one of {', '.join(known)}")


def check_adapter(config: DatasetTrainingConfig) -> None:
    """Options of LoRA stand with use_peft."""
    defaults = {f.name: f.default for f in fields(type(config)) if f.name.startswith("lora_")}
    given = [name for name, default in defaults.items() if getattr(config, name) != default]
    if given and not config.use_peft:
        raise ConfigError(f"{given[0]} is an option of LoRA: give use_peft=true as well, or leave it")
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"lora_dropout must be in [0, 1), is {config.lora_dropout}")
    if config.lora_target_modules == []:
        raise ConfigError("lora_target_modules is empty; name layers, e.g. [q_proj, v_proj], or leave it for all")


def check_places(config: DatasetTrainingConfig) -> None:
    """Folders and the Hub."""
    check_folders(config)
    names = ("model_name_or_path", "tokenizer_name_or_path")
    check_sources(config, (*names, *(f"teacher_{name}" for name in names)))


def check_distillation(config: GKDConfig) -> None:
    """What GKD adds. Whether the tokenizers differ is known once they are loaded.

    Raises:
        ConfigError: the first problem.
    """
    if config.seq_kd and config.lmbda == 1:
        raise ConfigError(
            "seq_kd=true learns from the teacher's completions in the steps that do not sample from the student, and with "
            "lmbda=1 there are none: give lmbda below 1"
        )
    if config.jsd_rescale and config.beta in (0, 1):
        raise ConfigError(f"jsd_rescale=true divides by 4 beta (1 - beta), which is 0 at beta={config.beta}: leave it")
    if not config.disable_dropout:
        raise ConfigError(
            "disable_dropout=false is not taken: a student that samples without dropout would be trained with it; "
            "lora_dropout is there for LoRA"
        )
    if not config.completion_only_training:
        raise ConfigError("completion_only_training=false is for SFT: a teacher is asked about completions alone")
    for name in config.teacher_model_init_kwargs or {}:
        if is_secret(name):
            raise ConfigError(
                f"teacher_model_init_kwargs.{name} would be written into run_dir: leave it, and set HF_TOKEN or log in with: "
                "hf auth login"
            )
    if "device_map" in (config.teacher_model_init_kwargs or {}) and config.deepspeed:
        raise ConfigError("teacher_model_init_kwargs.device_map and deepspeed exclude each other: leave device_map")
    if (config.lmbda > 0 or config.eval_samples) and zero_stage(config.deepspeed) == 3:
        raise ConfigError(
            "deepspeed stage 3 splits the student's weights, and sampling from it in this process is slow beyond use: give "
            "lmbda=0 and eval_samples=0, stage 2, or distil on rollouts of an inference server (method=grpo distill_coef=1)"
        )


def doubts(config: DatasetTrainingConfig) -> list[str]:
    """What is possible and seldom meant."""
    rate = float(config.learning_rate or 0)
    budget = config.max_tokens_per_micro_batch
    found = {
        f"learning_rate={rate} is high for all weights; 1e-6 to 5e-5 is usual": not config.use_peft and rate > 5e-5,
        f"max_tokens_per_micro_batch={budget} is below max_seq_length={config.max_seq_length}: longer examples get a pass "
        "of their own": budget is not None and budget < config.max_seq_length,
        "packing=false takes one pass for each example; packing=true gives the same gradient": not config.packing,
        "trust_remote_code=true runs code that can change: give a folder, or pin a revision by downloading it": (
            config.trust_remote_code and not Path(config.model_name_or_path or "-").is_dir()
        ),
    }
    return [text for text, is_so in found.items() if is_so]
