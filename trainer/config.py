"""Every option of the trainer, parsed once and checked whole at start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from transformers import TrainingArguments

from atroposlib.errors import ConfigError
from atroposlib.wire.models import LatePolicy
from trainer import config_values, deepspeed_presets
from trainer.advantages import ADVANTAGE_SCALES, AdvantageScale
from trainer.losses.aggregation import LOSS_AGGREGATIONS, LossAggregation
from trainer.losses.corrections import CORRECTIONS, Correction
from trainer.losses.objectives import LOSS_TYPES, LossType
from trainer.publication import longest_s
from trainer.step_batch import OVERLONG, Overlong
from trainer.weight_sync.config import WeightSyncConfig

_ONE_BATCH = "batch_size is sequences a step over all ranks; max_tokens_per_micro_batch bounds memory"
_NO_DATASET = "batches come from the rollout server, not from a dataset"
_NO_EVAL = "environments evaluate, not this trainer"
_NO_LOGITS = "the loss is computed from logprobs of the sampled tokens"
_NOT_OURS = "set it through DeepSpeed, or leave it"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"), _ONE_BATCH),
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
        ("label_smoothing_factor", "average_tokens_across_devices", "use_liger_kernel", "liger_kernel_config"),
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
    "disable_tqdm": "one line of log a step is all there is",
    "restore_callback_states_from_checkpoint": "there are no such callbacks",
}  # fmt: skip
"""Keys of transformers that would have no effect here, each with what to do instead."""


@dataclass(kw_only=True)
class GRPOConfig(TrainingArguments):  # type: ignore[misc]
    """Options of the GRPO trainer; those it inherits are those of transformers.TrainingArguments, less REFUSED."""

    model_name_or_path: str = ""
    """Folder or Hub id of the policy to train."""
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that the optimizer updates. float32 with bf16: true is the usual mix."""
    attn_implementation: str = "sdpa"
    """sdpa, eager, or flash_attention_2 where it is installed."""
    trust_remote_code: bool = False
    """Run Python shipped with the checkpoint."""

    run_dir: str = "runs/atropos"
    """Metrics, ledger, checkpoints and the final model go here."""
    run_name: str | None = None
    """Who this run is to the rollout server: the same name goes on, another starts clean. The folder's name if absent."""
    output_dir: str | None = None
    """Checkpoints; <run_dir>/checkpoints if absent."""

    rollout_server_url: str = "http://127.0.0.1:8000"
    """Base URL."""
    rollout_server_token: str | None = None
    """Bearer token of the role trainer; what ATROPOS_TOKEN holds if absent."""
    inference_servers: list[str] = field(default_factory=list)
    """Base URLs, without /v1, of the servers that get new weights. None: the version follows the step at once."""
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    """How new weights get into them."""

    batch_size: int = 64
    """Sequences (not groups) of one optimizer step, over all ranks."""
    group_size: int | None = None
    """When given, environments must send groups of this size."""
    max_token_len: int = -1
    """Tokens of the longest sequence that environments may send; -1 for no limit."""
    max_staleness: int = 4
    """Policy versions between sampling a token and training on it, at most."""
    late_policy: LatePolicy = "wait"
    """A group in flight that a batch cannot leave room for: wait for it; requeue its item; drop it. Only wait leaves the
    distribution of lengths as it was generated."""
    batch_deadline_s: float = 600.0
    """How long to wait for a batch before stopping with what the server waits for."""
    prefetch: int = 1
    """Batches leased ahead of the one in training."""

    temperature: float = 1.0
    """Sampling temperature of groups that do not say theirs."""
    advantage_scale: AdvantageScale = "none"
    """none: r - mean of the group. group_std, batch_std: divided by that. loo: r - mean of the others."""
    loss_type: LossType = "ppo_clip"
    """ppo_clip: clipped ratio to the policy at the step's start. reinforce: no clip."""
    epsilon_low: float = 0.2
    """ppo_clip: how far the ratio may fall below 1."""
    epsilon_high: float = 0.28
    """ppo_clip: how far it may rise above 1."""
    dual_clip_c: float | None = None
    """ppo_clip: bound on the loss of an unlikely token with a negative advantage, e.g. 3."""
    loss_aggregation: LossAggregation = "token_mean"
    """What is averaged, over the whole batch: tokens; sequences; tokens of each prompt's group; or a constant divisor."""
    max_completion_length: int | None = None
    """Tokens that loss_aggregation=constant divides by; needed there, and only there."""
    correction: Correction = "tis"
    """tis: weigh tokens by trainer's over engine's probability, up to is_cap."""
    is_cap: float = 2.0
    overlong: Overlong = "mask"
    """mask: sequences cut by a length limit get no loss. keep: train them like the others."""

    max_tokens_per_micro_batch: int = 4096
    """Tokens of one forward and backward pass; a longer sequence gets a pass of its own."""
    logprob_chunk_size: int = 256
    """Tokens whose logits over the whole vocabulary are in memory at once."""

    use_peft: bool = False
    """Train a LoRA adapter instead of all weights. Checkpoints then hold the adapter. Engines get the adapter
    (weight_sync.transport auto or lora) or the weights with the adapter merged in (any other)."""
    lora_r: int = 16
    """use_peft: rank of the adapter; the engine's --max-lora-rank must not be below."""
    lora_alpha: float = 32.0
    """use_peft: the adapter's product is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """use_peft: above 0, the policy that is trained is not quite the one that was sampled."""
    lora_target_modules: list[str] | None = None
    """use_peft: last names of the layers that get one, e.g. [q_proj, v_proj]; every linear layer but the output if absent."""

    deepspeed: dict[str, Any] | str | None = None
    """zero1, zero2, zero3, zero3_offload, a file, or the configuration itself."""

    max_steps: int = 200
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    logging_steps: float = 1
    save_steps: float = 50
    save_total_limit: int | None = 3
    report_to: list[str] | str | None = field(default_factory=list)
    """wandb, tensorboard, ...; metrics.jsonl is written in any case. wandb goes offline when it has no key."""
    project: str = "atropos"

    def __post_init__(self) -> None:
        self._check()
        if self.run_name is None:
            self.run_name = Path(self.run_dir).resolve().name
        if self.output_dir is None:
            self.output_dir = str(self.checkpoints_dir)
        if self.report_to is None:
            self.report_to = []
        self.disable_tqdm = True
        self.remove_unused_columns = False
        self.ignore_data_skip = True
        self.ddp_find_unused_parameters = False
        # One item of our stream is one optimizer step; how it is cut into passes is packing's business.
        self.per_device_train_batch_size = 1
        self.gradient_accumulation_steps = 1
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        deepspeed_presets.name_accelerator(has_accelerator=not self.use_cpu)
        if self.deepspeed:
            self.deepspeed = _deepspeed_config(self.deepspeed)
            deepspeed_presets.name_ranks()
            if self.use_cpu:
                deepspeed_presets.use_gloo_alone()
        super().__post_init__()
        self._check_deadlines()

    @property
    def sends_adapter(self) -> bool:
        """Whether engines get the adapter alone, not whole weights."""
        return self.use_peft and self.weight_sync.transport in ("auto", "lora")

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the sinks of report_to."""
        return {**super().to_dict(), "weight_sync": asdict(self.weight_sync)}

    @property
    def checkpoints_dir(self) -> Path:
        """Where checkpoints go."""
        return Path(self.output_dir or Path(self.run_dir) / "checkpoints")

    def reports_to(self, sink: str) -> bool:
        """Whether a sink of transformers, e.g. wandb, gets the metrics too."""
        return sink in (self.report_to or [])

    def _check(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, is {value}")
        for name, allowed in _ONE_OF.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, is {getattr(self, name)!r}")
        for name in ("temperature", "learning_rate", "batch_deadline_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be over 0, is {getattr(self, name)}")
        if self.group_size is not None and self.batch_size % self.group_size:
            raise ConfigError(
                f"batch_size={self.batch_size} is no multiple of group_size={self.group_size}; a group is never split"
            )
        if (self.loss_aggregation == "constant") != (self.max_completion_length is not None):
            raise ConfigError("loss_aggregation=constant and max_completion_length go together: give both or neither")
        self._check_adapter()
        for url in self.inference_servers:
            if not url.startswith(("http://", "https://")) or url.rstrip("/").endswith("/v1"):
                raise ConfigError(
                    f"inference_servers: {url!r} should be a base URL such as http://127.0.0.1:8001, without /v1"
                )
        if not self.model_name_or_path:
            raise ConfigError(
                "model_name_or_path is missing; give the policy's folder, e.g. model_name_or_path=models/NAME"
            )
        if _looks_like_path(self.model_name_or_path) and not Path(self.model_name_or_path).expanduser().is_dir():
            raise ConfigError(
                f"model_name_or_path={self.model_name_or_path!r} does not exist (looked in {Path.cwd()})\n"
                "hint: give a folder with config.json and model.safetensors, or the id of a model on the Hub"
            )

    def _check_adapter(self) -> None:
        defaults = {f.name: f.default for f in fields(GRPOConfig) if f.name.startswith("lora_")}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.weight_sync.transport == "lora" and not self.use_peft:
            raise ConfigError("weight_sync.transport=lora sends an adapter: give use_peft=true, or another transport")
        if self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_alpha must be over 0 and lora_dropout in [0, 1), are {self.lora_alpha} and {self.lora_dropout}"
            )
        if self.lora_target_modules == []:
            raise ConfigError("lora_target_modules is empty; name layers, e.g. [q_proj, v_proj], or leave it for all")
        if given and not self.use_peft:
            raise ConfigError(f"{given[0]} is an option of LoRA: give use_peft=true as well, or leave it")

    def _check_deadlines(self) -> None:
        """The other ranks wait in a collective while rank 0 waits for a batch or publishes."""
        needed_s = self.batch_deadline_s + longest_s(self.weight_sync.timeout_s)
        if self.world_size > 1 and self.ddp_timeout <= needed_s:
            raise ConfigError(
                f"ddp_timeout={self.ddp_timeout} is too short: the other ranks may wait for rank 0 for {needed_s:.0f} s, "
                f"which follows from batch_deadline_s and weight_sync.timeout_s; give ddp_timeout={needed_s + 60:.0f}"
            )


