"""DeepSpeed configurations by name, and what DeepSpeed needs of its surroundings."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from atroposlib.errors import ConfigError

PRESETS = ("zero1", "zero2", "zero3", "zero3_offload")

# Filled in by transformers from the training arguments, so that each value has one source.
_FILLED_IN: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
# transformers derives these from the model's hidden size.
_SIZED_BY_MODEL = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
_COMMON: dict[str, Any] = {
    "zero_allow_untested_optimizer": True,
    # DeepSpeed's own CPU optimizer is faster, and is compiled first: that needs a compiler on every host.
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 2**31 - 1,
    "wall_clock_breakdown": False,
}
_ON_HOST = {"device": "cpu", "pin_memory": False}


def preset(name: str) -> dict[str, Any]:
    """The configuration of a preset.

    Args:
        name: zero1: optimizer state split over ranks. zero2: gradients as well. zero3: weights as well. zero3_offload: and
            weights and optimizer state lie in host memory.
    Raises:
        KeyError: no such preset.
    """
    if name not in PRESETS:
        raise KeyError(name)
    return {**_FILLED_IN, **_COMMON, "zero_optimization": _zero_optimization(name)}


def _zero_optimization(name: str) -> dict[str, Any]:
    stage = int(name.removeprefix("zero").removesuffix("_offload"))
    values: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if stage == 3:
        values |= _SIZED_BY_MODEL
    if name.endswith("_offload"):
        values |= {"offload_param": _ON_HOST, "offload_optimizer": _ON_HOST}
    return values


ACCELERATE_KEYS = {
    "zero_stage": "0, 1, 2 or 3; 1 if absent",
    "gradient_accumulation_steps": "1 only: passes follow from max_tokens_per_micro_batch",
    "gradient_clipping": "no other than max_grad_norm",
    "offload_optimizer_device": "none or cpu: where the optimizer's state lies",
    "offload_param_device": "none or cpu: where weights lie; cpu needs zero_stage=3",
    "zero3_init_flag": "needs zero_stage=3, which always loads split weights",
    "zero3_save_16bit_model": "needs zero_stage=3, which always saves whole weights",
    "deepspeed_multinode_launcher": "not read: torchrun starts the ranks",
}
"""Of the block deepspeed_config of a file of accelerate, with what they mean here."""


def from_accelerate(block: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that accelerate would make of the block deepspeed_config of its file.

    Loading and saving split weights is ours, so zero3_init_flag and zero3_save_16bit_model change nothing.

    Raises:
        ConfigError: a key that is none, or an impossible value.
    """
    for key in block:
        if key not in ACCELERATE_KEYS:
            raise ConfigError(
                f"deepspeed_config.{key} is no key of accelerate's file; it has: {', '.join(ACCELERATE_KEYS)}"
            )
    stage = block.get("zero_stage", 1)
    devices = {kind: block.get(f"offload_{kind}_device", "none") for kind in ("optimizer", "param")}
    _check_accelerate(block, stage, devices)
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, **(_SIZED_BY_MODEL if stage == 3 else {})}
    zero |= {f"offload_{kind}": _ON_HOST for kind, device in devices.items() if device == "cpu"}
    clipping = block.get("gradient_clipping", "auto")
    return {**_FILLED_IN, **_COMMON, "gradient_clipping": clipping, "zero_optimization": zero}


def _check_accelerate(block: Mapping[str, Any], stage: Any, devices: Mapping[str, Any]) -> None:
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed_config.zero_stage must be 0, 1, 2 or 3, is {stage!r}")
    for kind, device in devices.items():
        if device not in ("none", "cpu"):
            raise ConfigError(f"deepspeed_config.offload_{kind}_device must be none or cpu, is {device!r}")
    only_stage_3 = [key for key in ("zero3_init_flag", "zero3_save_16bit_model") if block.get(key)]
    if devices["param"] == "cpu":
        only_stage_3.append("offload_param_device")
    if only_stage_3 and stage != 3:
        raise ConfigError(f"deepspeed_config.{only_stage_3[0]} needs zero_stage=3, which is {stage}")
    if block.get("gradient_accumulation_steps", 1) not in (1, "auto"):
        raise ConfigError(
            f"deepspeed_config.gradient_accumulation_steps={block['gradient_accumulation_steps']}: the passes of a step follow "
            "from max_tokens_per_micro_batch; remove it there, and give batch_size"
        )


def check_clipping(config: Mapping[str, Any], max_grad_norm: float) -> None:
    """Refuse two different bounds of the gradient's norm.

    Raises:
        ConfigError: names both.
    """
    clipping = config.get("gradient_clipping", "auto")
    if clipping not in ("auto", max_grad_norm):
        raise ConfigError(
            f"gradient_clipping={clipping} of deepspeed contradicts max_grad_norm={max_grad_norm}: remove it there"
        )


def zero_stage(config: Any) -> int:
    """The ZeRO stage of a resolved configuration; 0 where there is none."""
    return int((config.get("zero_optimization") or {}).get("stage", 0)) if isinstance(config, dict) else 0


def name_accelerator(*, has_accelerator: bool) -> None:
    """Tell DeepSpeed that there is only a CPU. transformers imports it wherever it is installed, and it asks then."""
    if not has_accelerator:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def name_ranks() -> None:
    """Set what DeepSpeed needs to meet the other ranks: a launcher has set it, a lone process is rank 0 of 1."""
    if "LOCAL_RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in alone.items()})
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


def meet_ranks(*, on_cpu: bool, timeout_s: float) -> None:
    """Make DeepSpeed know the other ranks. ZeRO-3 splits weights as they are loaded, before there is an engine to do it."""
    import deepspeed

    # torch 2.13 deprecates what DeepSpeed 0.19 calls; a line for each collective would drown the log.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor`", FutureWarning)
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else None, auto_mpi_discovery=False, timeout=timedelta(seconds=timeout_s)
    )


def use_gloo_alone() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives on a CPU: they need a compiler and most of a minute."""
    import deepspeed.ops

    # DeepSpeed keeps this dict and means edits to it to persist.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
