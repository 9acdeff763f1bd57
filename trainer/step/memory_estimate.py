"""What training takes of memory, estimated from sizes that are known before the first pass."""

from __future__ import annotations

import logging
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from trainer.config.deepspeed_presets import zero_stage
from trainer.policy.logprobs import KEPT_LOGITS_BYTES, PackedPolicy
from trainer.weight_sync.sources import full_numel

if TYPE_CHECKING:
    from trainer.config.shared import SharedOptions

log = logging.getLogger(__name__)

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, without activations."""

    weights: int
    gradients: int
    optimizer_state: int
    """Of AdamW; other optimizers take less."""
    logits: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(astuple(self))


def estimate(
    *,
    weight_bytes: int,
    trained_bytes: int,
    trained_parameters: int,
    zero_stage: int,
    ranks: int,
    pass_tokens: int,
    chunk_size: int,
    vocabulary: int,
) -> MemoryEstimate:
    """What one rank holds. Parts that DeepSpeed keeps in host memory are counted like the others.

    Args:
        weight_bytes: of all weights, frozen ones included.
        trained_bytes, trained_parameters: of those that the optimizer updates.
        zero_stage: 0 without DeepSpeed.
        pass_tokens: of the largest pass.
        chunk_size: tokens whose logits are made at once.
    """
    # DeepSpeed keeps a float32 copy of the weights beside the two moments; without it they have the weights' type.
    state = 3 * _FLOAT32_BYTES * trained_parameters if zero_stage else 2 * trained_bytes
    token_bytes = _FLOAT32_BYTES * vocabulary
    chunk = min(chunk_size, pass_tokens)
    kept = pass_tokens if token_bytes * pass_tokens <= KEPT_LOGITS_BYTES else chunk
    return MemoryEstimate(
        weights=weight_bytes // (ranks if zero_stage == 3 else 1),
        gradients=trained_bytes // (ranks if zero_stage >= 2 else 1),
        optimizer_state=state // (ranks if zero_stage else 1),
        # Two more of a chunk to compute in.
        logits=token_bytes * (kept + 2 * chunk),
    )


def log_estimate(policy: PackedPolicy, config: SharedOptions, *, pass_tokens: int) -> None:
    """One line, on rank 0. For a policy whose weights are loaded, and wrapped where they will be."""
    if config.process_index > 0:
        return
    sizes = [(full_numel(p), full_numel(p) * p.element_size(), p.requires_grad) for p in policy.parameters()]
    found = estimate(
        weight_bytes=sum(size_bytes for _, size_bytes, _ in sizes),
        trained_bytes=sum(size_bytes for _, size_bytes, is_trained in sizes if is_trained),
        trained_parameters=sum(numel for numel, _, is_trained in sizes if is_trained),
        zero_stage=zero_stage(config.deepspeed),
        ranks=config.world_size,
        pass_tokens=pass_tokens,
        chunk_size=config.logprob_chunk_size,
        vocabulary=policy.config.get_text_config().vocab_size,
    )
    parts = (found.total, found.weights, found.gradients, found.optimizer_state, found.logits)
    log.info(
        "memory of a rank, an estimate: %.2f GiB = weights %.2f + gradients %.2f + optimizer state %.2f + logits %.2f; on top "
        "come the activations of passes of %d tokens, and a reference or teacher in this process",
        *(size_bytes / 2**30 for size_bytes in parts),
        pass_tokens,
    )
