"""The publisher of a training run: transport, pool of servers, proof that they compute as the trainer does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atroposlib.client import RolloutClient
from trainer.config.grpo import GRPOConfig
from trainer.policy.logprobs import PackedPolicy
from trainer.policy.lora import adapter_config
from trainer.run.publication import Publisher
from trainer.weight_sync.connect import ADAPTER_NAME, DETECT_S, connect
from trainer.weight_sync.engines.detect import control_for
from trainer.weight_sync.guard import GuardedPublisher, NumericsGuard
from trainer.weight_sync.pool import Pool
from trainer.weight_sync.pooled_publisher import PooledPublisher
from trainer.weight_sync.registry import RolloutRegistry
from trainer.weight_sync.scoring import fixed_prompts, score_tokens
from trainer.weight_sync.sources import is_partitioned

log = logging.getLogger(__name__)

REGISTRY_S = 3.0
"""For the rollout server to answer about the registry."""


def has_engines(config: GRPOConfig) -> bool:
    """Whether the run publishes weights. Every rank decides alike."""
    return bool(config.inference_servers) or config.weight_sync.use_registry


def proves_logprobs(config: GRPOConfig, policy: PackedPolicy) -> bool:
    """Whether the start proves that the engines report processed logprobs: in vLLM, those of what it samples from.

    SGLang's have the temperature, which is what is probed, but not top_p and min_p: there this promises too much.
    """
    return has_engines(config) and config.weight_sync.probe and not is_partitioned(policy)


def publisher_for(config: GRPOConfig, policy: PackedPolicy, *, dtype: torch.dtype, tokenizer: Any) -> Publisher | None:
    """The publisher of rank 0; None when the run has no inference servers.

    Args:
        policy: the trainer's, for comparison.
        dtype: the engines'.
        tokenizer: the policy's; None without one.
    """
    if not has_engines(config):
        log.warning(
            "no inference server gets new weights: name them in inference_servers, or set weight_sync.use_registry=true for "
            "those that register with the rollout server"
        )
        return None
    guard = _guard(config, policy, tokenizer)
    publisher = connect(
        config.inference_servers,
        config.weight_sync,
        dtype=dtype,
        folder=Path(config.run_dir) / "weights",
        model_folder=config.model_name_or_path,
        has_cuda=config.device.type == "cuda",
        adapter=adapter_config(policy.lm) if config.sends_adapter else None,
        prove=guard.prove if guard is not None else None,
    )
    pooled = PooledPublisher(publisher, _pool(config))
    return pooled if guard is None else GuardedPublisher(pooled, guard)


def _guard(config: GRPOConfig, policy: PackedPolicy, tokenizer: Any) -> NumericsGuard | None:
    if is_partitioned(policy):
        log.info(
            "weights are sharded: logprobs of the engines are compared in training only (mismatch/*), not at the start"
        )
        return None
    return NumericsGuard(
        config.weight_sync,
        lambda token_ids, temperature: score_tokens(policy, token_ids, temperature),
        fixed_prompts(
            None if tokenizer is None else tokenizer.encode, vocabulary=policy.config.get_text_config().vocab_size
        ),
        model=ADAPTER_NAME if config.sends_adapter else None,
        # vLLM's CPU build dies of prompt logprobs while adapters are loaded.
        can_fingerprint=not config.sends_adapter or config.device.type == "cuda",
        chat_ids=_chat_ids(tokenizer),
    )


def _chat_ids(tokenizer: Any) -> Callable[[str], list[int]] | None:
    if not getattr(tokenizer, "chat_template", None):
        return None

    def ids_of(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(rendered, add_special_tokens=False))

    return ids_of


def _pool(config: GRPOConfig) -> Pool:
    def client() -> Any:
        return RolloutClient(config.rollout_server_url, deadline_s=REGISTRY_S, token=config.rollout_server_token)

    return Pool(
        config.inference_servers,
        RolloutRegistry(client),
        lambda url: control_for(url, DETECT_S),
        takes_registered=config.weight_sync.use_registry,
    )
