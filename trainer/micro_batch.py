"""Tensors of one packed micro batch, and the share of a step's batch that one rank trains on.

Shapes: T tokens of the micro batch, M of them trained.
"""

# ruff: noqa: N815  fields carry a shape suffix, as arguments and variables do

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from atroposlib.wire.columns import Float32
from trainer.losses import LossAggregation, loss_weights
from trainer.packing import pack_for_ranks
from trainer.step_batch import StepBatch, TrainSequence


@dataclass(frozen=True)
class MicroBatch:
    """Sequences laid end to end, for one forward and backward pass."""

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    """Restart at 0 with each sequence; that is how attention knows where one ends."""
    target_positions_M: Tensor
    """Where in T the hidden state lies that predicts the trained token: one before it."""
    target_ids_M: Tensor
    temperatures_M: Tensor
    advantages_M: Tensor
    loss_weights_M: Tensor
    """What the token counts in the loss of the whole batch; 0 in a micro batch that only keeps step."""
    inference_logprobs_M: Tensor
    has_inference_logprobs_M: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a step. The same number of micro batches on every rank."""

    batch: StepBatch
    micro_batches: tuple[MicroBatch, ...]


def share_of_rank(
    batch: StepBatch,
    *,
    rank: int,
    ranks: int,
    max_tokens: int,
    hidden_size: int,
    aggregation: LossAggregation,
    max_completion_length: int | None,
) -> RankShare:
    """Pack the batch's trained sequences for all ranks and build the tensors of one of them.

    Args:
        max_tokens: of a micro batch; a longer sequence gets one of its own.
        hidden_size: of the model, for the balance of cost.
    """
    weights_N = loss_weights(
        torch.tensor([sequence.trained_tokens for sequence in batch.sequences]),
        torch.tensor([sequence.group_index for sequence in batch.sequences]),
        aggregation=aggregation,
        max_completion_length=max_completion_length,
    ).tolist()
    trained = [i for i, sequence in enumerate(batch.sequences) if sequence.trained_tokens]
    lengths = [len(batch.sequences[i].tokens_L) for i in trained]
    shares = pack_for_ranks(lengths, capacity=max_tokens, ranks=ranks, hidden_size=hidden_size)
    micro_batches = []
    for plan in shares[rank]:
        indices = [trained[i] for i in plan]
        micro_batches.append(
            build_micro_batch([batch.sequences[i] for i in indices], [weights_N[i] for i in indices])
            if indices
            else idle_micro_batch()
        )
    return RankShare(batch, tuple(micro_batches))


def build_micro_batch(sequences: Sequence[TrainSequence], weights: Sequence[float]) -> MicroBatch:
    """Lay sequences end to end.

    Args:
        sequences: at least one, each with a trained token.
        weights: what one token of each counts in the loss.
    """
    lengths = [len(sequence.tokens_L) for sequence in sequences]
    targets_T = np.concatenate([sequence.is_trained_L for sequence in sequences])
    targets_M = np.flatnonzero(targets_T)
    tokens_T = np.concatenate([sequence.tokens_L for sequence in sequences]).astype(np.int64)
    positions_T = np.concatenate([np.arange(length) for length in lengths])

    def trained(columns: Sequence[npt.NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(columns)[targets_M].astype(np.float32))

    def constant(values: Sequence[float]) -> Tensor:
        return trained([np.full(length, value) for length, value in zip(lengths, values, strict=True)])

    return MicroBatch(
        input_ids_1T=torch.from_numpy(tokens_T)[None],
        position_ids_1T=torch.from_numpy(positions_T)[None],
        target_positions_M=torch.from_numpy(targets_M - 1),
        target_ids_M=torch.from_numpy(tokens_T[targets_M]),
        temperatures_M=constant([sequence.temperature for sequence in sequences]),
        advantages_M=trained([sequence.advantages_L for sequence in sequences]),
        loss_weights_M=constant(weights),
        inference_logprobs_M=trained([_or_zeros(s.inference_logprobs_L, len(s.tokens_L)) for s in sequences]),
        has_inference_logprobs_M=constant([float(s.inference_logprobs_L is not None) for s in sequences]) > 0,
    )


def _or_zeros(column_L: Float32 | None, length: int) -> Float32:
    return np.zeros(length, dtype=np.float32) if column_L is None else column_L


def idle_micro_batch() -> MicroBatch:
    """Two tokens of weight 0: a pass that changes nothing and lets the other ranks' collectives find a partner."""
    return MicroBatch(
        input_ids_1T=torch.zeros(1, 2, dtype=torch.int64),
        position_ids_1T=torch.arange(2)[None],
        target_positions_M=torch.zeros(1, dtype=torch.int64),
        target_ids_M=torch.zeros(1, dtype=torch.int64),
        temperatures_M=torch.ones(1),
        advantages_M=torch.zeros(1),
        loss_weights_M=torch.zeros(1),
        inference_logprobs_M=torch.zeros(1),
        has_inference_logprobs_M=torch.zeros(1, dtype=torch.bool),
    )
