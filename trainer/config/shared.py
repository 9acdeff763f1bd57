"""The options that every method has, and what follows from them: model, folders, batch, adapter, device, sinks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from atroposlib.errors import ConfigError
from trainer.batches.resolver import resolve_batch
from trainer.config import checks, deepspeed_presets
from trainer.config.values import read_file

DEFAULT_BATCH_SIZE = 64


@dataclass(kw_only=True)
class SharedOptions(TrainingArguments):  # type: ignore[misc]
    """What GRPO, SFT and GKD are told alike; a class of a method says when each of these is resolved."""

    model_name_or_path: str = ""
    """Folder or Hub id of the model to train."""
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that the optimizer updates. float32 with bf16: true is the usual mix."""
    attn_implementation: str = "auto"
    """sdpa (on a CPU segment by segment, without a mask of all tokens), eager, or flash_attention_2.
    auto: flash_attention_2 where it is installed and can run, else sdpa."""
    model_init_kwargs: dict[str, Any] | None = None
    """torch_dtype, attn_implementation, trust_remote_code and use_cache=false as trainers elsewhere take them."""
    trust_remote_code: bool = False
    """Run Python shipped with the checkpoint."""

    run_dir: str = "runs/training"
    """Metrics, checkpoints and the final model go here."""
    run_name: str | None = None
    """Label of the run for the sinks of report_to; the folder's name if absent."""
    output_dir: str | None = None
    """Checkpoints; RUN_DIR/checkpoints if absent."""

    batch_size: int = DEFAULT_BATCH_SIZE
    """Examples of one optimizer step, over all ranks. Also train_batch_size, and the product of per_device_train_batch_size,
    gradient_accumulation_steps and ranks; passes are cut by tokens all the same."""
    per_device_train_batch_size: int | None = None
    """Only says batch_size in another way; 1 once that is known."""
    gradient_accumulation_steps: int | None = None
    """Only says batch_size in another way; 1 once that is known."""
    logprob_chunk_size: int = 256
    """Tokens whose logits over the whole vocabulary are in memory at once."""

    use_peft: bool = False
    """Train a LoRA adapter instead of all weights. Checkpoints then hold the adapter."""
    lora_r: int = 16
    """use_peft: rank of the adapter."""
    lora_alpha: float = 32.0
    """use_peft: the adapter's product is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """use_peft: chance that an input of the adapter is left out."""
    lora_target_modules: list[str] | None = None
    """use_peft: last names of the layers that get one, e.g. [q_proj, v_proj]; every linear layer but the output if absent."""

    deepspeed: dict[str, Any] | str | None = None
    """zero1, zero2, zero3, zero3_offload, a file, or the configuration itself."""

    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    logging_steps: float = 1
    save_steps: float = 50
    save_total_limit: int | None = 3
    report_to: list[str] | str | None = field(default_factory=list)
    """wandb, tensorboard, ...; metrics.jsonl is written in any case. wandb goes offline when it has no key."""
    project: str = "atropos"
    activate_debugging_logs: bool = False
    """Log more of what the trainer does."""

    origins: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    """Where each option that was set comes from; dotted inside a group. No option itself."""

    def __new__(cls, *_: Any, **given: Any) -> Any:
        """Remember which options were given: one that is given with its default value contradicts another name of it."""
        config: Any = super().__new__(cls)
        config._given = frozenset(given)
        return config

    @property
    def checkpoints_dir(self) -> Path:
        """Where checkpoints go."""
        return Path(self.output_dir or Path(self.run_dir) / "checkpoints")

    def reports_to(self, sink: str) -> bool:
        """Whether a sink of transformers, e.g. wandb, gets the metrics too."""
        return sink in (self.report_to or [])

    def _if_given(self, name: str) -> Any:
        """The value of an option, or None where it is left at its default."""
        return getattr(self, name) if name in self._given else None

    def _resolve_model_init(self) -> None:
        """Options that model_init_kwargs sets as well."""
        for name, value in checks.from_model_init(self.model_init_kwargs or {}).items():
            here = self._if_given(name)
            # auto leaves the choice to whoever makes one.
            here = None if here == "auto" else here
            setattr(self, name, one_value(name, here, f"model_init_kwargs.{name}", value))

    def _resolve_sinks(self) -> None:
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        # metrics.jsonl is written in any case.
        self.report_to = [sink for sink in self.report_to or [] if sink not in ("jsonl", "none")]

    def _resolve_places(self) -> None:
        if self.run_name is None:
            self.run_name = Path(self.run_dir).resolve().name
        if self.output_dir is None:
            self.output_dir = str(self.checkpoints_dir)

    def _resolve_batch(self, *, group_size: int | None) -> None:
        sizes = resolve_batch(
            batch_size=self._if_given("batch_size"),
            per_device=self.per_device_train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            ranks=int(os.environ.get("WORLD_SIZE", "1")),
            group_size=group_size,
            default=DEFAULT_BATCH_SIZE,
        )
        self.batch_size = sizes.batch_size
        # One item of our loaders is one optimizer step; how it is cut into passes is packing's business.
        self.per_device_train_batch_size = 1
        self.gradient_accumulation_steps = 1

    def _leave_data_to_us(self) -> None:
        """What transformers would do with rows and gradients that it does not know."""
        self.remove_unused_columns = False
        self.ignore_data_skip = True
        self.ddp_find_unused_parameters = False

    def _choose_device(self) -> None:
        """Device, attention, and what DeepSpeed has to know of them. The deepspeed option is resolved."""
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        self.attn_implementation = checks.attention(self.attn_implementation, has_cuda=torch.cuda.is_available())
        deepspeed_presets.name_accelerator(has_accelerator=not self.use_cpu)
        if self.deepspeed:
            deepspeed_presets.name_ranks()
            if self.use_cpu:
                deepspeed_presets.use_gloo_alone()


def one_value(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The value that one or both of two names of an option have.

    Raises:
        ConfigError: both have one, and they differ.
    """
    if value is not None and other is not None and value != other:
        raise ConfigError(f"{name}={value} and {other_name}={other} are the same option: give one of them")
    return other if value is None else value


def deepspeed_config(value: str | dict[str, Any], max_grad_norm: float) -> dict[str, Any]:
    """A preset's name, a YAML or JSON file, or the dict itself.

    Raises:
        ConfigError: it is none of these, or contradicts max_grad_norm.
    """
    name = value.replace("-", "_") if isinstance(value, str) else ""
    if name in deepspeed_presets.PRESETS:
        config = deepspeed_presets.preset(name)
    elif isinstance(value, str):
        if not Path(value).is_file():
            raise ConfigError(
                f"deepspeed={value!r} is neither a preset ({', '.join(deepspeed_presets.PRESETS)}) nor a file"
            )
        config = read_file(Path(value))
    else:
        config = value
    if isinstance(config.get("deepspeed_config"), dict):
        # A file of accelerate.
        config = deepspeed_presets.from_accelerate(config["deepspeed_config"])
    deepspeed_presets.check_clipping(config, max_grad_norm)
    return config
