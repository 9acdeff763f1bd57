"""What a run trains, talks to and asks for, by its configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from atroposlib.client import RolloutClient
from atroposlib.errors import ConfigError
from atroposlib.wire.models import RunRequest
from trainer.batches.stream import Client
from trainer.config.grpo import GRPOConfig
from trainer.policy.kernels import use_kernels
from trainer.policy.loading import PolicySaver, build_policy, load_policy
from trainer.policy.logprobs import PackedPolicy
from trainer.policy.lora import options_of
from trainer.policy.quantization import check_in_memory, quantization_of

ENGINE_DTYPE = torch.bfloat16
"""What weights are converted to on their way into the engines."""


def resolve_config(config: GRPOConfig | None, args: GRPOConfig | None, model: Any) -> GRPOConfig:
    """The configuration, under either of its names; defaults where there is none.

    Raises:
        ConfigError: two that differ, or a model name that is not the configuration's.
    """
    if config is not None and args is not None and config is not args:
        raise ConfigError("config and args are two names of one thing: give one of them")
    found = config if config is not None else args
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", None)
    if found is None:
        return GRPOConfig(model_name_or_path=name or "in-memory")
    if name and not found.model_name_or_path:
        found = copy.copy(found)
        found.model_name_or_path = name
    if isinstance(model, str) and model != found.model_name_or_path:
        raise ConfigError(
            f"model={model!r} is not the configuration's model_name_or_path={found.model_name_or_path!r}: "
            "give one of them, or both alike"
        )
    return found


def policy_of(config: GRPOConfig, model: Any) -> PackedPolicy:
    """The policy to train: from memory, or the one that the configuration names.

    Raises:
        ConfigError: it cannot be trained here, or an option asks for what can only be done while it is loaded.
    """
    if isinstance(model, str) or model is None:
        return load_named(config, config.model_name_or_path, is_trained=True)
    check_in_memory(config, model)
    use_kernels(model, config)
    return build_policy(model, logprob_chunk_size=config.logprob_chunk_size, lora=options_of(config))


def load_named(config: GRPOConfig, name: str, *, is_trained: bool) -> PackedPolicy:
    """A model by folder or Hub id, with the policy's options.

    Args:
        is_trained: with the adapter, if the configuration asks for one.
    """
    return load_policy(
        name,
        torch_dtype=config.torch_dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        logprob_chunk_size=config.logprob_chunk_size,
        lora=options_of(config) if is_trained else None,
        quantization=quantization_of(config),
        prepare=partial(use_kernels, config=config),
    )


def policy_saver(config: GRPOConfig, *, takes_tokenizer: bool) -> PolicySaver:
    """Writes the policy's folders.

    Args:
        takes_tokenizer: the one that the configuration names is saved beside the weights.
    """
    name = (config.tokenizer_name_or_path or config.model_name_or_path) if takes_tokenizer else None
    return PolicySaver(name, trust_remote_code=config.trust_remote_code)


def run_request(config: GRPOConfig, *, start_step: int) -> RunRequest:
    """What the rollout server is asked for."""
    return RunRequest(
        run_name=str(config.run_name),
        batch_size=config.batch_size,
        max_staleness=config.max_staleness,
        late_policy=config.late_policy,
        max_token_len=config.max_token_len,
        num_steps=config.max_steps,
        start_step=start_step,
        group_size=config.group_size,
        model_name=config.model_name_or_path,
        checkpoint_dir=str(config.output_dir),
        save_checkpoint_interval=int(config.save_steps),
        wandb_project=config.project if config.reports_to("wandb") else None,
    )


def rollout_client(config: GRPOConfig) -> Callable[[], Client]:
    """Makes the client of the rollout server."""
    # A rollout server that restarts is waited for as long as a batch is.
    return lambda: RolloutClient(
        config.rollout_server_url, deadline_s=config.batch_deadline_s, token=config.rollout_server_token
    )