_AT_LEAST = {
    "batch_size": 1, "group_size": 1, "max_token_len": -1, "max_staleness": 0, "prefetch": 0, "epsilon_low": 0,
    "epsilon_high": 0, "dual_clip_c": 1, "max_completion_length": 1, "is_cap": 1, "max_tokens_per_micro_batch": 1,
    "logprob_chunk_size": 1, "max_steps": 1, "logging_steps": 1, "save_steps": 1, "save_total_limit": 2,
    "warmup_steps": 0, "max_grad_norm": 0, "lora_r": 1,
}  # fmt: skip
_ONE_OF: dict[str, Sequence[str]] = {
    "advantage_scale": ADVANTAGE_SCALES,
    "loss_type": LOSS_TYPES,
    "loss_aggregation": LOSS_AGGREGATIONS,
    "correction": CORRECTIONS,
    "overlong": OVERLONG,
    "late_policy": get_args(LatePolicy),
    "torch_dtype": ("float32", "bfloat16"),
    "save_strategy": ("steps", "no"),
}


GROUPS = {"weight_sync": [f.name for f in fields(WeightSyncConfig)]}
"""Keys that hold further keys."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> GRPOConfig:
    """Parse and check a configuration.

    Args:
        path: YAML file, or None for the defaults.
        overrides: key=value, which win over the file. Values are YAML; 1e-6 is a number.
    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, impossible value, missing model folder.
    """
    config, _ = load_config_with_origins(path, overrides)
    return config


def load_config_with_origins(
    path: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[GRPOConfig, dict[str, str]]:
    """As load_config; also says for each key that was set, dotted inside a group, where it comes from."""
    hints = get_type_hints(GRPOConfig)
    known = [f.name for f in fields(GRPOConfig) if f.init]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    plain: dict[str, Any] = {}
    sources = [] if path is None else [(str(path), config_values.read_file(Path(path)))]
    sources.append(("the command line", config_values.read_overrides(overrides)))
    for source, given in sources:
        config_values.check_keys(given, known=known, refused=REFUSED, groups=GROUPS, source=source)
        for key, value in config_values.merged(plain, given).items():
            if key in given:
                values[key] = config_values.coerce(key, value, hints[key], source=source)
        origins |= dict.fromkeys(config_values.leaves(given, GROUPS), source)
        plain = config_values.merged(plain, given)
    try:
        return GRPOConfig(**values), origins
    except (ValueError, TypeError) as error:
        raise ConfigError(f"impossible configuration: {error}") from error


def settable_keys() -> list[str]:
    """Every key that a file or an override may set."""
    return [f.name for f in fields(GRPOConfig) if f.init and f.name not in REFUSED]


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name.split("/")[0]).is_dir()


def _deepspeed_config(value: str | dict[str, Any]) -> dict[str, Any]:
    """A preset's name, a YAML or JSON file, or the dict itself."""
    if isinstance(value, str) and value in deepspeed_presets.PRESETS:
        config = deepspeed_presets.preset(value)
    elif isinstance(value, str):
        if not Path(value).is_file():
            raise ConfigError(
                f"deepspeed={value!r} is neither a preset ({', '.join(deepspeed_presets.PRESETS)}) nor a file"
            )
        config = config_values.read_file(Path(value))
    else:
        config = value
    return config
