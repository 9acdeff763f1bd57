"""DeepSpeed configurations by name, and what DeepSpeed needs of its surroundings."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta
from typing import Any

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
    return {
        **_FILLED_IN,
        "zero_optimization": _zero_optimization(name),
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own CPU optimizer is faster, and is compiled first: that needs a compiler on every host.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _zero_optimization(name: str) -> dict[str, Any]:
    stage = int(name.removeprefix("zero").removesuffix("_offload"))
    values: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if stage == 3:
        values |= _SIZED_BY_MODEL
    if name.endswith("_offload"):
        values |= {"offload_param": _ON_HOST, "offload_optimizer": _ON_HOST}
    return values


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a configuration."""
    return int((config.get("zero_optimization") or {}).get("stage", 0))


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
