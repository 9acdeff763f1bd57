"""What makes a configuration impossible, or unwise. Each function looks at one part; all raise ConfigError with the fix."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from atroposlib.errors import ConfigError
from atroposlib.wire.models import LatePolicy
from trainer.batches.advantages import ADVANTAGE_SCALES
from trainer.batches.resolver import check_groups
from trainer.batches.step_batch import OVERLONG
from trainer.losses.aggregation import LOSS_AGGREGATIONS
from trainer.losses.corrections import CORRECTIONS
from trainer.losses.divergence import KL_ESTIMATORS, KL_PLACEMENTS
from trainer.losses.objectives import LOSS_TYPES
from trainer.run.publication import longest_s

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig
    from trainer.config.shared import SharedOptions

log = logging.getLogger(__name__)

AT_LEAST = {
    "batch_size": 1, "group_size": 1, "max_token_len": -1, "max_staleness": 0, "prefetch": 0, "epsilon_low": 0,
    "epsilon_high": 0, "dual_clip_c": 1, "max_completion_length": 1, "is_cap": 1, "max_tokens_per_micro_batch": 1,
    "logprob_chunk_size": 1, "max_steps": 1, "logging_steps": 1, "save_steps": 1, "save_total_limit": 2,
    "warmup_steps": 0, "max_grad_norm": 0, "weight_decay": 0, "lora_r": 1, "overlong_cache": 1, "cispo_cap": 1,
    "dppo_low": 0, "dppo_high": 0, "mis_low": 0, "entropy_coef": 0, "num_minibatches": 1, "ppo_epochs": 1, "beta": 0,
    "ref_model_sync_steps": 1, "distill_coef": 0, "ddp_timeout": 60,
}  # fmt: skip
ONE_OF: dict[str, Sequence[str]] = {
    "advantage_scale": ADVANTAGE_SCALES,
    "loss_type": (*LOSS_TYPES, "dr_grpo"),
    "loss_aggregation": LOSS_AGGREGATIONS,
    "correction": CORRECTIONS,
    "overlong": OVERLONG,
    "kl_estimator": KL_ESTIMATORS,
    "kl_placement": KL_PLACEMENTS,
    "gkd_mode": ("jsd", "policy_gradient"),
    "late_policy": get_args(LatePolicy),
    "torch_dtype": ("float32", "bfloat16"),
    "save_strategy": ("steps", "no"),
}
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
_IN_MODEL_INIT = ("torch_dtype", "dtype", "attn_implementation", "trust_remote_code", "use_cache")


def check(config: GRPOConfig) -> None:
    """Everything that the options say about each other.

    Raises:
        ConfigError: the first problem.
    """
    check_ranges(config)
    check_groups(config.batch_size, config.group_size)
    check_loss(config)
    check_reference(config)
    check_adapter(config)
    check_places(config)


def check_ranges(config: GRPOConfig) -> None:
    """Each number and each name by itself."""
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, is {value}")
    for name, allowed in ONE_OF.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, is {getattr(config, name)!r}")
    for name in ("temperature", "learning_rate", "batch_deadline_s"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name} must be over 0, is {getattr(config, name)}")
    for name in ("distill_beta", "save_completions_probability"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name} must be in [0, 1], is {value}")


def check_loss(config: GRPOConfig) -> None:
    """The terms of the loss, and where long completions end."""
    if config.loss_aggregation == "constant" and config.max_completion_length is None:
        raise ConfigError("loss_aggregation=constant divides by max_completion_length: give that too")
    if config.mis_low > 1 or config.mis_high < 1:
        raise ConfigError(f"mis_low <= 1 <= mis_high is needed, are {config.mis_low} and {config.mis_high}")
    if (config.overlong == "soft") != (config.overlong_cache is not None):
        raise ConfigError("overlong=soft and overlong_cache go together: give both or neither")
    if config.overlong_cache is not None and config.overlong_cache >= (config.max_completion_length or 0):
        raise ConfigError(
            f"overlong_cache={config.overlong_cache} must be below max_completion_length, "
            f"which is {config.max_completion_length}"
        )


def check_reference(config: GRPOConfig) -> None:
    """The reference policy and whether it moves."""
    if not 0 < config.ref_model_mixup_alpha <= 1:
        raise ConfigError(f"ref_model_mixup_alpha must be in (0, 1], is {config.ref_model_mixup_alpha}; 1 is a copy")
    if config.sync_ref_model and config.beta == 0:
        raise ConfigError("sync_ref_model moves a reference that beta=0 never loads: give beta over 0, or leave it")
    if config.sync_ref_model and config.use_peft:
        raise ConfigError(
            "sync_ref_model and use_peft exclude each other: with an adapter the reference is the model without it"
        )


def check_adapter(config: GRPOConfig) -> None:
    """Options of LoRA stand with use_peft."""
    defaults = {f.name: f.default for f in fields(type(config)) if f.name.startswith("lora_")}
    given = [name for name, default in defaults.items() if getattr(config, name) != default]
    if config.weight_sync.transport == "lora" and not config.use_peft:
        raise ConfigError("weight_sync.transport=lora sends an adapter: give use_peft=true, or another transport")
    if config.lora_alpha <= 0 or not 0 <= config.lora_dropout < 1:
        raise ConfigError(
            f"lora_alpha must be over 0 and lora_dropout in [0, 1), are {config.lora_alpha} and {config.lora_dropout}"
        )
    if config.lora_target_modules == []:
        raise ConfigError("lora_target_modules is empty; name layers, e.g. [q_proj, v_proj], or leave it for all")
    if given and not config.use_peft:
        raise ConfigError(f"{given[0]} is an option of LoRA: give use_peft=true as well, or leave it")


def check_places(config: GRPOConfig) -> None:
    """URLs, folders and the Hub."""
    for url in config.inference_servers:
        if not url.startswith(("http://", "https://")) or url.rstrip("/").endswith("/v1"):
            raise ConfigError(
                f"inference_servers: {url!r} should be a base URL such as http://127.0.0.1:8001, without /v1"
            )
    check_folders(config)
    check_sources(config, ("model_name_or_path", "ref_model_name_or_path", "tokenizer_name_or_path"))


def check_folders(config: SharedOptions) -> None:
    """Where the run writes to is a folder, or will be.

    Raises:
        ConfigError: it is a file.
    """
    for name in ("run_dir", "output_dir"):
        if Path(getattr(config, name) or ".").is_file():
            raise ConfigError(f"{name}={getattr(config, name)!r} is a file: give a folder, which may be a new one")


def check_sources(config: Any, names: Sequence[str]) -> None:
    """Models and tokenizers that look like folders exist; the Hub knows where to.

    Args:
        config: of any method.
        names: of the options; those that it does not have are passed over.
    Raises:
        ConfigError: the first problem.
    """
    for name in names:
        folder = getattr(config, name, None)
        if folder and _looks_like_path(folder) and not Path(folder).expanduser().is_dir():
            raise ConfigError(
                f"{name}={folder!r} does not exist (looked in {Path.cwd()})\n"
                "hint: give a folder with config.json and model.safetensors, or the id of a model on the Hub; "
                "make model prepares models/SmolLM2-135M-Instruct"
            )
    if config.push_to_hub and not config.hub_model_id:
        raise ConfigError("push_to_hub needs hub_model_id=OWNER/NAME, and a token in HF_TOKEN")


def check_deadlines(config: GRPOConfig) -> None:
    """The other ranks wait in a collective while rank 0 waits for a batch or publishes."""
    needed_s = config.batch_deadline_s + longest_s(config.weight_sync.timeout_s)
    if config.world_size > 1 and config.ddp_timeout <= needed_s:
        raise ConfigError(
            f"ddp_timeout={config.ddp_timeout} is too short: the other ranks may wait for rank 0 for {needed_s:.0f} s, "
            f"which follows from batch_deadline_s and weight_sync.timeout_s; give ddp_timeout={needed_s + 60:.0f}"
        )


def attention(name: str, *, has_cuda: bool) -> str:
    """The attention to use: auto is flash_attention_2 where it can run, else sdpa.

    Raises:
        ConfigError: no such attention, or flash_attention_2 is asked for and not installed.
    """
    # A kernel of the Hub is named OWNER/NAME.
    if name not in ATTENTIONS and "/" not in name:
        raise ConfigError(f"attn_implementation must be one of {', '.join(ATTENTIONS)}, is {name!r}")
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if name == "auto":
        return "flash_attention_2" if has_flash and has_cuda else "sdpa"
    if name == "flash_attention_2" and not has_flash:
        raise ConfigError(
            "attn_implementation=flash_attention_2 is not installed: pip install flash-attn, or give "
            "attn_implementation=auto"
        )
    return name


def from_model_init(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Our options from keyword arguments of from_pretrained.

    Raises:
        ConfigError: an argument that the trainer decides itself.
    """
    for name in kwargs:
        if name not in _IN_MODEL_INIT:
            raise ConfigError(
                f"model_init_kwargs.{name} is not taken: the trainer loads the model itself; it takes "
                f"{', '.join(_IN_MODEL_INIT)}, or give a model in memory to GRPOTrainer"
            )
    if kwargs.get("use_cache"):
        raise ConfigError("model_init_kwargs.use_cache=true is for generation, which happens in the inference servers")
    renamed = {"torch_dtype" if name == "dtype" else name: value for name, value in kwargs.items()}
    renamed.pop("use_cache", None)
    return {
        name: str(value).removeprefix("torch.") if name == "torch_dtype" else value for name, value in renamed.items()
    }


