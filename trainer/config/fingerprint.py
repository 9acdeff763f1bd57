"""The options of a configuration that change what is learnt. No torch.

A checkpoint keeps them, so that a run that goes on with others can say which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from pydantic import BaseModel

INHERITED = frozenset(
    {
        "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type",
        "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules", "max_steps", "num_train_epochs",
        "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "bf16", "label_smoothing_factor",
        "neftune_noise_alpha",
    }
)  # fmt: skip
"""Of transformers' options, those that change what is learnt. Of our own, all do but these:"""

NOT_LEARNT = frozenset(
    {
        "run_dir", "rollout_server_url", "rollout_server_token", "inference_servers", "weight_sync", "batch_deadline_s",
        "prefetch", "offload_untrained_models", "pack", "packing", "max_tokens_per_micro_batch", "logprob_chunk_size",
        "generation_batch_size", "attn_implementation", "model_init_kwargs", "trust_remote_code", "log_completions",
        "save_completions_probability", "activate_debugging_logs", "eval_samples", "baseline_success", "baseline_tokens",
        "origins",
    }
)  # fmt: skip
"""Places, addresses, logging, evaluation, and how the same sums are cut into passes."""


def is_secret(name: str) -> bool:
    """Whether an option holds what no file, log or sink may show, by the end of its name."""
    return name == "token" or name.endswith(("_token", "db_url"))


def learning_options(config: Any) -> dict[str, Any]:
    """The options that change what is learnt, as JSON values.

    Args:
        config: a configuration of any method, resolved.
    """
    from transformers import TrainingArguments

    inherited = {field.name for field in fields(TrainingArguments)}
    names = [
        field.name
        for field in fields(config)
        if field.name in INHERITED or (field.name not in inherited and field.name not in NOT_LEARNT)
    ]
    found = {name: _plain(getattr(config, name)) for name in names}
    # A constant rate is the same however long the run is: going on for longer is no other training.
    if str(found.get("lr_scheduler_type", "")).startswith("constant"):
        found.pop("max_steps", None)
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs, as `key: value now (was value then)`; keys that only one of both knows are left out.

    A key that another version of the program has added or taken away says nothing about the run.

    Args:
        old: from learning_options, perhaps by way of a JSON file.
        new: likewise.
    """
    return [
        f"{name}: {json.dumps(new[name])} (was {json.dumps(old[name])})"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not is_secret(str(key))}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if hasattr(value, "value"):
        return value.value
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
