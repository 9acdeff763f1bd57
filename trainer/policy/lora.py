"""The LoRA adapter: put it into a model, describe it, write it as a peft folder, read it back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atroposlib.errors import ConfigError
from trainer.weight_sync.sources import ADAPTER

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraOptions:
    """What the adapter is like. See GRPOConfig.lora_*."""

    r: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...] | None
    """None: every linear layer but the output layer."""


def options_of(config: GRPOConfig) -> LoraOptions | None:
    """What a configuration asks for; None when all weights are trained."""
    if not config.use_peft:
        return None
    targets = None if config.lora_target_modules is None else tuple(config.lora_target_modules)
    return LoraOptions(config.lora_r, config.lora_alpha, config.lora_dropout, targets)


def add_adapter(lm: Any, options: LoraOptions) -> None:
    """Put a fresh adapter into a Hugging Face model. Only the adapter is trained from then on.

    The adapter is in float32 whatever the model is: an update is often smaller than a step of bfloat16.

    Raises:
        ConfigError: the model has no such layers.
    """
    from peft import LoraConfig, TaskType

    targets = list(options.target_modules) if options.target_modules else _linear_layers(lm)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
    )
    missing = sorted(set(targets) - {name.rpartition(".")[2] for name, _ in lm.named_modules()})
    if missing:
        raise ConfigError(
            f"lora_target_modules: {', '.join(missing)} occurs nowhere in this model; "
            f"its linear layers are {', '.join(_linear_layers(lm))}"
        )
    lm.add_adapter(config, adapter_name=ADAPTER)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapter_config(lm: Any) -> dict[str, Any]:
    """The contents of adapter_config.json."""
    values = lm.peft_config[ADAPTER].to_dict()
    plain: dict[str, Any] = json.loads(json.dumps(values, default=_plain))
    return {**plain, "inference_mode": True}


def save_adapter(lm: Any, folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write a peft folder; `weights` under peft's names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in weights}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(adapter_config(lm), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter(lm: Any, folder: Path) -> None:
    """Take over the weights of a folder that `save_adapter` wrote.

    Raises:
        ConfigError: the folder holds an adapter of another shape.
    """
    from peft import set_peft_model_state_dict

    try:
        found = set_peft_model_state_dict(lm, load_file(folder / WEIGHTS_FILE), ADAPTER)
    except RuntimeError as error:
        raise ConfigError(f"{folder} holds another adapter than lora_r and lora_target_modules ask for") from error
    lost = [name for name in found.missing_keys if "lora_" in name]
    if lost or found.unexpected_keys:
        name = (lost or list(found.unexpected_keys))[0]
        raise ConfigError(f"{folder} holds another adapter than lora_target_modules asks for: see {name}")


def _linear_layers(lm: Any) -> list[str]:
    """The last names of the linear layers, without the output layer."""
    output = lm.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    return sorted(found)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", str(value))