def doubts(config: GRPOConfig) -> list[str]:
    """What is possible and seldom meant."""
    is_void = config.sync_ref_model and config.ref_model_mixup_alpha >= 0.9 and config.ref_model_sync_steps <= 4
    found = {
        "trust_remote_code=true runs code that can change: give a folder, or pin a revision by downloading it": (
            config.trust_remote_code and not Path(config.model_name_or_path or "-").is_dir()
        ),
        f"learning_rate={config.learning_rate} is high for all weights; 1e-6 to 1e-5 is usual for billions of them, and up to "
        "5e-5 for fewer": not config.use_peft and config.learning_rate > 5e-5,
        "kl_estimator=k1 has no expected gradient in the loss: give kl_placement=reward, or kl_estimator=k2": (
            config.kl_estimator == "k1" and config.kl_placement == "loss" and config.beta > 0
        ),
        f"loss_type=gspo takes the mean of log-ratios over a sequence, which moves little: epsilon_low={config.epsilon_low} and "
        f"epsilon_high={config.epsilon_high} clip nothing; 3e-4 and 4e-4 are usual, see recipe=gspo": (
            config.loss_type == "gspo" and max(config.epsilon_low, config.epsilon_high) > 0.01
        ),
        "the reference follows the policy so closely that beta has almost no effect": is_void,
        "unbias_log_probabilities=false with temperature other than 1: these are not the logprobs that were sampled": (
            not config.unbias_log_probabilities and config.temperature != 1.0
        ),
    }
    return [text for text, is_so in found.items() if is_so]


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "models/")) or name.count("/") > 1 or Path(name.split("/")[0]).is_dir()
