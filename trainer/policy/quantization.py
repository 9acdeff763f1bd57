"""QLoRA: an adapter over weights in 4 bits (Dettmers et al. 2023, arXiv:2305.14314). Loads nothing by itself."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from atroposlib.errors import ConfigError
from trainer.config.deepspeed_presets import zero_stage

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig


def check(config: GRPOConfig) -> None:
    """Weights in 4 bits are never trained and never sent: only the adapter over them is.

    Args:
        config: with `deepspeed` and `use_cpu` resolved.
    Raises:
        ConfigError: names what load_in_4bit needs.
    """
    if not config.load_in_4bit:
        return
    if not config.use_peft:
        raise ConfigError("load_in_4bit holds weights that cannot be trained themselves: give use_peft=true as well")
    if not config.sends_adapter:
        raise ConfigError(
            f"weight_sync.transport={config.weight_sync.transport} sends whole weights, and engines could not be given those "
            "that load_in_4bit rounds: give weight_sync.transport=lora, or leave load_in_4bit"
        )
    if zero_stage(config.deepspeed) == 3:
        raise ConfigError("deepspeed stage 3 cannot split weights in 4 bits: give zero2, or leave load_in_4bit")
    if config.use_cpu:
        # One pass without gradients, and bitsandbytes lays the weights out anew for inference: gradients then end there.
        raise ConfigError(
            "load_in_4bit trains on an accelerator alone: on a CPU no gradient passes such weights; leave it"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_4bit needs a package that is not installed: pip install bitsandbytes")


def check_in_memory(config: GRPOConfig, model: Any) -> None:
    """A model that comes in memory has its 4 bits already.

    Raises:
        ConfigError: load_in_4bit, and it has not.
    """
    if config.load_in_4bit and not getattr(model, "is_loaded_in_4bit", False):
        raise ConfigError(
            "load_in_4bit rounds weights as they are loaded, and this model is in memory: give its name instead, or load it "
            "with quantization_config=BitsAndBytesConfig(load_in_4bit=True)"
        )


def quantization_of(config: GRPOConfig) -> Any:
    """The quantization_config for from_pretrained; None for whole weights."""
    if not config.load_in_4bit:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.bf16 else getattr(torch, config.torch_dtype),
    )
